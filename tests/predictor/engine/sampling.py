"""Steps of sequences without a model."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from predictor.engine.batch_sampler import BatchSampler
from predictor.engine.sampler import Row, SequenceSampler
from predictor.types import SamplingParams

VOCABULARY = 1500
CROWD = 64
STEPS = 6
PROMPT = [3, 1, 3, 7]
EVEN = np.packbits(np.arange(VOCABULARY) % 2 == 0, bitorder="little")
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 3.0, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 5.0, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 1200, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 2.0, "repetition_penalty": 1.3, "frequency_penalty": -0.5},
    {"temperature": 1.0, "logit_bias": ((5, 10.0), (6, 9.5), (7, -100.0))},
    {"temperature": 1.0, "allowed_token_ids": tuple(range(100, 120))},
    {"temperature": 1.0, "suppress_tokens": (1, 2, 3), "begin_suppress_tokens": (4, 5), "min_tokens": 3},
    {"temperature": 1.0, "no_repeat_ngram_size": 2, "bad_words_ids": ((3,), (7, 5))},
    {"temperature": 1.0, "token_masks": (lambda: lambda *_: EVEN,), "top_p": 0.9},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.0, "logprobs": 0, "presence_penalty": 2.0},
]
"""Of the sequences of a crowd, in turn."""


@dataclass
class Sequence:
    """The manager's state of a sequence."""

    request_id: str
    initial_tokens: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)


Sampled = tuple[SequenceSampler, Tokens[int], Tokens[int]]
"""Sampler, prompt and output of a sequence, whose request id is the identity of its sampler."""


def rows_of(sequences: Tokens[Sampled]) -> list[Row]:
    return [
        Row(index, len(prompt) + len(output), Sequence(str(id(sampler)), list(prompt), list(output)), sampler)
        for index, (sampler, prompt, output) in enumerate(sequences)
        if sampler.is_used
    ]


def sample_step(
    logits: torch.Tensor, sequences: Tokens[Sampled], batch_sampler: BatchSampler | None = None
) -> list[int]:
    """Sample once from each row of `logits`, in place, and return the tokens."""
    if rows := rows_of(sequences):
        running = {row.state.request_id for row in rows}
        (batch_sampler or BatchSampler())(logits, rows, logits.shape[1], running)
    token_ids: list[int] = logits.argmax(dim=1).tolist()
    return token_ids


def sampler(index: int, prompt_tokens: int = len(PROMPT)) -> SequenceSampler:
    sampling = SamplingParams(seed=index, **PARAMETERS[index % len(PARAMETERS)])
    return SequenceSampler(sampling, prompt_tokens, end_token_ids=(0, 8))


def model(text: Tokens[int]) -> torch.Tensor:
    """Logits by the text, float32."""
    return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(hash(tuple(text))))


def generate(
    indices: Tokens[int],
    *,
    batch: BatchSampler | None = None,
    prompt: Tokens[int] = PROMPT,
    forget: bool = False,
    device: str = "cpu",
) -> dict[int, list[int]]:
    """Tokens of the sequences, which are sampled together in this order; each step may have a new batch sampler."""
    batch = batch or BatchSampler()
    samplers = {index: sampler(index, len(prompt)) for index in indices}
    outputs: dict[int, list[int]] = {index: [] for index in indices}
    for _ in range(STEPS):
        logits = torch.stack([model([*prompt, *outputs[index]]) for index in indices]).to(device)
        sequences = [(samplers[index], prompt, outputs[index]) for index in indices]
        sampled = sample_step(logits, sequences, BatchSampler() if forget else batch)
        for index, token_id in zip(indices, sampled, strict=True):
            outputs[index].append(token_id)
    assert [one.failure for one in samplers.values()] == [None] * len(indices)
    return outputs
