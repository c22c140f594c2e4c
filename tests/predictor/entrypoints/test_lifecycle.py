"""The states of the process, with a service that loads and finishes on command: no model, no process, no clock."""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from predictor.entrypoints import lifecycle
from predictor.entrypoints.lifecycle import Lifecycle, State
from predictor.errors import RankFailed, RankLost, StartupError

HANG_SECONDS = 60


class Service:
    """Records the calls of the lifecycle; `load` returns when `loaded` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.loaded = threading.Event()
        self.loaded.set()
        self.error = error
        self.busy = False
        self.is_live = True
        self.has_ended = True

    def load(self) -> bool:
        self.calls.append("load")
        self.loaded.wait(HANG_SECONDS)
        if self.error:
            raise self.error
        return True

    def terminate(self) -> None:
        self.calls.append("terminate")

    def drain(self) -> None:
        self.calls.append("drain")

    def stop(self) -> None:
        self.calls.append("stop")

    async def run_self_checks(self) -> None:
        self.calls.append("run_self_checks")
        await asyncio.Event().wait()


Script = Callable[[Lifecycle, Service], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def short_poll(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(lifecycle, "DRAIN_POLL_SECONDS", 0.001)
    caplog.set_level(logging.INFO)


def run(
    script: Script, service: Service | None = None, grace_seconds: float = HANG_SECONDS, delay_seconds: float = 0
) -> list[str]:
    """The service's calls while `script` runs next to the lifecycle, and the closing of idle connections."""
    service = service or Service()

    async def both() -> None:
        running = Lifecycle(service, grace_seconds, delay_seconds)
        running.on_drain.append(lambda: service.calls.append("close_idle"))
        async with asyncio.timeout(HANG_SECONDS):
            await asyncio.gather(running.run(), script(running, service))
        assert running.state is State.STOPPED

    asyncio.run(both())
    return service.calls


async def reach(running: Lifecycle, state: State) -> None:
    while running.state is not state:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def terminate(running: Lifecycle, _: Service) -> None:
    await reach(running, State.SERVING)
    running.handle_signal(signal.SIGTERM)


def test_lifecycle_signalled_while_idle_drains_and_stops(caplog: pytest.LogCaptureFixture) -> None:
    assert run(terminate) == ["load", "run_self_checks", "drain", "close_idle", "stop"]
    assert caplog.messages == [
        "received SIGTERM, shutting down",
        "draining: finishing running requests, rejecting new ones",
    ]


def test_lifecycle_signalled_with_a_delay_drains_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    calls = run(terminate, delay_seconds=0.01)
    assert calls == ["load", "run_self_checks", "terminate", "drain", "close_idle", "stop"]
    assert caplog.messages[1] == "terminating: not ready, serving new requests for 0.01 s"


def test_lifecycle_signalled_again_during_the_delay_drains_at_once() -> None:
    async def repeat(running: Lifecycle, service: Service) -> None:
        service.busy = True
        await terminate(running, service)
        await reach(running, State.TERMINATING)
        await asyncio.sleep(0.01)
        assert service.calls[-1] == "terminate"
        running.handle_signal(signal.SIGTERM)
        await reach(running, State.DRAINING)
        await asyncio.sleep(0.01)
        assert service.calls[-1] == "close_idle", "running requests go on"
        running.handle_signal(signal.SIGTERM)

    assert run(repeat, delay_seconds=HANG_SECONDS)[-1] == "stop"


def test_lifecycle_signalled_while_busy_waits_for_running_requests() -> None:
    async def finish(running: Lifecycle, service: Service) -> None:
        service.busy = True
        await terminate(running, service)
        await reach(running, State.DRAINING)
        await asyncio.sleep(0.01)
        assert "stop" not in service.calls
        service.busy = False

    assert run(finish)[-3:] == ["drain", "close_idle", "stop"]


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM, signal.SIGINT]], ids=len)
def test_lifecycle_signalled_again_aborts_running_requests(
    signals: list[signal.Signals], caplog: pytest.LogCaptureFixture
) -> None:
    async def repeat(running: Lifecycle, service: Service) -> None:
        service.busy = True
        await terminate(running, service)
        for number in signals:
            running.handle_signal(number)

    assert run(repeat)[-1] == "stop"
    assert f"received {signals[0].name} again, aborting running requests" in caplog.messages


