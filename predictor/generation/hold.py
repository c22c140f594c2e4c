"""Requests that are held while the model loads: a bounded number, for a limited time."""

import asyncio
import threading
from collections import Counter

from predictor.engine import admission
from predictor.errors import Overloaded, RateLimited, RequestError
from predictor.types import Caller


class HoldFull(Exception):
    """As many sequences as allowed are held."""


class Hold:
    """Waiting room before the load ends; `wait` runs on any event loop, and `end` in any thread.

    Args:
        max_sequences: maximum number of held sequences; callers share the places as in `admission`.
    """

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self._waiting: dict[asyncio.Future[None], tuple[str | None, int]] = {}
        """Name of the caller and sequences of each held request."""
        self._error: RequestError | None = None
        self._has_ended = False
        self._lock = threading.Lock()

    @property
    def num_sequences(self) -> int:
        """Number of held sequences."""
        return sum(sequences for _, sequences in self._waiting.values())

    async def wait(self, sequences: int, seconds: float, caller: Caller | None = None) -> None:
        """Wait for the end of the load; a request whose client leaves is cancelled and frees its place.

        Args:
            sequences: of the request.
            seconds: maximum time to wait.
            caller: None without API keys.

        Raises:
            HoldFull: there is no place for the request.
            TimeoutError: the time is over.
            RequestError: the load has failed, or the request has more sequences than its caller may have.
        """
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            if not self._has_ended:
                self._require_place(sequences, caller)
                self._waiting[future] = (caller.name if caller else None, sequences)
        try:
            if future in self._waiting:
                async with asyncio.timeout(seconds):
                    await future
        finally:
            with self._lock:
                self._waiting.pop(future, None)
        if self._error:
            raise self._error

    def _require_place(self, sequences: int, caller: Caller | None) -> None:
        used: Counter[str | None] = Counter()
        for name, number in self._waiting.values():
            used[name] += number
        try:
            admission.check(sequences, used, self.max_sequences, caller)
        except RateLimited:
            raise
        except Overloaded:
            raise HoldFull from None

    def end(self, error: RequestError | None = None) -> None:
        """Let all requests go on, in the order of their arrival, or fail them; the first call counts."""
        with self._lock:
            if self._has_ended:
                return
            self._has_ended, self._error = True, error
            waiting = list(self._waiting)
        for future in waiting:
            future.get_loop().call_soon_threadsafe(_resolve, future)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
