"""The nouns of generation, shared by protocols, tokenization and engine; they hold values and no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = Mapping[str, Any]
"""One chat message as the chat template takes it: at least `role` and `content`."""


class FinishReason(StrEnum):
    """Why a completion ended, in the words of the Open Inference Protocol's generate extension."""

    EOS_TOKEN = "eos_token"  # noqa: S105
    LENGTH = "length"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when to stop. None: the model's own default."""

    max_tokens: int | None = None
    """New tokens at most, >= 1."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    """Cumulative probability kept, 0 < top_p <= 1."""
    top_k: int | None = None
    """Most probable tokens kept; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; not part of it."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, either raw text or chat messages, and how to continue it."""

    prompt: str | tuple[Message, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Step:
    """What one or more decode steps added to a sequence: token ids; the last step has a finish reason."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one generation request."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    """Generated tokens, the end-of-sequence token included."""
