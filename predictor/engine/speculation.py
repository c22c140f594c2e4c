"""How many tokens of each sequence are guessed, by what that is expected to save.

A step takes a fixed time, which reads the weights, and a time for each row. A guess adds a row, and saves a step of its
sequence if it is accepted. So with more sequences in the batch, which share the fixed time, a guess has to be more
certain. The answers do not depend on any of this: see `speculative_step`.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from predictor.engine.prompt_lookup import PromptLookup

MAX_GUESSES = 7
"""Largest number of guesses for one sequence in a step."""
ROW_COST = 0.05
"""Time of a further row of a step, as a fraction of the fixed time; measured in 8 bits, see ADR 32."""

_EXPECTED = (2.0, 2.0)
"""Accepted and rejected guesses that count before the first ones of a sequence."""
_MEMORY = 0.9
"""Weight of earlier guesses after each later one."""
_RECOVERY = 0.002
"""Weight of the expectation each time that a guess would not pay, so that a sequence is tried again at times."""


class SequenceState(Protocol):
    """The batching manager's state of a sequence that decodes."""

    request_id: str
    initial_tokens: list[int]
    """The prompt, and after it the tokens that the sequence had generated when it left a full cache."""
    generated_tokens: list[int]
    max_new_tokens: int | None


@dataclass
class _History:
    """What is known of a sequence."""

    lookup: PromptLookup = field(default_factory=PromptLookup)
    accepted: float = _EXPECTED[0]
    rejected: float = _EXPECTED[1]

    @property
    def acceptance(self) -> float:
        """Probability that a guess is right, if those before it are."""
        return self.accepted / (self.accepted + self.rejected)

    def record(self, accepted: int, rejected: int) -> None:
        self.accepted = self.accepted * _MEMORY + accepted
        self.rejected = self.rejected * _MEMORY + rejected

    def recover(self) -> None:
        self.accepted += (_EXPECTED[0] - self.accepted) * _RECOVERY
        self.rejected += (_EXPECTED[1] - self.rejected) * _RECOVERY


def num_worthwhile(acceptance: float, num_sequences: int) -> int:
    """Return how many guesses for one sequence of a step save more time than their rows take.

    Args:
        acceptance: probability that a guess is right, if those before it are.
        num_sequences: of the step, at least one.
    """
    # A token of the step costs (fixed time + rows) / sequences, and a guess is a token with its probability.
    least = ROW_COST * num_sequences / (1 + ROW_COST * num_sequences)
    return next((count for count in range(MAX_GUESSES, 0, -1) if acceptance**count > least), 0)


class Speculation:
    """Guesses for the sequences of each step, and counts of what became of them.

    Args:
        max_rows: largest number of rows of a step that has guesses.
    """

    def __init__(self, max_rows: int) -> None:
        self.num_drafts = 0
        """Sequences of steps that had guesses."""
        self.num_draft_tokens = 0
        """Guesses that were verified."""
        self.num_accepted_tokens = 0
        self.guesses: dict[str, list[int]] = {}
        """By request id, those of the step."""
        self.accepted: dict[str, int] = {}
        """By request id, how many guesses of the step were right; none before it has ended."""
        self._max_rows = max_rows
        self._histories: dict[str, _History] = {}

    def guess(self, states: Sequence[SequenceState]) -> None:
        """Make the guesses of the next step, whose sequences all decode."""
        self.guesses = {}
        for state in states:
            history = self._histories.setdefault(state.request_id, _History())
            history.lookup.read(state.initial_tokens, state.generated_tokens)
            if guesses := self._guess(history, state, len(states)):
                self.guesses[state.request_id] = guesses
        self._limit(self._max_rows - len(states))

    def _guess(self, history: _History, state: SequenceState, num_sequences: int) -> list[int]:
        count = num_worthwhile(history.acceptance, num_sequences)
        if not count:
            history.recover()
        if state.max_new_tokens is not None:
            # One token comes after the guesses.
            count = min(count, state.max_new_tokens - len(state.generated_tokens) - 1)
        return history.lookup.guess(count)

    def _limit(self, count: int) -> None:
        """Keep `count` guesses, those most likely to be accepted."""
        ranked = sorted(
            (-(self._histories[request_id].acceptance ** place), place, request_id)
            for request_id, guesses in self.guesses.items()
            for place in range(1, len(guesses) + 1)
        )
        for _, _, request_id in reversed(ranked[max(0, count) :]):
            self.guesses[request_id].pop()
        self.guesses = {request_id: guesses for request_id, guesses in self.guesses.items() if guesses}

    def record(self, request_id: str, num_accepted: int) -> None:
        """Count the accepted ones of a sequence's guesses."""
        num_guesses = len(self.guesses[request_id])
        self.num_drafts += 1
        self.num_draft_tokens += num_guesses
        self.num_accepted_tokens += num_accepted
        self.accepted[request_id] = num_accepted
        if history := self._histories.get(request_id):
            history.record(num_accepted, int(num_accepted < num_guesses))

    def retain(self, *request_ids: Container[str]) -> None:
        """Forget all sequences except these."""
        for request_id in [known for known in self._histories if not any(known in ids for ids in request_ids)]:
            del self._histories[request_id]
