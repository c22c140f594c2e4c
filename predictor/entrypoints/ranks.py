"""The processes of a tensor-parallel model: this one is rank 0, the server; the others are its followers.

One container has N devices and N processes. Only rank 0 has ports and handles signals: a supervisor that signals all
processes at once, as `torchrun` does, would end ranks that rank 0 still needs to finish running requests.
"""

import asyncio
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from predictor.errors import RankFailed
from predictor.kernels import tensor_parallel
from predictor.kernels.tensor_parallel import Rank
from predictor.settings import Settings

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
EXIT_SECONDS = 2.0
"""Time for followers to end by themselves, as they do when rank 0 has stopped its step loop."""
LAST_SECONDS = 1.0
"""Time in which the process that broke a connection becomes one that has ended."""


class Ranks:
    """Followers of this process, by rank.

    Args:
        rank: of this process.
        followers: of the ranks from 1 on.
    """

    def __init__(self, rank: Rank, followers: "list[subprocess.Popen[str]]") -> None:
        self.rank = rank
        self._followers = followers

    async def failure(self, is_live: Callable[[], bool]) -> RankFailed:
        """Wait until a follower has failed, or `is_live()`, the liveness of rank 0, is false.

        Returns:
            The reason, which names the rank.
        """
        while not (reason := self._ended()):
            if not is_live():
                return await self.reason("Rank 0 is not live. Its log says why, unless a rank hangs.")
            await asyncio.sleep(POLL_SECONDS)
        return RankFailed(reason)

    async def reason(self, symptom: str) -> RankFailed:
        """Return why rank 0 has failed with a symptom: it may be because of a follower."""
        deadline = time.monotonic() + LAST_SECONDS
        while not (reason := self._ended()) and time.monotonic() < deadline:  # noqa: ASYNC110, there is no event
            await asyncio.sleep(POLL_SECONDS)
        return RankFailed(reason or self._stopped() or symptom)

    def _ended(self) -> str | None:
        codes = [(code, number) for number, process in enumerate(self._followers, start=1) if (code := process.poll())]
        if not codes:
            return None
        # One that is killed comes first: others exit because of it.
        code, number = min(codes)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        pid = self._followers[number - 1].pid
        return f"Rank {number} (process {pid}) {how}. Its log has more, unless memory ran out."

    def _stopped(self) -> str | None:
        for number, process in enumerate(self._followers, start=1):
            if process.returncode is None and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
                return f"Rank {number} (process {process.pid}) is stopped and makes no steps."
        return None

    def stop(self, timeout_seconds: float = EXIT_SECONDS) -> None:
        """Wait until the followers have ended, and kill those that have not in time."""
        deadline = time.monotonic() + timeout_seconds
        for number, process in enumerate(self._followers, start=1):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("killing rank %d", number)
                process.kill()
                process.wait()


@contextmanager
def started(settings: Settings) -> Iterator[Ranks | None]:
    """Start the followers that the settings ask for; None without any. They end with the context.

    Enter it in a thread that lives as long as the process: followers end with it.

    Raises:
        StartupError: the device has no such number of ranks.
    """
    size = tensor_parallel.resolve_size(settings.tensor_parallel_size, settings.device)
    if size == 1:
        yield None
        return
    # Bound here, so that no other process can take the port, and on loopback, so that no other machine can connect.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        # torch closes its descriptor.
        rank = Rank(0, size, address, listen_fd=os.dup(listening.fileno()))
        ranks = Ranks(rank, [_start(settings, Rank(number, size, address)) for number in range(1, size)])
    logger.info("%d ranks share the model", size)
    try:
        yield ranks
    except BaseException:
        ranks.stop(0)
        raise
    else:
        ranks.stop()


def _start(settings: Settings, rank: Rank) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-m", "predictor.entrypoints.follower"],
        stdin=subprocess.PIPE,
        text=True,
        # A terminal's Ctrl-C reaches the whole process group.
        start_new_session=True,
    )
    start = {"parent": os.getpid(), "rank": dataclasses.asdict(rank), "settings": settings.model_dump(mode="json")}
    assert process.stdin  # noqa: S101
    # One that has already ended is reported by `Ranks`, with its exit code.
    with suppress(BrokenPipeError), process.stdin:
        json.dump(start, process.stdin)
    return process
