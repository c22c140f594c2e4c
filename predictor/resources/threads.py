"""Number of torch CPU threads."""

import logging
from pathlib import Path

import torch

from predictor.resources import cgroup

logger = logging.getLogger(__name__)


def configure_threads(num_threads: int | None, processes: int = 1) -> None:
    """Set the number of torch threads. Default: the container's CPU limit, else all cores, shared by `processes`.

    Torch counts the machine's cores. The kernel throttles threads beyond a CPU limit, and the others wait for them.
    """
    limit = cgroup.cpu_limit(Path("/"))
    cores = torch.get_num_threads()
    available = cores if limit is None else max(1, min(cores, round(limit)))
    torch.set_num_threads(num_threads or max(1, available // processes))
    logger.info("%d threads", torch.get_num_threads())
