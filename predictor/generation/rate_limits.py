"""Requests and tokens per minute of each caller, as token buckets.

A bucket holds the limit of one minute and is refilled steadily. Tokens are taken when they are computed: a request is
accepted while there is any left, and one that takes more leaves a debt that the next one waits for.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from predictor.errors import RateLimited
from predictor.types import Caller

_SECONDS = 60


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float

    def refill(self, limit: int, now: float) -> None:
        self.level = min(float(limit), self.level + (now - self.at) * limit / _SECONDS)
        self.at = now


class RateLimits:
    """The buckets of all callers, by name, so that a changed limit keeps what was used.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def take_request(self, caller: Caller) -> None:
        """Count a request.

        Raises:
            RateLimited: the caller has no request or no token left; nothing is counted then.
        """
        for name in ("tokens_per_minute", "requests_per_minute"):
            self._require_one(caller, name)
        if (requests := self._bucket(caller, "requests_per_minute")) is not None:
            requests.level -= 1

    def take_tokens(self, caller: Caller, tokens: int) -> None:
        """Count tokens of a prompt or completion."""
        if (bucket := self._bucket(caller, "tokens_per_minute")) is not None:
            bucket.level -= tokens

    def _require_one(self, caller: Caller, name: str) -> None:
        """Raise RateLimited if a bucket has less than one unit."""
        bucket = self._bucket(caller, name)
        if bucket is None or bucket.level >= 1:
            return
        limit = getattr(caller, name)
        seconds = math.ceil((1 - bucket.level) * _SECONDS / limit)
        unit = name.removesuffix("_per_minute")
        message = f"API key {caller.name} has used its {limit} {unit} per minute. Retry in {seconds} s."
        raise RateLimited(message, name, seconds)

    def _bucket(self, caller: Caller, name: str) -> _Bucket | None:
        """Return a bucket with its level at this time; None without a limit."""
        limit: int | None = getattr(caller, name)
        if limit is None:
            return None
        now = self._clock()
        bucket = self._buckets.setdefault((caller.name, name), _Bucket(limit, now))
        bucket.refill(limit, now)
        return bucket
