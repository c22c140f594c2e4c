"""Measure what sampling costs a step: `python -m benchmarks.sampling`.

Prints the median in milliseconds for each kind of sampling parameters, as a Markdown table. On a GPU the time is that of
the pass on the device, its preparation on the host included.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.kernels import milliseconds
from predictor.engine.batch_sampler import BatchSampler
from predictor.engine.sampler import Row, SequenceSampler
from predictor.types import SamplingParams

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
    """Return the median duration of a pass in milliseconds."""
    rng = random.Random(1)
    logits = LOGITS_DEVIATION * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))
    logits = logits.to(device)
    step, sample = logits.clone(), BatchSampler()
    sequences = []
    for index in range(rows):
        sampler = SequenceSampler(SamplingParams(seed=index, **parameters), PROMPT_TOKENS, ())
        token_ids = rng.choices(range(vocabulary), k=PROMPT_TOKENS + OUTPUT_TOKENS)
        sequences.append((sampler, _Sequence(str(index), token_ids)))
    running = {state.request_id for _, state in sequences}

    def run() -> None:
        used = [Row(index, PROMPT_TOKENS + OUTPUT_TOKENS, state, sampler) for index, (sampler, state) in enumerate(sequences) if sampler.is_used]
        if used:
            sample(step, used, vocabulary, running)
        step.argmax(dim=-1).tolist()

    def copy() -> None:
        step.copy_(logits)
        step.argmax(dim=-1).tolist()

    def both() -> None:
        step.copy_(logits)
        run()

    return milliseconds(both, repetitions) - milliseconds(copy, repetitions)
