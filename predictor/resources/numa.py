"""Cores of NUMA nodes: a thread's memory is on the node of the core that it runs on."""

import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)


def bind(process: int, processes: int) -> None:
    """Run this thread, and those that it starts, on the NUMA nodes of one of several processes, if each has some."""
    if sys.platform != "linux":
        return
    allowed = os.sched_getaffinity(0)
    cores = choose_cores(process, processes, allowed, Path("/"))
    if cores != allowed:
        os.sched_setaffinity(0, cores)
        logger.info("on %d of %d cores, those of a NUMA node", len(cores), len(allowed))


def choose_cores(process: int, processes: int, allowed: set[int], root: Path) -> set[int]:
    """Return those of the allowed cores that are on a process's NUMA nodes.

    They are all if the nodes cannot be divided between the processes.

    Args:
        process: 0 to `processes` - 1.
        processes: each gets the same number of nodes.
        allowed: numbers of cores.
        root: of the file system that holds /sys.
    """
    folders = root.glob("sys/devices/system/node/node[0-9]*")
    in_order = sorted(folders, key=lambda folder: int(folder.name.removeprefix("node")))
    nodes = [cores for folder in in_order if (cores := _read(folder / "cpulist") & allowed)]
    share, rest = divmod(len(nodes), processes)
    if not share or rest:
        return allowed
    return set().union(*nodes[process * share : (process + 1) * share])


def _read(cpulist: Path) -> set[int]:
    """Return the numbers in a list as of "0-3,8,10-11"."""
    ranges = [part.split("-") for part in cpulist.read_text().strip().split(",") if part]
    return {core for bounds in ranges for core in range(int(bounds[0]), int(bounds[-1]) + 1)}
