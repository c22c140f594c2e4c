import asyncio
import logging
import time
from collections.abc import Callable
from typing import cast

import pytest

from predictor.engine.engine import Engine
from predictor.errors import DeadlineExceeded, GenerationFailed
from predictor.generation import self_check
from predictor.generation.self_check import SelfCheck


class FakeEngine:
    """An engine whose check makes one step, or raises `error`."""

    def __init__(self) -> None:
        self.steps = 0
        self.running = 0
        self.waiting = 0
        self.error: Exception | None = None
        self.checks: list[float] = []
        self.checked = asyncio.Event()

    async def check(self, timeout_seconds: float) -> None:
        self.checks.append(timeout_seconds)
        if len(self.checks) >= 3:
            self.checked.set()
        if self.error:
            raise self.error
        self.steps += 1


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advance the self-check's clock, which otherwise stands still."""
    now = time.monotonic()

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(self_check, "time", Clock)
    return advance


def create(engine: FakeEngine, period_seconds: float = 60) -> SelfCheck:
    return SelfCheck(cast(Engine, engine), period_seconds)


def test_is_fresh_for_three_periods(engine: FakeEngine, advance: Callable[[float], None]) -> None:
    check = create(engine)
    advance(179)
    assert check.is_fresh
    assert check.age_seconds == pytest.approx(179)
    advance(1)
    assert not check.is_fresh


def test_check_once_idle_engine_generates(engine: FakeEngine, advance: Callable[[float], None]) -> None:
    check = create(engine)
    advance(200)
    asyncio.run(check.check_once())
    assert engine.checks == [60]
    assert (check.is_fresh, check.age_seconds, check.succeeded) == (True, 0, True)


def test_check_once_after_steps_succeeds_without_generating(
    engine: FakeEngine, advance: Callable[[float], None]
) -> None:
    check = create(engine)
    engine.steps += 1
    advance(200)
    asyncio.run(check.check_once())
    assert (engine.checks, check.is_fresh) == ([], True)


@pytest.mark.parametrize("queue", ["running", "waiting"])
def test_check_once_busy_engine_without_steps_changes_nothing(
    engine: FakeEngine, advance: Callable[[float], None], queue: str
) -> None:
    check = create(engine)
    setattr(engine, queue, 1)
    advance(200)
    asyncio.run(check.check_once())
    assert (engine.checks, check.is_fresh) == ([], False)


@pytest.mark.parametrize(
    ("error", "message", "traceback"),
    [
        (DeadlineExceeded("Request timed out."), "self-check failed: Request timed out.", False),
        (RuntimeError("broken"), "self-check failed: unexpected error", True),
    ],
    ids=["request-error", "unexpected"],
)
def test_check_once_failure_is_logged_and_next_success_recovers(
    engine: FakeEngine,
    advance: Callable[[float], None],
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    message: str,
    traceback: bool,
) -> None:
    check = create(engine)
    advance(200)
    engine.error = error
    asyncio.run(check.check_once())
    [record] = caplog.records
    assert (record.levelno, record.getMessage(), bool(record.exc_info)) == (logging.ERROR, message, traceback)
    assert (check.is_fresh, check.succeeded) == (False, False)
    engine.error = None
    asyncio.run(check.check_once())
    assert (check.is_fresh, check.succeeded) == (True, True)


@pytest.mark.parametrize(("error", "broken"), [(GenerationFailed("failed"), True), (DeadlineExceeded("late"), False)])
def test_is_broken_after_three_failed_generations_until_a_success(
    engine: FakeEngine, error: Exception, broken: bool
) -> None:
    check = create(engine)
    engine.error = error
    results = []
    for _ in range(3):
        asyncio.run(check.check_once())
        results.append(check.is_broken)
    assert results == [False, False, broken]
    engine.error = None
    asyncio.run(check.check_once())
    assert not check.is_broken


def test_run_checks_until_cancelled(engine: FakeEngine) -> None:
    async def run_three() -> None:
        task = asyncio.create_task(create(engine, period_seconds=0.001).run())
        await asyncio.wait_for(engine.checked.wait(), 60)
        assert not task.done()
        task.cancel()

    asyncio.run(run_three())
    assert len(engine.checks) >= 3


def test_run_with_period_zero_returns_and_stays_fresh(engine: FakeEngine, advance: Callable[[float], None]) -> None:
    check = create(engine, period_seconds=0)
    asyncio.run(check.run())
    advance(10**6)
    assert check.is_fresh
    assert engine.checks == []
