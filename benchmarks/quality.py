"""Measure what quantization of weights and KV cache changes: the demo model's accuracy, any model's logits.

`python -m benchmarks.quality --model_dir DIR` prints the accuracy on `demo.evaluate`'s held-out sums for each mode. On
DIR it prints the relative error of the logits against bfloat16 and the share of equal greedy tokens, given the same
prefix.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache

from benchmarks import servers
from benchmarks.weights import load
from demo import evaluate, exam
from devtools.paths import DEMO_MODEL
from predictor.kernels import int8_heads

MODES = {"float32": ["--dtype", "float32"], "bfloat16": ["--dtype", "bfloat16"]} | {
    mode: ["--dtype", "bfloat16", "--quantization", mode] for mode in ("8bit", "4bit")
}
MODES["int8 KV cache"] = [*MODES["8bit"], "--kv_cache_dtype", "int8"]
QUESTIONS = 500
TEXTS, TOKENS = 8, 64


class Int8Cache(DynamicCache):  # type: ignore[misc, unused-ignore]
    """Keys and values as an int8 KV cache returns them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round keys and values of (batch, heads, tokens, head_dim), store them and return all."""
        rounded = (
            int8_heads.dequantize(int8_heads.quantize(states), states.shape[-1], states.dtype)
            for states in (key_states, value_states)
        )
        keys, values = super().update(*rounded, *arguments, **options)
        return keys, values


def accuracy(flags: Sequence[str]) -> float:
    """Return the demo model's accuracy on held-out sums with these predictor flags, 0 to 1."""
    sums = exam.held_out_questions(QUESTIONS)
    questions, results = [question for question, _ in sums], [result for _, result in sums]
    with servers.predictor("predictor", DEMO_MODEL, flags) as server:
        answers = evaluate.complete_by_server(server.url.removesuffix("/v1"), server.model, questions)
    return evaluate.accuracy(answers, results)


def logits(directory: Path, mode: str, cache: type[Cache] = DynamicCache) -> torch.Tensor:
    """Return float32 logits of random texts, (texts, tokens, vocabulary); `cache` makes the KV cache of each."""
    loaded = load(directory, mode)
    texts = torch.randint(1, loaded.vocabulary_tokens, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.cat([loaded.model(text[None], past_key_values=cache()).logits.float() for text in texts])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, help="model whose logits are compared")
    arguments = parser.parse_args(sys.argv[1:])
    for mode, flags in MODES.items():
        print(f"{mode:<13} {100 * accuracy(flags):.1f} % of {QUESTIONS} held-out sums correct")
    if arguments.model_dir:
        reference = logits(arguments.model_dir, "none")
        others = {mode: logits(arguments.model_dir, mode) for mode in ("8bit", "4bit")}
        others["int8 KV cache"] = logits(arguments.model_dir, "none", Int8Cache)
        for mode, quantized in others.items():
            error = float((quantized - reference).norm() / reference.norm())
            equal = float((quantized.argmax(-1) == reference.argmax(-1)).float().mean())
            print(f"{mode:<13} logits differ by {100 * error:.1f} %, {100 * equal:.1f} % of greedy tokens are equal")


if __name__ == "__main__":
    main()
