"""Number of torch CPU threads."""

import logging
from pathlib import Path

import torch

from predictor.resources import cgroup

logger = logging.getLogger(__name__)


def configure_threads(num_threads: int | None) -> None:
    """Set the number of torch threads. Default: the container's CPU limit, else all cores.

    Torch counts the machine's cores. The kernel throttles threads beyond a CPU limit, and the others wait for them.
    """
    limit = cgroup.cpu_limit(Path("/"))
    cores = torch.get_num_threads()
    torch.set_num_threads(num_threads or (cores if limit is None else max(1, min(cores, round(limit)))))
    logger.info("%d threads", torch.get_num_threads())
