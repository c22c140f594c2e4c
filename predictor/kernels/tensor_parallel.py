"""Processes that share one model by tensor parallelism: the group of this process, and operations of all its members.

Rank 0 is the server and its engine; the others are followers. Without a group there is one rank, and every function
here returns at once.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import distributed, nn

from predictor.errors import InvalidSettings, LoadCancelled, RankFailed, RankLost, StartupError

logger = logging.getLogger(__name__)

LOAD_SECONDS = 86400.0
"""Limit of operations during the load, in which ranks wait for the slowest. The end of a process ends them at once."""
EXCHANGE_SECONDS = 600.0
"""Limit of one exchange of numbers while weights load. A rank that failed waits for the others without taking part."""
_VARIABLES = {
    # The ranks share a machine: the interface of the host's name need not exist, and other machines need no access.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # transformers' continuous batching uses no CUDA graph under NCCL's default.
    "NCCL_GRAPH_MIXING_SUPPORT": "0",
}

_has_lost_rank = False
"""Whether a rank did not take part in an exchange."""
_load_group: Any = None
"""Gloo group of all ranks, for what they exchange while they load."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Membership of this process in a group that is yet to be joined."""

    number: int
    size: int
    address: str
    """host:port of the group's store, which rank 0 serves."""
    listen_fd: int | None = None
    """Rank 0's listening socket of that address; None: it opens one."""


def resolve_size(size: int | Literal["auto"], device: str) -> int:
    """Return the number of ranks that settings ask for.

    Raises:
        StartupError: the device has no such number of ranks.
    """
    kind, _, index = device.partition(":")
    uses_cuda = kind == "cuda" or (kind == "auto" and torch.cuda.is_available())
    if size == "auto":
        return max(1, torch.cuda.device_count()) if uses_cuda and not index else 1
    if size == 1:
        return size
    if kind == "mps":
        raise InvalidSettings(f"--tensor_parallel_size is {size}, but mps has one device. Use 1, or --device cpu.")
    if index:
        raise InvalidSettings(
            f"--tensor_parallel_size is {size}, but --device names one GPU, {device}. Use --device cuda: rank r takes "
            "the visible GPU r."
        )
    if uses_cuda and size > torch.cuda.device_count():
        raise InvalidSettings(
            f"--tensor_parallel_size is {size}, but torch finds {torch.cuda.device_count()} GPUs. Request as many "
            "GPUs for the container, or use auto."
        )
    return size


def join(
    rank: int,
    size: int,
    address: str,
    *,
    device: torch.device,
    timeout_seconds: float = LOAD_SECONDS,
    listen_fd: int | None = None,
) -> None:
    """Join the group; returns when all ranks have joined.

    Args:
        rank: of this process, 0 to `size` - 1.
        size: number of ranks.
        address: as of `Rank`.
        device: of the model; CUDA devices communicate by NCCL, rank r on the visible GPU r, and a CPU by gloo.
        timeout_seconds: limit of every collective operation until `set_timeout`.
        listen_fd: as of `Rank`.
    """
    global _load_group  # as torch's default group
    for name, value in _VARIABLES.items() if sys.platform == "linux" else ():
        os.environ.setdefault(name, value)
    # Some parts of transformers read these instead of the group.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    timeout = timedelta(seconds=timeout_seconds)
    host, _, port = address.rpartition(":")
    store = distributed.TCPStore(
        host, int(port), size, is_master=rank == 0, timeout=timeout, master_listen_fd=listen_fd
    )
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    _load_group = distributed.new_group(backend="gloo", timeout=timeout)


def set_timeout(seconds: float, *groups: Any) -> None:
    """Limit every further collective operation of the group, and of torch groups within it."""
    if size() > 1:
        for group in (distributed.group.WORLD, *groups):
            distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def rank() -> int:
    """Return the rank of this process; 0 without a group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """Return the number of ranks; 1 without a group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def all_reduce(partial: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if size() > 1:
        distributed.all_reduce(partial)
    return partial


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Replace each element by the largest of all ranks, in place, and return the tensor; while weights load.

    Raises:
        RankLost: another rank failed, and does not take part. Every later call fails, too.
    """
    global _has_lost_rank
    if size() == 1:
        return values
    check_exchanges()
    work = distributed.all_reduce(values, distributed.ReduceOp.MAX, async_op=True)
    try:
        work.wait(timedelta(seconds=EXCHANGE_SECONDS))
    except RuntimeError as error:
        _has_lost_rank = True
        raise _lost_rank() from error
    return values


def check_exchanges() -> None:
    """Check that every rank took part in all exchanges while weights loaded; transformers catches their errors.

    Raises:
        RankLost: one did not.
    """
    if _has_lost_rank:
        raise _lost_rank()


def _lost_rank() -> RankLost:
    return RankLost("A rank failed while the weights were quantized. Its log says why.")


def all_gather(part: torch.Tensor, width: int) -> torch.Tensor:
    """Join the ranks' parts of the last dimension, (..., part) to (..., `width`).

    The parts are those of `torch.chunk`: the last ones may be shorter.
    """
    longest = -(-width // size())
    padded = nn.functional.pad(part, (0, longest - part.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(size())]
    distributed.all_gather(parts, padded)
    return torch.cat(parts, -1)[..., :width]


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by rank 0's, in place, and return it."""
    if size() > 1 and tensor.numel():
        distributed.broadcast(tensor, src=0)
    return tensor


def share(value: Any = None) -> Any:
    """Return rank 0's value, which is pickled, on every rank; for the load and its warm-up."""
    if size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=_load_group)
    return values[0]


@contextmanager
def together(phase: str) -> Iterator[None]:
    """Run a phase of the load on every rank, and end it when it has ended on all. Phases may be nested.

    Raises:
        RankFailed: the phase failed on some rank; this one's error comes first, then those of lower ranks.
    """
    if size() == 1:
        yield
        return
    error: StartupError | None = None
    try:
        yield
    except (RankFailed, LoadCancelled):
        raise  # of an inner phase, and known to all ranks; or rank 0 ends all
    except StartupError as failure:
        error = failure
    except Exception as failure:
        logger.exception("the phase %s of the load failed", phase)
        error = StartupError(f"Loading the model failed: {failure}")
    outcomes: list[tuple[str, int] | None] = [None] * size()
    try:
        distributed.all_gather_object(outcomes, error and (str(error), error.exit_code), group=_load_group)
    except RuntimeError as lost:
        raise RankLost(str(error or f"A rank ended in the phase {phase} of the load. Its log says why.")) from lost
    if error:
        raise RankFailed(str(error), error.exit_code) from error
    for other, outcome in enumerate(outcomes):
        if outcome:
            message, exit_code = outcome
            raise RankFailed(f"Rank {other}: {message}", exit_code)
