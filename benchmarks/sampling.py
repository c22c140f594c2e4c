"""Measure what sampling costs a step: `python -m benchmarks.sampling`.

Prints the median in milliseconds for each kind of sampling parameters as a Markdown table, with the work of the host.
"""

import argparse
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from predictor.engine.batch_sampler import BatchSampler
from predictor.engine.sampler import Row, SequenceSampler
from predictor.types import SamplingParams

VOCABULARY = 151_936
"""Of Qwen2."""
PROMPT_TOKENS, OUTPUT_TOKENS = 500, 200
LOGITS_DEVIATION = 3.0
"""Of the logits of a small model at a typical position."""


def kinds(vocabulary: int) -> dict[str, dict[str, Any]]:
    """Return sampling parameters by their names."""
    mask = np.random.default_rng(1).integers(0, 256, -(-vocabulary // 8), dtype=np.uint8)
    sampled = {"temperature": 1.0}
    return {
        "greedy": {"temperature": 0.0},
        "temperature": sampled,
        "top_p 0.9": {**sampled, "top_p": 0.9},
        "top_k 20, top_p 0.8": {**sampled, "top_k": 20, "top_p": 0.8},
        "min_p 0.05": {**sampled, "min_p": 0.05},
        "penalties": {**sampled, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1},
        "mask of a grammar": {**sampled, "token_masks": (lambda: lambda *_: mask,)},
        "greedy, mask of a grammar": {"temperature": 0.0, "token_masks": (lambda: lambda *_: mask,)},
        "logprobs": {**sampled, "logprobs": 5},
    }


@dataclass
class _Sequence:
    request_id: str
    initial_tokens: list[int]
    generated_tokens: list[int] = field(default_factory=list)


def measure(parameters: dict[str, Any], rows: int, vocabulary: int, device: torch.device, repetitions: int) -> float:
    """Return the median duration of sampling from all rows, without the largest logit that the manager takes."""
    rng = random.Random(1)
    logits = LOGITS_DEVIATION * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)).to(device)
    position = PROMPT_TOKENS + OUTPUT_TOKENS
    sequences = [
        Row(
            index,
            position,
            _Sequence(str(index), rng.choices(range(vocabulary), k=position)),
            SequenceSampler(SamplingParams(seed=index, **parameters), PROMPT_TOKENS, ()),
        )
        for index in range(rows)
    ]
    running = {row.state.request_id for row in sequences}
    sample, durations = BatchSampler(), []
    for _ in range(repetitions + 1):
        step = logits.clone()
        _synchronize(device)
        began = time.perf_counter()
        if used := [row for row in sequences if row.sampler.is_used]:
            sample(step, used, vocabulary, running)
        _synchronize(device)
        durations.append(1000 * (time.perf_counter() - began))
    return statistics.median(durations[1:])


def measure_all(rows: int, device: torch.device, repetitions: int, vocabulary: int = VOCABULARY) -> dict[str, float]:
    """Return what `measure` does, for each kind of parameters."""
    with torch.inference_mode():
        return {
            name: measure(parameters, rows, vocabulary, device, repetitions)
            for name, parameters in kinds(vocabulary).items()
        }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of torch (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="(default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=10, help="(default: %(default)s)")
    arguments = parser.parse_args()
    print(f"| {arguments.rows} rows of {arguments.vocabulary} tokens on {arguments.device} | ms |\n|---|---|")
    device = torch.device(arguments.device)
    for name, value in measure_all(arguments.rows, device, arguments.repetitions, arguments.vocabulary).items():
        print(f"| {name} | {value:.1f} |")


if __name__ == "__main__":
    main()
