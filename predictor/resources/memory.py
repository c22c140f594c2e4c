"""How much memory this process may really use, and how many tokens of KV cache fit into it.

Knows nothing of sequences or weights: those are loaded already when it is asked.
"""

from pathlib import Path

import psutil
import torch

from predictor.resources import cgroup


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device without being killed or failing."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min(int(psutil.virtual_memory().available), cgroup.available_bytes(Path("/")))
