"""Why ranks end: from processes that sleep in the place of followers."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from predictor.entrypoints import ranks
from predictor.entrypoints.ranks import Ranks
from predictor.kernels.tensor_parallel import Rank
from predictor.settings import Settings


@pytest.fixture
def followers() -> "Iterator[list[subprocess.Popen[str]]]":
    program = "import sys; sys.exit(int(sys.stdin.readline()))"
    processes = [subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def group(followers: "list[subprocess.Popen[str]]", monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(ranks, "LAST_SECONDS", 0.2)
    return Ranks(Rank(0, 3, "127.0.0.1:1"), followers)


def finish(process: "subprocess.Popen[str]", code: int) -> None:
    process.communicate(f"{code}\n")


def failure(group: Ranks, *, is_live: bool) -> str:
    async def wait() -> str:
        async with asyncio.timeout(60):
            return str(await group.failure(lambda: is_live))

    return asyncio.run(wait())


def test_follower_that_exits_is_named(group: Ranks, followers: "list[subprocess.Popen[str]]") -> None:
    finish(followers[0], 0)
    finish(followers[1], 3)
    pid = followers[1].pid
    assert failure(group, is_live=True).startswith(f"Rank 2 (process {pid}) exited with code 3. Its log has more")


@pytest.mark.parametrize("is_live", [True, False])
def test_follower_that_is_killed_is_named_before_one_that_exits(
    group: Ranks, followers: "list[subprocess.Popen[str]]", is_live: bool
) -> None:
    finish(followers[0], 1)
    followers[1].kill()
    followers[1].wait()
    assert f"Rank 2 (process {followers[1].pid}) was killed by SIGKILL." in failure(group, is_live=is_live)


def test_follower_that_is_stopped_is_named(group: Ranks, followers: "list[subprocess.Popen[str]]") -> None:
    followers[1].send_signal(signal.SIGSTOP)
    expected = f"Rank 2 (process {followers[1].pid}) is stopped and makes no steps."
    while "stopped" not in (reason := failure(group, is_live=False)):
        pass
    assert reason == expected


def test_rank_0_is_named_if_no_follower_is_to_blame(group: Ranks, followers: "list[subprocess.Popen[str]]") -> None:
    # A follower that has ended as it should is none that failed.
    finish(followers[0], 0)
    assert failure(group, is_live=False) == "Rank 0 is not live. Its log says why, unless a rank hangs."


def test_follower_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    # More than a pipe holds, so that writing ends after the process.
    settings = Settings(device="cpu", tensor_parallel_size=2, quantization_skip_modules="x" * 200_000)
    with ranks.started(settings) as group:
        assert group
        reason = str(asyncio.run(group.reason("another")))
    assert reason.startswith("Rank 1 (process ")
    assert "exited with code 1." in reason


def test_followers_that_do_not_end_are_killed(
    group: Ranks, followers: "list[subprocess.Popen[str]]", caplog: pytest.LogCaptureFixture
) -> None:
    finish(followers[0], 0)
    group.stop(0.05)
    assert [process.returncode for process in followers] == [0, -signal.SIGKILL]
    assert caplog.messages == ["killing rank 2"]
