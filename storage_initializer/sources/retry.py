"""Retries of transient Hub errors: exponential back-off with jitter, or the Hub's `Retry-After`."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from storage_initializer.errors import TransientHubError

if TYPE_CHECKING:
    from tenacity import RetryCallState

_MAX_WAIT_SECONDS = 60.0
"""Upper bound of the exponential back-off."""
_MAX_RETRY_AFTER_SECONDS = 300.0
"""The Hub's rate limits have windows of five minutes. Longer waits are left to the Job's own back-off."""

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Number of attempts, and the first wait between two of them."""

    attempts: int
    first_wait_seconds: float

    def call(self, request: Callable[[], _Result], stopped: threading.Event | None = None) -> _Result:
        """Return the result of `request`, repeated while it raises `TransientHubError`; `stopped` ends a wait.

        Raises:
            TransientHubError: the error of the last attempt.
        """
        # Imported here because it takes longer than checking a published snapshot.
        import tenacity

        backoff = tenacity.wait_exponential_jitter(
            multiplier=self.first_wait_seconds, max=_MAX_WAIT_SECONDS, jitter=self.first_wait_seconds
        )

        def wait(state: "RetryCallState") -> float:
            retry_after_seconds = _retry_after_seconds(state)
            return backoff(state) if retry_after_seconds is None else retry_after_seconds

        def stop(state: "RetryCallState") -> bool:
            return (
                state.attempt_number >= self.attempts or (_retry_after_seconds(state) or 0.0) > _MAX_RETRY_AFTER_SECONDS
            )

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientHubError),
            stop=stop,
            wait=wait,
            sleep=tenacity.sleep_using_event(stopped or threading.Event()),
            before_sleep=lambda state: log.warning(
                "attempt %d of %d failed, retrying in %.1f s: %s",
                state.attempt_number,
                self.attempts,
                state.upcoming_sleep,
                state.outcome.exception() if state.outcome else "",
            ),
            reraise=True,
        )(request)


def _retry_after_seconds(state: "RetryCallState") -> float | None:
    """Return the wait that the Hub requested in the last attempt, if any."""
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after_seconds if isinstance(error, TransientHubError) else None
