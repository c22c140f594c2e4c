import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from benchmarks.turns import OtherCPUTime, Turns
from kserve_llm.bench import Server

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


def wait_until_suspended(server: Server, *, is_suspended: bool = True) -> None:
    """Wait until all of a server's processes are suspended, or none: a signal has its effect some time later."""
    process = psutil.Process(server.process_id)
    processes = (process, *process.children())
    while {one.status() == psutil.STATUS_STOPPED for one in processes} != {is_suspended}:
        time.sleep(0.01)


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
        wait_until_suspended(one)
        wait_until_suspended(other)
        with turns.of(one):
            wait_until_suspended(one, is_suspended=False)
            wait_until_suspended(other)
        wait_until_suspended(one)
    # A suspended server would not end on SIGTERM.
    wait_until_suspended(one, is_suspended=False)
    wait_until_suspended(other, is_suspended=False)


def test_turns_servers_are_resumed_after_a_failure(servers: list[Server]) -> None:
    turns = Turns(servers)
    with pytest.raises(ValueError, match="failed"), turns.suspended(), turns.of(servers[0]):
        raise ValueError("failed")
    for server in servers:
        wait_until_suspended(server, is_suspended=False)


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
        # In this order, so that what others use in between makes the difference larger, not smaller.
        others = known.seconds()
        assert unknown.seconds() - others >= 0.15, "0.3 s of the server, in units of the kernel's"
    finally:
        stop(process)
