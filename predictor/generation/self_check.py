"""Whether the model still generates: seen at work, or checked by a tiny generation while idle, never per probe."""

import asyncio
import logging
import time

from predictor.engine.engine import Engine
from predictor.errors import RequestError

logger = logging.getLogger(__name__)

STALE_AFTER_PERIODS = 3
"""So many periods without a sign of life, and the model is not ready any more."""


class SelfCheck:
    """Sees that the engine generates, every `period_seconds`; off at 0."""

    def __init__(self, engine: Engine, period_seconds: float) -> None:
        self._engine = engine
        self._period_seconds = period_seconds
        self._seen_steps = engine.steps
        self._passed = time.monotonic()
        self.succeeded = True
        """Whether the last look, if there was one, saw the model generate."""

    @property
    def age_seconds(self) -> float:
        """Since the engine was last seen to generate."""
        return time.monotonic() - self._passed

    @property
    def is_fresh(self) -> bool:
        """Whether that was recent enough to believe in it."""
        return not self._period_seconds or self.age_seconds < STALE_AFTER_PERIODS * self._period_seconds

    async def run(self) -> None:
        """Go on until cancelled."""
        while self._period_seconds:
            await asyncio.sleep(self._period_seconds)
            await self.check_once()

    async def check_once(self) -> None:
        """Take steps made since the last look as proof; without any, and idle, generate."""
        engine = self._engine
        if engine.steps != self._seen_steps:
            self._pass()
        elif not engine.running and not engine.waiting:
            try:
                await engine.check(self._period_seconds)
            except RequestError as error:
                self.succeeded = False
                logger.error("the self-check failed: %s", error)
            except Exception:
                self.succeeded = False
                # The age tells; a loop that ended here would leave it growing where the model is well again.
                logger.exception("the self-check failed for a reason that was not foreseen")
            else:
                self._pass()
        self._seen_steps = engine.steps

    def _pass(self) -> None:
        self._passed = time.monotonic()
        self.succeeded = True
