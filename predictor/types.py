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
    min_tokens: int = 0
    """New tokens before an end-of-sequence token, a stop token or a stop string may end the completion."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    """Cumulative probability kept, 0 <= top_p <= 1; at least one token is."""
    top_k: int | None = None
    """Most probable tokens kept; 0 keeps all."""
    repetition_penalty: float | None = None
    """Divides positive logits, and multiplies negative ones, of tokens of the prompt and the completion; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the completion holds already."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the completion holds the token already."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, besides the model's own end of sequence; not part of its text."""
    ignore_eos: bool = False
    """Go on after the model's own end of sequence, up to `max_tokens`."""
    seed: int | None = None
    """Makes a sampled completion repeatable on the same server, device and version; None draws anew."""
    logprobs: int | None = None
    """Report log probabilities of the chosen token and of so many most probable ones; None reports none."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages for the model's chat template, and the tools that the template may offer to the model."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, as raw text, token ids or a chat, and how to continue it."""

    prompt: str | tuple[int, ...] | Chat
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    """Independent completions of the prompt; a seed counts up from one to the next."""
    echo: bool = False
    """Put the prompt's text before the completion's."""


MIN_LOGPROB = -9999.0
"""What OpenAI's API gives for a log probability too low to tell; JSON knows no infinity."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's log probability under the model, before temperature and penalties, and its rivals'.

    Finite, and not less than MIN_LOGPROB.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability) of the most probable tokens, best first."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one or more decode steps added to a sequence: token ids; the last step has a finish reason."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token id where the request asked, else none."""


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token as text, where the request asked for log probabilities."""

    id: int
    text: str
    """May hold U+FFFD where the token is part of a character only."""
    logprob: float
    special: bool = False
    top: tuple["Token", ...] = ()
    """The most probable tokens in its place, best first."""


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """What a stream adds to one completion; the last one of each completion has a finish reason."""

    index: int
    """Which completion: those of the first request come first, `n` of each."""
    text: str
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated so far, the end-of-sequence token included."""
    finish_reason: FinishReason | None = None
    tokens: tuple[Token, ...] = ()
    """The tokens generated since the piece before, if asked for; text held back for a stop string may lag behind."""


CANCELLED, DEADLINE, FAILED = "cancelled", "deadline", "failed"
"""How a sequence may end, beside the finish reasons: its reader left, its time was over, the engine failed."""


@dataclass(frozen=True, slots=True)
class FinishedSequence:
    """What became of a sequence, and when: instants of its life in seconds after its admission."""

    index: int
    """Which completion, as in `CompletionDelta`."""
    outcome: str
    """A finish reason, CANCELLED, DEADLINE or FAILED."""
    prompt_tokens: int
    completion_tokens: int
    admitted: float
    """By `time.monotonic()`."""
    seconds: float
    """To its end."""
    queue_seconds: float | None
    """To the first step that computed some of the prompt; None: it never ran."""
    first_token_seconds: float | None
    """None: it has none."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer to one generation request."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    """Generated tokens, the end-of-sequence token included."""
    tokens: tuple[Token, ...] = ()
    """All of them, if asked for."""
