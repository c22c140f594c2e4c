"""Tensor-parallel ranks in processes of their own: with gloo on a CPU, with NCCL on GPUs."""

import multiprocessing
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from predictor.kernels import tensor_parallel

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT_SECONDS = 60.0
"""Of each collective operation."""


def run(size: int, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> list[T]:
    """Call a function of a module on each of `size` ranks on the CPU, and return the results by rank."""
    return run_on("cpu", size, function, *args, **options)


def run_on(device: str, size: int, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> list[T]:
    """Do as `run` on a device: `cpu`, or `cuda` for a GPU for each rank."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(_join_and_call, device, rank, size, address, function, args, options) for rank in range(size)
        ]
        return [future.result(3 * TIMEOUT_SECONDS) for future in futures]


def _join_and_call(
    device: str,
    rank: int,
    size: int,
    address: str,
    function: Callable[..., T],
    args: tuple[object, ...],
    options: dict[str, object],
) -> T:
    torch.set_num_threads(1)
    tensor_parallel.join(rank, size, address, device=torch.device(device), timeout_seconds=TIMEOUT_SECONDS)
    try:
        return function(*args, **options)
    finally:
        torch.distributed.destroy_process_group()
