"""Liveness of a real engine whose model blocks or fails; the engine's clock is advanced, never waited for."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from devtools.paths import DEMO_MODEL
from predictor.engine import causal_lm
from predictor.engine import engine as engine_module
from predictor.engine.engine import Engine
from predictor.engine.stream import Stream
from predictor.errors import DeadlineExceeded, EngineStopped
from predictor.generation.self_check import SelfCheck
from predictor.models import loader
from predictor.settings import Settings
from predictor.types import SamplingParams
from tests.predictor.servers import HANG_SECONDS, Hold

LONG = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
PROMPT = [1, 5, 6]
STEP_TIMEOUT_SECONDS = 1000.0


@contextmanager
def running() -> Iterator[tuple[Engine, Hold]]:
    loaded = loader.load(DEMO_MODEL, device="cpu", dtype="float32", trust_remote_code=False)
    hold = Hold()
    loaded.model.register_forward_pre_hook(hold)
    engine = Engine.from_model(
        loaded.model,
        Settings(
            max_num_seqs=4,
            max_queued_requests=4,
            max_num_batched_tokens=64,
            kv_cache_tokens=2048,
            step_timeout_seconds=STEP_TIMEOUT_SECONDS,
        ),
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=loaded.context_tokens,
    )
    engine.start()
    try:
        yield engine, hold
    finally:
        hold.open()
        engine.stop()


def is_alive(engine: Engine) -> bool:
    """Read the property anew, which mypy takes for a constant."""
    return engine.is_alive


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Engine, Hold]]:
    with running() as pair:
        yield pair


@pytest.fixture
def engine(shared: tuple[Engine, Hold]) -> Engine:
    return shared[0]


@pytest.fixture
def hold(shared: tuple[Engine, Hold]) -> Iterator[Hold]:
    yield shared[1]
    shared[1].open()


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advance the engine's clock."""
    offset = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + offset

    def advance(seconds: float) -> None:
        nonlocal offset
        offset += seconds

    monkeypatch.setattr(engine_module, "time", Clock)
    return advance


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not condition():  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0.01)


async def read_all(stream: Stream) -> None:
    async for _ in stream:
        pass


def test_engine_with_blocked_step_is_not_alive_until_it_ends(
    engine: Engine, hold: Hold, advance: Callable[[float], None]
) -> None:
    async def scenario() -> None:
        [stream] = engine.submit([(PROMPT, LONG)])
        await anext(stream)
        hold.close()
        await wait_for(hold.blocked.is_set)
        assert engine.is_alive
        advance(STEP_TIMEOUT_SECONDS - 1)
        assert engine.is_alive, "within the timeout"
        advance(2)
        assert not is_alive(engine)
        with pytest.raises(EngineStopped):
            await read_all(stream)
        assert not is_alive(engine), "after the last client has left"
        [other] = engine.submit([(PROMPT, LONG)])
        assert not is_alive(engine), "after a new request"
        other.close()
        hold.open()
        await wait_for(lambda: engine.is_alive and not engine.running)
        await engine.check(HANG_SECONDS)

    asyncio.run(scenario())
    assert engine.is_alive


def test_engine_with_blocked_step_and_no_clients_is_not_alive(
    engine: Engine, hold: Hold, advance: Callable[[float], None]
) -> None:
    async def scenario() -> None:
        [stream] = engine.submit([(PROMPT, LONG)])
        await anext(stream)
        hold.close()
        await wait_for(hold.blocked.is_set)
        stream.close()
        assert engine.is_alive
        advance(STEP_TIMEOUT_SECONDS + 1)
        assert not is_alive(engine)
        hold.open()
        await wait_for(lambda: engine.is_alive and not engine.running)

    asyncio.run(scenario())


def test_engine_idle_longer_than_step_timeout_is_alive(engine: Engine, advance: Callable[[float], None]) -> None:
    async def scenario() -> None:
        [stream] = engine.submit([(PROMPT, LONG)])
        assert engine.is_alive, "idle time before a request does not count"
        await anext(stream)
        stream.close()
        await wait_for(lambda: not engine.running)

    for _ in range(2):
        advance(STEP_TIMEOUT_SECONDS * 2)
        assert engine.is_alive
        asyncio.run(scenario())


def test_self_check_of_idle_engine_makes_steps_and_of_blocked_engine_fails(engine: Engine, hold: Hold) -> None:
    async def scenario() -> None:
        check = SelfCheck(engine, period_seconds=0.2)
        steps = engine.steps
        await check.check_once()
        assert engine.steps > steps
        await check.check_once()
        hold.close()
        with pytest.raises(DeadlineExceeded):
            await engine.check(0.2)
        hold.open()
        await wait_for(lambda: not engine.running)

    asyncio.run(scenario())


def test_engine_with_lost_device_fails_all_streams(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "is_device_lost", lambda _: True)

    async def scenario(engine: Engine, hold: Hold) -> None:
        streams = engine.submit([(PROMPT, LONG)] * engine.capacity)
        await anext(streams[0])
        hold.error = RuntimeError("the device is gone")
        async with asyncio.timeout(HANG_SECONDS):
            results = await asyncio.gather(*map(read_all, streams), return_exceptions=True)
        assert {type(result) for result in results} == {EngineStopped}
        assert not is_alive(engine)
        assert (engine.running, engine.waiting) == (0, 0)
        with pytest.raises(EngineStopped):
            engine.submit([(PROMPT, LONG)])
        assert (engine.running, engine.waiting) == (0, 0)

    with running() as (engine, hold):
        asyncio.run(scenario(engine, hold))
        engine.stop()
        assert engine.has_ended
    assert "the device is gone" in caplog.text
