"""Free memory of a device, and the lack of it."""

from pathlib import Path

import psutil
import torch

from predictor.resources import cgroup

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""In errors for which torch has no class of its own: of the host, and of what CUDA's libraries allocate themselves."""


def available_bytes(device: torch.device) -> int:
    """Return how much can be allocated on a device; on the host, within the memory limits of cgroups."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of freed tensors is not free by CUDA's count
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min(int(psutil.virtual_memory().available), cgroup.available_bytes(Path("/")))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a lack of memory, of a device or of the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)
    )
