"""Processes that share one model by tensor parallelism: the group of this process, and sums over it.

Rank 0 is the server and its engine; the others are followers. Without a group there is one rank.
"""

from datetime import timedelta

import torch
from torch import distributed, nn


def join(rank: int, size: int, address: str, *, device: torch.device, timeout_seconds: float) -> None:
    """Join the group; returns when all ranks have joined.

    Args:
        rank: of this process, 0 to `size` - 1.
        size: number of ranks.
        address: host:port of the group's store, which rank 0 serves.
        device: of this rank; CUDA devices communicate by NCCL, a CPU by gloo.
        timeout_seconds: limit of every collective operation, so that a rank that hangs is found.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_seconds)
    store = distributed.TCPStore(host, int(port), size, is_master=rank == 0, timeout=timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


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
    """Replace each element by the largest of all ranks, in place, and return the tensor."""
    if size() > 1:
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values


def all_gather(part: torch.Tensor, width: int) -> torch.Tensor:
    """Join the ranks' parts of the last dimension, (..., part) to (..., `width`).

    The parts are those of `torch.chunk`: the last ones may be shorter.
    """
    longest = -(-width // size())
    padded = nn.functional.pad(part, (0, longest - part.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(size())]
    distributed.all_gather(parts, padded)
    return torch.cat(parts, -1)[..., :width]
