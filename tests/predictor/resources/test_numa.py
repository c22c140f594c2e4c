import os
import threading
from pathlib import Path

import pytest

from predictor.resources import numa


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system of a machine with two sockets of two nodes each, and one node without cores."""
    for node, cores in {0: "0-1,8-9", 1: "2-3,10-11", 2: "4-5,12-13", 10: "6-7,14-15", 11: ""}.items():
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("process", "processes", "expected"),
    [
        (0, 2, {0, 1, 2, 3, 8, 9, 10, 11}),
        (1, 2, {4, 5, 6, 7, 12, 13, 14, 15}),
        (3, 4, {6, 7, 14, 15}),
        (1, 3, set(range(16))),
        (1, 8, set(range(16))),
    ],
)
def test_choose_cores_divides_the_nodes(root: Path, process: int, processes: int, expected: set[int]) -> None:
    assert numa.choose_cores(process, processes, set(range(16)), root) == expected


def test_choose_cores_counts_only_nodes_with_allowed_cores(root: Path) -> None:
    assert numa.choose_cores(1, 2, {0, 1, 4}, root) == {4}
    assert numa.choose_cores(1, 2, {0, 1}, root) == {0, 1}


def test_choose_cores_without_nodes_are_all(tmp_path: Path) -> None:
    assert numa.choose_cores(1, 2, {0, 1}, tmp_path) == {0, 1}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_bind_limits_the_calling_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(numa, "choose_cores", lambda *_: {min(before)})
    seen: list[set[int]] = []

    def run() -> None:
        numa.bind(0, 2)
        started = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        started.start()
        started.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [{min(before)}]
    assert os.sched_getaffinity(0) == before
