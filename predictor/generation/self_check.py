"""Self-check of a loaded model: recent steps prove that it generates; while idle, a short generation does."""

import asyncio
import logging
import time
from typing import Protocol

from predictor.errors import GenerationFailed, RequestError

logger = logging.getLogger(__name__)

STALE_AFTER_PERIODS = 3
"""Number of periods without success after which the model is not ready."""
BROKEN_AFTER_FAILURES = 3
"""Number of failed generations in succession after which the model `is_broken`."""


class _Engine(Protocol):
    """What is checked."""

    @property
    def steps(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    async def check(self, timeout_seconds: float) -> None: ...


class SelfCheck:
    """Checks every `period_seconds` that the engine generates; 0 turns it off."""

    def __init__(self, engine: _Engine, period_seconds: float) -> None:
        self._engine = engine
        self._period_seconds = period_seconds
        self._last_steps = engine.steps
        self._last_success = time.monotonic()
        self.succeeded = True
        """Result of the last check; True before the first."""
        self._failed_generations = 0

    @property
    def age_seconds(self) -> float:
        """Seconds since the last success."""
        return time.monotonic() - self._last_success

    @property
    def is_fresh(self) -> bool:
        """Whether the last success is recent enough for readiness."""
        return not self._period_seconds or self.age_seconds < STALE_AFTER_PERIODS * self._period_seconds

    @property
    def is_broken(self) -> bool:
        """Whether the last BROKEN_AFTER_FAILURES generations failed: only a restart helps."""
        return self._failed_generations >= BROKEN_AFTER_FAILURES

    async def run(self) -> None:
        """Check periodically until cancelled."""
        while self._period_seconds:
            await asyncio.sleep(self._period_seconds)
            await self.check_once()

    async def check_once(self) -> None:
        """Succeed if the engine made steps since the last check; else, if it is idle, generate a few tokens."""
        engine = self._engine
        if engine.steps != self._last_steps:
            self._record_success()
        elif not engine.running and not engine.waiting:
            try:
                await engine.check(self._period_seconds)
            except RequestError as error:
                self.succeeded = False
                self._failed_generations += isinstance(error, GenerationFailed)
                logger.error("self-check failed: %s", error)
            except Exception:
                self.succeeded = False
                # Not raised: the loop must go on, so that the model becomes ready again once it recovers.
                logger.exception("self-check failed: unexpected error")
            else:
                self._record_success()
        self._last_steps = engine.steps

    def _record_success(self) -> None:
        self._last_success = time.monotonic()
        self.succeeded = True
        self._failed_generations = 0
