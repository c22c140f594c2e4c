"""How many threads torch computes with."""

import logging
from pathlib import Path

import torch

from predictor.resources import cgroup

logger = logging.getLogger(__name__)


def set_threads(number: int | None) -> None:
    """Have torch compute with so many threads; None: with as many as this process gets CPU time for.

    Torch counts the machine's cores. In a container with a limit, threads beyond it are stopped for most of the time,
    and those that are not wait for them.
    """
    granted = cgroup.cpus(Path("/"))
    cores = torch.get_num_threads()
    torch.set_num_threads(number or (cores if granted is None else max(1, min(cores, round(granted)))))
    logger.info("%d threads", torch.get_num_threads())
