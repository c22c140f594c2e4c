"""Signs of life: the self-check, the watchdog on the step loop, and whom a loop that is dead or hangs drags along."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from devtools.processes import ROOT
from predictor.engine.engine import Engine
from predictor.errors import EngineStopped
from predictor.generation import self_check
from predictor.generation.self_check import SelfCheck
from predictor.models import loader
from predictor.types import SamplingParams
from tests.predictor.servers import Hold

DEMO_MODEL = ROOT / "demo" / "model"
LONG = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
PROMPT = [1, 5, 6]
WAIT_SECONDS = 30


@contextmanager
def running(step_timeout_seconds: float = 120.0) -> Iterator[tuple[Engine, Hold]]:
    loaded = loader.load(DEMO_MODEL, device="cpu", dtype="float32", trust_remote_code=False)
    hold = Hold()
    loaded.model.register_forward_pre_hook(hold)
    engine = Engine.from_model(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=loaded.context_tokens,
        max_num_seqs=4,
        max_queued_requests=4,
        max_num_batched_tokens=64,
        kv_cache_tokens=2048,
        step_timeout_seconds=step_timeout_seconds,
    )
    engine.start()
    try:
        yield engine, hold
    finally:
        hold.open()
        engine.stop()


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Engine, Hold]]:
    with running() as both:
        yield both


@pytest.fixture
def engine(shared: tuple[Engine, Hold]) -> Engine:
    return shared[0]


@pytest.fixture
def hold(shared: tuple[Engine, Hold]) -> Iterator[Hold]:
    yield shared[1]
    shared[1].open()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass for the self-check alone."""
    ahead = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + ahead

    def wait(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    monkeypatch.setattr(self_check, "time", Clock)
    return wait


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0.01)


# The self-check


def test_a_self_check_is_fresh_for_three_periods(engine: Engine, clock: Callable[[float], None]) -> None:
    check = SelfCheck(engine, period_seconds=60)
    assert check.is_fresh
    clock(170)
    assert check.is_fresh
    assert 170 <= check.age_seconds < 180
    clock(11)
    assert not check.is_fresh


def test_an_idle_engine_is_made_to_generate(engine: Engine, clock: Callable[[float], None]) -> None:
    check = SelfCheck(engine, period_seconds=60)
    clock(200)
    before = engine.steps
    asyncio.run(check.check_once())
    assert engine.steps > before
    assert check.is_fresh
    assert check.age_seconds < 60


def test_steps_made_for_others_are_proof_enough(engine: Engine, clock: Callable[[float], None]) -> None:
    check = SelfCheck(engine, period_seconds=60)
    asyncio.run(engine.check(WAIT_SECONDS))
    clock(200)
    before = engine.steps
    asyncio.run(check.check_once())
    assert engine.steps == before, "nothing is generated where there is proof"
    assert check.is_fresh


def test_a_self_check_that_fails_is_logged_and_grows_old(
    engine: Engine, hold: Hold, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def look() -> None:
        hold.close()
        check = SelfCheck(engine, period_seconds=0.2)
        clock(1)
        await check.check_once()
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "the self-check failed: Request timed out" in caplog.text
        assert not check.is_fresh
        await check.check_once()
        assert len(caplog.records) == 1, "while the one before hangs, no other is begun"
        assert not check.is_fresh
        hold.open()
        await until(lambda: not engine.running)
        await check.check_once()
        assert check.is_fresh

    asyncio.run(look())


def test_a_self_check_that_fails_in_an_unforeseen_way_is_logged_and_made_again(
    engine: Engine, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = SelfCheck(engine, period_seconds=60)
    clock(200)
    with monkeypatch.context() as broken:
        broken.setattr(engine, "check", None)
        asyncio.run(check.check_once())
    assert "the self-check failed for a reason that was not foreseen" in caplog.text
    assert not check.is_fresh
    asyncio.run(check.check_once())
    assert check.is_fresh


def test_a_self_check_runs_until_cancelled_and_a_period_of_zero_turns_it_off(
    engine: Engine, clock: Callable[[float], None]
) -> None:
    async def both() -> None:
        off = SelfCheck(engine, period_seconds=0)
        await off.run()
        clock(10**6)
        assert off.is_fresh
        before = engine.steps
        going_on = asyncio.create_task(SelfCheck(engine, period_seconds=0.05).run())
        await until(lambda: engine.steps >= before + 8)
        going_on.cancel()
        await until(lambda: not engine.running and not engine.waiting)

    asyncio.run(both())


# The watchdog


def test_a_step_that_hangs_is_noticed_and_so_is_its_end() -> None:
    async def hang(engine: Engine, hold: Hold) -> None:
        [stream] = engine.submit([(PROMPT, LONG)])
        await anext(stream)
        hold.close()
        await until(hold.blocked.is_set)
        assert engine.is_alive, "not at once"
        await until(lambda: not engine.is_alive)
        with pytest.raises(EngineStopped):
            async for _ in stream:
                pass
        assert not engine.is_alive, "also when nobody waits any more"
        [other] = engine.submit([(PROMPT, LONG)])
        assert not engine.is_alive, "also when somebody comes"
        other.close()
        await asyncio.sleep(0.4)
        assert not engine.is_alive
        hold.open()
        await until(lambda: engine.is_alive and not engine.running)
        await engine.check(WAIT_SECONDS)

    with running(step_timeout_seconds=0.3) as (engine, hold):
        asyncio.run(hang(engine, hold))
        assert engine.is_alive


def test_a_step_that_hangs_is_noticed_where_every_client_has_left() -> None:
    async def hang(engine: Engine, hold: Hold) -> None:
        [stream] = engine.submit([(PROMPT, LONG)])
        await anext(stream)
        hold.close()
        await until(hold.blocked.is_set)
        stream.close()
        await until(lambda: not engine.is_alive)
        hold.open()
        await until(lambda: engine.is_alive and not engine.running)

    with running(step_timeout_seconds=0.3) as both:
        asyncio.run(hang(*both))


def test_idleness_is_not_mistaken_for_a_step_that_hangs() -> None:
    async def first(engine: Engine) -> None:
        [stream] = engine.submit([(PROMPT, LONG)])
        assert engine.is_alive, "the time before it does not count"
        await anext(stream)
        stream.close()
        await until(lambda: not engine.running)

    with running(step_timeout_seconds=0.2) as (engine, _):
        for _ in range(2):
            time.sleep(0.5)
            assert engine.is_alive
            asyncio.run(first(engine))


@pytest.mark.parametrize("look", [True, False])
def test_a_dead_step_loop_fails_all_who_wait(look: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def die(engine: Engine, hold: Hold) -> None:
        streams = engine.submit([(PROMPT, LONG)] * engine.capacity)
        await anext(streams[0])
        hold.error = RuntimeError("the device is gone")
        if not look:  # what the loop says at its end gets lost, as for a request that it had not taken yet
            engine._executor._manager.output_router.deliver = lambda _: None
        ends = await asyncio.gather(*(read_all(stream) for stream in streams), return_exceptions=True)
        assert {type(end) for end in ends} == {EngineStopped}
        assert not engine.is_alive
        assert (engine.running, engine.waiting) == (0, 0)
        with pytest.raises(EngineStopped):
            engine.submit([(PROMPT, LONG)])
        assert (engine.running, engine.waiting) == (0, 0)

    async def read_all(stream: Any) -> None:
        async for _ in stream:
            pass

    with running() as (engine, hold):
        asyncio.run(asyncio.wait_for(die(engine, hold), WAIT_SECONDS))
        engine.stop()
        assert engine.has_ended
    assert "the device is gone" in caplog.text
