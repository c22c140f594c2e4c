"""When a busy Hub is asked again: exponential back-off with jitter, or when it says so. Knows nothing of the Hub."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from storage_initializer.errors import HubBusy

if TYPE_CHECKING:
    from tenacity import RetryCallState

_LONGEST_WAIT_SECONDS = 60.0
"""What doubling ends at."""
_LONGEST_RETRY_AFTER_SECONDS = 300.0
"""The Hub's rate limits count over windows of five minutes. Who asks for more is left to the Job's own back-off."""

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How often to ask, and how long to wait for the first time in between."""

    attempts: int
    first_wait_seconds: float

    def call(self, ask: Callable[[], _Result], stopped: threading.Event | None = None) -> _Result:
        """What `ask` returns, called again while it raises `HubBusy` and patience lasts; `stopped` ends a wait.

        Raises:
            HubBusy: the last one.
        """
        # Imported when it is needed, since it takes longer than finding a published snapshot.
        import tenacity

        backing_off = tenacity.wait_exponential_jitter(
            multiplier=self.first_wait_seconds, max=_LONGEST_WAIT_SECONDS, jitter=self.first_wait_seconds
        )

        def wait(state: "RetryCallState") -> float:
            asked_for = _asked_for(state)
            return backing_off(state) if asked_for is None else asked_for

        def stop(state: "RetryCallState") -> bool:
            return state.attempt_number >= self.attempts or (_asked_for(state) or 0.0) > _LONGEST_RETRY_AFTER_SECONDS

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(HubBusy),
            stop=stop,
            wait=wait,
            sleep=tenacity.sleep_using_event(stopped or threading.Event()),
            before_sleep=lambda state: log.warning(
                "attempt %d of %d: %s; asking again in %.1f s",
                state.attempt_number,
                self.attempts,
                state.outcome.exception() if state.outcome else "",
                state.upcoming_sleep,
            ),
            reraise=True,
        )(ask)


def _asked_for(state: "RetryCallState") -> float | None:
    """The seconds that the Hub has asked to be left alone for, if it has."""
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after_seconds if isinstance(error, HubBusy) else None
