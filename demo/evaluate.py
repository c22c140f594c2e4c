"""Measure the accuracy on held-out sums: `python -m demo.evaluate TARGET`.

TARGET is the URL of a running server (Open Inference Protocol v2) or a directory of weights (transformers' own
`generate`, independent of the predictor).
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
    """Yield the questions in batches of `BATCH_SIZE`."""
    for start in range(0, len(questions), BATCH_SIZE):
        yield questions[start : start + BATCH_SIZE]


def complete_by_server(url: str, model_name: str, questions: list[str]) -> list[str]:
    """Return a server's answers in order; each batch is one v2 request."""
    import httpx

    answers: list[str] = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for batch in batches(questions):
            messages = [json.dumps([{"role": "user", "content": question}]) for question in batch]
            try:
                response = client.post(
                    f"/v2/models/{model_name}/infer",
                    json={
                        "inputs": [{"name": "messages", "datatype": "BYTES", "shape": [len(batch)], "data": messages}],
                        "outputs": [{"name": "text_output"}],
                        "parameters": {"temperature": 0.0, "max_tokens": MAX_TOKENS},
                    },
                )
            except httpx.TransportError as error:
                raise SystemExit(f"{url} does not respond ({error}); start the predictor there first.") from None
            if response.is_error:
                raise SystemExit(f"{url} answered {response.status_code}: {response.text}")
            answers += response.json()["outputs"][0]["data"]
    return answers


def complete_by_generate(directory: Path, questions: list[str]) -> list[str]:
    """Return the greedy answers of a directory of weights in order, computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    answers: list[str] = []
    for batch in batches(questions):
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": question}] for question in batch],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            generated = model.generate(**prompts, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(generated[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def accuracy(answers: list[str], results: list[int]) -> float:
    """Return the share of answers that end with the correct number, 0 to 1."""
    correct = sum(exam.final_number(answer) == result for answer, result in zip(answers, results, strict=True))
    return correct / len(results)


def main() -> None:
    """Print the accuracy; exit with 1 if it is below `--at_least`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a server's URL or a directory of weights")
    parser.add_argument("--served_model_name", default="demo", help="name in the server's URLs (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=500, help="number of sums (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at_least", type=float, default=0.97, help="required accuracy (default: %(default)s)")
    arguments = parser.parse_args()

    sums = exam.held_out_questions(arguments.questions, arguments.seed)
    questions, results = [question for question, _ in sums], [result for _, result in sums]
    if arguments.target.startswith(("http://", "https://")):
        answers = complete_by_server(arguments.target, arguments.served_model_name, questions)
    elif not (Path(arguments.target) / "config.json").is_file():
        sys.exit(f"{arguments.target} has no config.json; pass a directory of weights or the http:// URL of a server.")
    else:
        answers = complete_by_generate(Path(arguments.target), questions)
    for question, result, answer in zip(questions, results, answers, strict=True):
        if exam.final_number(answer) != result:
            print(f"wrong: {question!r} -> {answer!r}, expected {result}")
    share = accuracy(answers, results)
    print(f"{share:.1%} of {len(results)} held-out sums correct")
    sys.exit(share < arguments.at_least)


if __name__ == "__main__":
    main()
