"""How many held-out sums a model answers exactly right: `python -m demo.evaluate TARGET`.

TARGET is a running server's URL (asked over the Open Inference Protocol v2) or a directory of weights (asked
through transformers' own `generate`, a second opinion on the predictor). Prints the share that is right.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from demo import exam

BATCH_SIZE = 50
MAX_TOKENS = 48


def batches(questions: list[str]) -> Iterator[list[str]]:
    """The questions, `BATCH_SIZE` at a time."""
    for start in range(0, len(questions), BATCH_SIZE):
        yield questions[start : start + BATCH_SIZE]


def ask_server(url: str, model_name: str, questions: list[str]) -> list[str]:
    """The answers of a running server, in order; each batch is one v2 request."""
    import httpx

    answers: list[str] = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for asked in batches(questions):
            messages = [json.dumps([{"role": "user", "content": question}]) for question in asked]
            try:
                response = client.post(
                    f"/v2/models/{model_name}/infer",
                    json={
                        "inputs": [{"name": "messages", "datatype": "BYTES", "shape": [len(asked)], "data": messages}],
                        "outputs": [{"name": "text_output"}],
                        "parameters": {"temperature": 0.0, "max_tokens": MAX_TOKENS},
                    },
                )
            except httpx.TransportError as error:
                raise SystemExit(f"{url} does not answer ({error}); is the predictor running there?") from None
            if response.is_error:
                raise SystemExit(f"{url} answered {response.status_code}: {response.text}")
            answers += response.json()["outputs"][0]["data"]
    return answers


def ask_directory(directory: Path, questions: list[str]) -> list[str]:
    """The answers of the weights in a directory, in order, greedy, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    answers: list[str] = []
    for asked in batches(questions):
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": question}] for question in asked],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            generated = model.generate(**prompts, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(generated[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def share_right(answers: list[str], results: list[int]) -> float:
    """The share of answers that end with exactly the right number, 0..1."""
    right = sum(exam.final_number(answer) == result for answer, result in zip(answers, results, strict=True))
    return right / len(results)


def main() -> None:
    """Ask, count, print; exit code 1 when fewer than `--at_least` are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a server's URL or a directory of weights")
    parser.add_argument("--served_model_name", default="demo", help="name in the server's URLs (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=500, help="how many sums (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at_least", type=float, default=0.97, help="share that passes (default: %(default)s)")
    arguments = parser.parse_args()

    asked = exam.held_out_questions(arguments.questions, arguments.seed)
    questions, results = [question for question, _ in asked], [result for _, result in asked]
    if arguments.target.startswith(("http://", "https://")):
        answers = ask_server(arguments.target, arguments.served_model_name, questions)
    elif not (Path(arguments.target) / "config.json").is_file():
        sys.exit(f"{arguments.target} has no config.json; give a directory of weights, or a server's http:// URL.")
    else:
        answers = ask_directory(Path(arguments.target), questions)
    for question, result, answer in zip(questions, results, answers, strict=True):
        if exam.final_number(answer) != result:
            print(f"wrong: {question!r} -> {answer!r}, not {result}")
    share = share_right(answers, results)
    print(f"{share:.1%} of {len(results)} held-out sums exactly right")
    sys.exit(share < arguments.at_least)


if __name__ == "__main__":
    main()
