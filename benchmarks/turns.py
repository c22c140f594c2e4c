"""Servers that take turns: all but the measured one are suspended, so that their idle threads take no CPU time."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

from kserve_llm.bench import Server


class Turns:
    """Suspends servers, and lets one of them run at a time.

    A server without a process id is left as it is: it may be on another machine.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspend all servers; resume them afterwards, so that they can exit."""
        try:
            for server in self._servers:
                _signal(server, "suspend")
            yield
        finally:
            for server in self._servers:
                _signal(server, "resume")

    @contextmanager
    def of(self, server: Server) -> Iterator[None]:
        """Let one server run."""
        _signal(server, "resume")
        try:
            yield
        finally:
            _signal(server, "suspend")


class OtherCPUTime:
    """CPU time that neither a server nor this process used, since its creation; the host's own (steal) included."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._started = self._seconds()

    def seconds(self) -> float:
        """Return the CPU time of all other processes, in seconds; 10 ms are the kernel's resolution."""
        return max(0.0, self._seconds() - self._started)

    def _seconds(self) -> float:
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
        known = [psutil.Process(os.getpid()), *_processes(self._server)]
        return float(busy - sum(_cpu_seconds(process) for process in known))


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        used = process.cpu_times()
        return float(used.user + used.system)
    return 0.0


def _signal(server: Server, action: str) -> None:
    for process in _processes(server):
        with suppress(psutil.NoSuchProcess):
            getattr(process, action)()


def _processes(server: Server) -> list[psutil.Process]:
    """Return the server's processes, children of children included."""
    if server.process_id is None:
        return []
    try:
        process = psutil.Process(server.process_id)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
