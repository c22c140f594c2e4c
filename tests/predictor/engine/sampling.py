"""Steps of sequences without a model."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import torch

from predictor.engine.batch_sampler import BatchSampler
from predictor.engine.sampler import Row, SequenceSampler


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
