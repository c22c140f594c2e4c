import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from benchmarks.servers import Server
from benchmarks.turns import OtherCPUTime, Turns

PARENT = (
    "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); print('started', flush=True); child.wait()"
)
BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"


def start(program: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline()
    return process


def stop(process: "subprocess.Popen[str]") -> None:
    for child in psutil.Process(process.pid).children():
        child.kill()
    process.kill()
    process.communicate()


def states(server: Server) -> set[str]:
    """States of a server's processes."""
    process = psutil.Process(server.process_id)
    return {one.status() for one in (process, *process.children())}


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    processes = [start(PARENT) for _ in range(2)]
    yield [Server(f"server {process.pid}", "http://127.0.0.1/v1", "m", process_id=process.pid) for process in processes]
    for process in processes:
        stop(process)


def test_turns_one_server_runs_and_the_others_are_suspended_with_their_children(servers: list[Server]) -> None:
    one, other = servers
    remote = Server("remote", "http://127.0.0.1/v1", "m")
    turns = Turns([one, other, remote])
    with turns.suspended():
        assert states(one) == states(other) == {psutil.STATUS_STOPPED}
        with turns.of(one):
            assert states(one) == {psutil.STATUS_SLEEPING}
            assert states(other) == {psutil.STATUS_STOPPED}
        assert states(one) == {psutil.STATUS_STOPPED}
    assert states(one) == states(other) == {psutil.STATUS_SLEEPING}, "a suspended server would not end on SIGTERM"


def test_turns_servers_are_resumed_after_a_failure(servers: list[Server]) -> None:
    turns = Turns(servers)
    with pytest.raises(ValueError, match="failed"), turns.suspended(), turns.of(servers[0]):
        raise ValueError("failed")
    assert states(servers[0]) | states(servers[1]) == {psutil.STATUS_SLEEPING}


def test_other_cpu_time_counts_every_process_but_the_server() -> None:
    process = start("print('started', flush=True)\ninput()\n" + BUSY)
    try:
        server = Server("server", "http://127.0.0.1/v1", "m", process_id=process.pid)
        unknown = OtherCPUTime(Server("remote", "http://127.0.0.1/v1", "m"))
        known = OtherCPUTime(server)
        assert process.stdin
        assert process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        assert unknown.seconds() - known.seconds() >= 0.15, "0.3 s of the server, in units of the kernel's"
    finally:
        stop(process)
