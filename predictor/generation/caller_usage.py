"""Limits and metrics of the callers of one model, from the acceptance of a request to the end of its sequences."""

from predictor.errors import Overloaded
from predictor.generation.rate_limits import RateLimits
from predictor.observability.key_metrics import KeyMetrics
from predictor.types import Caller, FinishedSequence


class CallerUsage:
    """What callers with API keys use; a request without one changes nothing."""

    def __init__(self, model_name: str) -> None:
        self._limits = RateLimits()
        self._metrics = KeyMetrics(model_name)

    def take_request(self, caller: Caller | None) -> None:
        """Count a request.

        Raises:
            RateLimited: the caller has no request or no token left.
        """
        if caller is not None:
            self._limits.take_request(caller)

    def count_accepted(self, caller: Caller | None, sequences: int, prompt_tokens: int) -> None:
        """Count the sequences of a submitted request and the tokens of all their prompts."""
        if caller is not None:
            self._limits.take_tokens(caller, prompt_tokens)
            self._metrics.count_accepted(caller.name, sequences)

    def count_rejected(self, caller: Caller | None, error: Overloaded) -> None:
        """Count a request rejected with 429."""
        if caller is not None:
            self._metrics.count_rejected(caller.name, error.limit)

    def count_tokens(self, caller: Caller | None, tokens: int) -> None:
        """Count generated tokens."""
        if caller is not None:
            self._limits.take_tokens(caller, tokens)
            self._metrics.count_tokens(caller.name, tokens)

    def count_finished(self, caller: Caller | None, sequence: FinishedSequence) -> None:
        """Count a sequence that has ended."""
        if caller is not None:
            self._metrics.count_finished(caller.name, sequence)
