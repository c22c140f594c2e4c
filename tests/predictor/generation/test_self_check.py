"""Signs of life: the self-check, the watchdog on the step loop, and whom a loop that is dead or hangs drags along."""

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from devtools import processes
from devtools.processes import ROOT
from predictor.engine.engine import Engine
from predictor.errors import EngineStopped
from predictor.generation import self_check
from predictor.generation.self_check import SelfCheck
from predictor.models import loader
from predictor.types import SamplingParams

DEMO_MODEL = ROOT / "demo" / "model"
LONG = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
PROMPT = [1, 5, 6]
WAIT_SECONDS = 30


class Hold:
    """A hook before every forward of the model: lets it pass, holds it, or makes it fail."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.held = threading.Event()
        self.error: Exception | None = None

    def __call__(self, *_: Any) -> None:
        if not self.open.is_set():
            self.held.set()
            self.open.wait(WAIT_SECONDS)
        if self.error:
            raise self.error


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
        hold.open.set()
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
    shared[1].open.set()
    shared[1].error = None


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
        hold.open.clear()
        check = SelfCheck(engine, period_seconds=0.2)
        clock(1)
        await check.check_once()
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "the self-check failed: Request timed out" in caplog.text
        assert not check.is_fresh
        await check.check_once()
        assert len(caplog.records) == 1, "while the one before hangs, no other is begun"
        assert not check.is_fresh
        hold.open.set()
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
        hold.open.clear()
        await until(hold.held.is_set)
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
        hold.open.set()
        await until(lambda: engine.is_alive and not engine.running)
        await engine.check(WAIT_SECONDS)

    with running(step_timeout_seconds=0.3) as (engine, hold):
        asyncio.run(hang(engine, hold))
        assert engine.is_alive


def test_a_step_that_hangs_is_noticed_where_every_client_has_left() -> None:
    async def hang(engine: Engine, hold: Hold) -> None:
        [stream] = engine.submit([(PROMPT, LONG)])
        await anext(stream)
        hold.open.clear()
        await until(hold.held.is_set)
        stream.close()
        await until(lambda: not engine.is_alive)
        hold.open.set()
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


# The process

SABOTAGED = """
import pathlib, sys, time
from predictor.engine import engine
from predictor.models import loader
from predictor.__main__ import main

order, load, engine.STOP_TIMEOUT_SECONDS = pathlib.Path(sys.argv.pop()), loader.load, 1.0

def sabotage(*_):
    while order.exists():
        if order.read_text() == "fail":
            raise RuntimeError("the device is gone")
        time.sleep(0.01)

def load_and_sabotage(*args, **options):
    loaded = load(*args, **options)
    loaded.model.register_forward_pre_hook(sabotage)
    return loaded

loader.load = load_and_sabotage
sys.exit(main())
"""


@dataclass
class Sabotaged:
    """A predictor whose model hangs or fails on order."""

    process: "subprocess.Popen[str]"
    client: httpx.Client
    _order: Path

    def order(self, order: str) -> None:
        self._order.write_text(order)

    def forgive(self) -> None:
        self._order.unlink()

    def becomes(self, path: str, status: int) -> httpx.Response:
        """The first answer with this status."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            try:
                response = self.client.get(path)
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            if response.status_code == status:
                return response
            time.sleep(0.05)
        raise AssertionError(f"{path} never answered {status}")


@pytest.fixture
def sabotaged(tmp_path: Path) -> Iterator[Sabotaged]:
    port = processes.free_port()
    flags = ["--served_model_name", "demo", "--model_dir", str(DEMO_MODEL), "--http_port", str(port)]
    flags += ["--step_timeout_seconds", "0.5", "--log_level", "WARNING"]
    order = tmp_path / "order"
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", SABOTAGED, *flags, str(order)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, text=True)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                sabotaged = Sabotaged(process, client, order)
                sabotaged.becomes("/v2/health/ready", 200)
                yield sabotaged
        finally:
            order.unlink(missing_ok=True)
            processes.stop(process)
            print((tmp_path / "log").read_text())  # noqa: T201, shown by pytest where a test failed


COMPLETION = {"model": "demo", "prompt": "1+1=", "max_tokens": 400, "ignore_eos": True}


def test_a_dead_step_loop_turns_liveness_off_and_answers_503(sabotaged: Sabotaged) -> None:
    sabotaged.order("fail")
    for _ in range(2):
        answer = sabotaged.client.post("/v1/completions", json=COMPLETION)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert "Retry-After" in answer.headers
    live = sabotaged.client.get("/v2/health/live")
    assert (live.status_code, "restarted" in live.json()["error"]) == (503, True)
    ready = sabotaged.client.get("/v2/models/demo/ready")
    assert (ready.status_code, "makes no progress" in ready.json()["error"]) == (503, True)
    assert processes.stop(sabotaged.process) == 0


def test_a_step_that_hangs_turns_liveness_off_until_it_ends(sabotaged: Sabotaged) -> None:
    with ThreadPoolExecutor(1) as threads:
        sabotaged.order("hang")
        waiting = threads.submit(sabotaged.client.post, "/v1/completions", json=COMPLETION)
        sabotaged.becomes("/v2/health/live", 503)
        assert waiting.result().status_code == 503
    assert sabotaged.client.get("/v2/health/live").status_code == 503, "also when nobody waits any more"
    sabotaged.forgive()
    sabotaged.becomes("/v2/health/live", 200)
    assert sabotaged.client.post("/v1/completions", json=COMPLETION).status_code == 200
    # Nor does it keep the process from ending.
    sabotaged.order("hang")
    assert sabotaged.client.post("/v1/completions", json=COMPLETION).status_code == 503
    sabotaged.process.terminate()
    assert sabotaged.process.wait(WAIT_SECONDS) == 0
