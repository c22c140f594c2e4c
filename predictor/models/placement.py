"""Choose the device of a model; offload layers to host memory where a GPU is too small.

Accelerate copies offloaded layers to the GPU at every step, which is slow. Tensor-parallel ranks have a device and a
part of the weights each, and offload nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.distributed import DistributedConfig

from predictor.errors import InvalidSettings, StartupError
from predictor.kernels import tensor_parallel

_GPU_WEIGHT_FRACTION, _HOST_WEIGHT_FRACTION = 0.85, 0.8
"""Fractions of free memory for weights; the rest is for the KV cache and activations."""
_RELATIVE_SIZE = {"none": 1.0, "8bit": 0.6, "fp8": 0.6, "4bit": 0.4}
"""Size of weights relative to 16 bits: embeddings and norms are not quantized."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights are loaded."""

    device_map: dict[str, torch.device] | str | None
    """None: this rank's part on its device."""
    max_memory: dict[int | str, int] | None = None
    """Bytes for each GPU, by its index, and for the host, "cpu"."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`."""
        if self.device_map is None:
            return {"distributed_config": DistributedConfig(tp_size=tensor_parallel.size())}
        return {"device_map": self.device_map, "max_memory": self.max_memory}


def choose_device(device: str) -> torch.device:
    """Resolve a device name; "auto" takes the first available of cuda, mps, cpu, and each rank the GPU of its number.

    Raises:
        InvalidSettings: the setting excludes tensor parallelism.
        StartupError: the device is not available.
    """
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if device == "auto":
        device = next(name for name, is_available in available.items() if is_available())
    kind, _, index = device.partition(":")
    if not available[kind]():
        raise StartupError(f"--device is {device}, but torch finds no such device. Use --device auto or cpu.")
    if tensor_parallel.size() > 1:
        return _device_of_rank(kind)
    if kind != "cuda":
        return torch.device(kind)
    if int(index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise StartupError(f"--device is {device}, but the last GPU is cuda:{last}. Use --device cuda:{last}.")
    return torch.device(kind, int(index or 0))


def _device_of_rank(kind: str) -> torch.device:
    """Return the device of this tensor-parallel rank."""
    ranks = tensor_parallel.size()
    if kind == "mps":
        raise InvalidSettings(
            f"--tensor_parallel_size is {ranks}, but the device is mps, which does not support it. Set "
            "--tensor_parallel_size 1, or --device cpu."
        )
    if kind == "cuda":
        return torch.device(kind, tensor_parallel.rank())
    if torch.accelerator.is_available():
        # transformers would load the weights onto it.
        raise InvalidSettings(
            f"--device is cpu, but --tensor_parallel_size {ranks} uses the GPUs that are visible. Set "
            "CUDA_VISIBLE_DEVICES= to hide them, or --device auto."
        )
    return torch.device(kind)


def place(
    device: torch.device, mode: str, weight_bytes: int, free_bytes: int, host_free_bytes: Callable[[], int]
) -> Placement:
    """Place the whole model on the device, or what exceeds a GPU in host memory.

    The arguments are those of `resolve_mode`; `host_free_bytes` is called only if needed.

    Raises:
        StartupError: the weights do not fit in both memories together; of a tensor-parallel rank, in the GPU's.
    """
    needed, gpu = int(weight_bytes * _RELATIVE_SIZE[mode]), int(free_bytes * _GPU_WEIGHT_FRACTION)
    ranks = tensor_parallel.size()
    if ranks > 1:
        if device.type == "cuda" and needed > gpu:
            raise StartupError(
                f"The weights need {needed / 2**30:.1f} GiB on each of {ranks} GPUs with quantization {mode}, but "
                f"{device} has room for {gpu / 2**30:.1f} GiB. Set a larger --tensor_parallel_size, or use larger GPUs."
            )
        return Placement(None)
    if device.type != "cuda" or needed <= gpu:
        return Placement({"": device})
    host = int(host_free_bytes() * _HOST_WEIGHT_FRACTION)
    if needed > gpu + host:
        raise StartupError(
            f"The weights need {needed / 2**30:.1f} GiB with quantization {mode}, but {device} has room for "
            f"{gpu / 2**30:.1f} GiB and host memory for {host / 2**30:.1f} GiB. Use fewer bits or a larger GPU."
        )
    return Placement("auto", {device.index: gpu, "cpu": host})


def device_map(model: Any) -> dict[str, str]:
    """Return the device of each part of a model by name, or of each rank; empty if there is only one device."""
    ranks = tensor_parallel.size()
    if ranks > 1:
        kind = model.device.type
        return {f"rank {rank}": kind if kind == "cpu" else f"{kind}:{rank}" for rank in range(ranks)}
    devices = {part or "model": str(device) for part, device in getattr(model, "hf_device_map", {}).items()}
    return devices if len(set(devices.values())) > 1 else {}
