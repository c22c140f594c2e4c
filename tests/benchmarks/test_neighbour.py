import multiprocessing
import os
import time

import psutil
import pytest

from benchmarks import neighbour


@pytest.mark.slow
def test_neighbour_ends_with_its_context() -> None:
    with neighbour.neighbour(0.6):
        children = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
        assert len(children) == -(-(0.6 * (os.cpu_count() or 1)) // 1)
        while sum(child.cpu_times().user for child in children) < 2 * neighbour.BURST_SECONDS:
            time.sleep(neighbour.BURST_SECONDS)
    assert not any(child.is_running() for child in children)