def test_lifecycle_past_the_grace_period_aborts_running_requests(caplog: pytest.LogCaptureFixture) -> None:
    service = Service()
    service.busy = True
    assert run(terminate, service, grace_seconds=0.01)[-1] == "stop"
    assert caplog.messages[-1] == "shutdown grace period expired, aborting running requests"


def test_lifecycle_with_a_dead_step_loop_does_not_wait() -> None:
    service = Service()
    service.busy, service.is_live = True, False
    assert run(terminate, service)[-1] == "stop"


def test_lifecycle_signalled_during_the_load_does_not_wait_for_it() -> None:
    service = Service()
    service.loaded.clear()

    async def interrupt(running: Lifecycle, _: Service) -> None:
        await asyncio.sleep(0)
        running.handle_signal(signal.SIGTERM)
        await reach(running, State.STOPPED)
        assert running.has_blocking_threads
        service.loaded.set()

    assert run(interrupt, service, delay_seconds=HANG_SECONDS) == ["load", "drain", "close_idle", "stop"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StartupError("No weights."), "No weights."),
        (RuntimeError("out of memory"), "Loading the model failed: out of memory"),
    ],
    ids=["expected", "unexpected"],
)
def test_lifecycle_with_a_failing_load_stops_and_raises(error: Exception, message: str) -> None:
    service = Service(error)

    async def wait(*_: Any) -> None:
        pass

    with pytest.raises(StartupError, match=message):
        run(wait, service)
    assert service.calls == ["load", "stop"]


def test_lifecycle_signalled_before_the_load_fails_ends_without_error() -> None:
    service = Service(StartupError("No weights."))
    service.loaded.clear()

    async def interrupt(running: Lifecycle, _: Service) -> None:
        running.handle_signal(signal.SIGTERM)
        await reach(running, State.STOPPED)
        service.loaded.set()

    assert run(interrupt, service, delay_seconds=HANG_SECONDS) == ["load", "drain", "close_idle", "stop"]


def test_lifecycle_with_a_step_that_hangs_has_blocking_threads() -> None:
    service = Service()
    service.has_ended = False
    assert Lifecycle(service, HANG_SECONDS).has_blocking_threads


class Group:
    """Ranks that fail when `reasons` has a reason."""

    def __init__(self) -> None:
        self.reasons: asyncio.Queue[str] = asyncio.Queue()
        self.found = "Rank 1 was killed."

    async def failure(self, is_live: Callable[[], bool]) -> RankFailed:
        del is_live
        return RankFailed(await self.reasons.get())

    async def reason(self, symptom: str) -> RankFailed:
        return RankFailed(self.found or symptom)


def run_ranks(script: Callable[[Lifecycle, Service, Group], Coroutine[Any, Any, None]], service: Service) -> list[str]:
    async def both() -> None:
        group = Group()
        running = Lifecycle(service, HANG_SECONDS, ranks=cast(Any, group))
        async with asyncio.timeout(HANG_SECONDS):
            task = asyncio.ensure_future(running.run())
            await script(running, service, group)
            await task

    asyncio.run(both())
    return service.calls


def test_lifecycle_of_ranks_ends_as_of_one() -> None:
    async def script(running: Lifecycle, service: Service, _: Group) -> None:
        await terminate(running, service)

    assert run_ranks(script, Service()) == ["load", "run_self_checks", "drain", "stop"]


def test_lifecycle_of_ranks_fails_once_all_streams_have_ended() -> None:
    async def script(running: Lifecycle, service: Service, group: Group) -> None:
        service.busy = True
        await reach(running, State.SERVING)
        group.reasons.put_nowait("Rank 1 exited with code 3.")
        while "drain" not in service.calls:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        service.busy = False

    service = Service()
    with pytest.raises(RankFailed, match=r"^Rank 1 exited with code 3\.$"):
        run_ranks(script, service)
    assert service.calls == ["load", "run_self_checks", "drain"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(RankLost("A rank ended."), "Rank 1 was killed."), (StartupError("No weights."), "No weights.")],
)
def test_lifecycle_of_ranks_names_the_one_that_ended_during_the_load(error: StartupError, expected: str) -> None:
    async def script(running: Lifecycle, service: Service, group: Group) -> None:
        pass

    with pytest.raises(StartupError, match=f"^{expected}$"):
        run_ranks(script, Service(error))
