"""What the scheduler has to know of a sequence; it travels to every rank with the sequence."""

from dataclasses import dataclass

from predictor.types import Caller


@dataclass(frozen=True, slots=True)
class Submission:
    """Caller, priority and use of one sequence."""

    caller: Caller | None
    """None without API keys."""
    priority: int
    """Lower ones start earlier among those of the caller."""
    scored_tokens: int | None
    """Length of its prompt, if log probabilities of the prompt are requested."""
