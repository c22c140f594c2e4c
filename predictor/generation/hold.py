"""Requests that are held while the model loads: a bounded number, for a limited time."""

import asyncio
import threading

from predictor.errors import RequestError


class HoldFull(Exception):
    """As many sequences as allowed are held."""


class Hold:
    """Waiting room before the load ends; `wait` runs on any event loop, and `end` in any thread.

    Args:
        max_sequences: maximum number of held sequences.
    """

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self._waiting: dict[asyncio.Future[None], int] = {}
        """Sequences of each held request."""
        self._error: RequestError | None = None
        self._has_ended = False
        self._lock = threading.Lock()

    @property
    def num_sequences(self) -> int:
        """Number of held sequences."""
        return sum(self._waiting.values())

    async def wait(self, sequences: int, seconds: float) -> None:
        """Wait for the end of the load; a request whose client leaves is cancelled and frees its place.

        Args:
            sequences: of the request.
            seconds: maximum time to wait.

        Raises:
            HoldFull: there is no place for the request.
            TimeoutError: the time is over.
            RequestError: the load has failed.
        """
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            if not self._has_ended:
                if self.num_sequences + sequences > self.max_sequences:
                    raise HoldFull
                self._waiting[future] = sequences
        try:
            if future in self._waiting:
                async with asyncio.timeout(seconds):
                    await future
        finally:
            with self._lock:
                self._waiting.pop(future, None)
        if self._error:
            raise self._error

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
