"""What fewer bits change: right answers of the demo model, and tokens and logits of any model against bfloat16.

`python -m benchmarks.quality --model_dir DIR`: for each mode the held-out sums of `demo.evaluate` that the demo model
answers right; then, on DIR, the relative error of logits against those in bfloat16, and the share of greedy tokens that
are the same for the same text before them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import servers
from benchmarks.weights import load
from demo import evaluate, exam
from devtools.processes import ROOT

MODES = {"float32": ["--dtype", "float32"], "bfloat16": ["--dtype", "bfloat16"]} | {
    word: ["--dtype", "bfloat16", "--quantization", word] for word in ("8bit", "4bit")
}
QUESTIONS = 500
TEXTS, TOKENS = 8, 64


def accuracy(flags: Sequence[str]) -> float:
    """Of the held-out sums, answered by the predictor with these flags on the demo model, 0..1."""
    asked = exam.held_out_questions(QUESTIONS)
    questions, results = [question for question, _ in asked], [result for _, result in asked]
    with servers.predictor("predictor", ROOT / "demo" / "model", flags) as server:
        answers = evaluate.complete_by_server(server.url.removesuffix("/v1"), server.model, questions)
    return evaluate.accuracy(answers, results)


@torch.inference_mode()
def logits(directory: Path, word: str) -> torch.Tensor:
    """Of random texts, (texts, tokens, vocabulary), in float32."""
    loaded = load(directory, word)
    texts = torch.randint(1, loaded.vocabulary_tokens, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))
    return torch.cat([loaded.model(text[None]).logits.float() for text in texts])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, help="whose logits are compared")
    arguments = parser.parse_args(sys.argv[1:])
    for mode, flags in MODES.items():
        print(f"{mode:<9} {100 * accuracy(flags):.1f} % of {QUESTIONS} held-out sums right")
    if arguments.model_dir:
        right = logits(arguments.model_dir, "none")
        for word in ("8bit", "4bit"):
            found = logits(arguments.model_dir, word)
            error = float((found - right).norm() / right.norm())
            agree = float((found.argmax(-1) == right.argmax(-1)).float().mean())
            print(f"{word:<9} logits {100 * error:.1f} % off, {100 * agree:.1f} % of greedy tokens the same")


if __name__ == "__main__":
    main()
