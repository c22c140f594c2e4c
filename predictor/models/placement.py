"""Where a model goes: onto the device asked for and, where a GPU is too small for its weights, into the host's memory.

What lies there is brought to the GPU layer by layer, at every step, by accelerate: it works, slowly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from predictor.errors import StartupError

_GPU_SHARE, _HOST_SHARE = 0.85, 0.8
"""Of the free memory, for weights; the rest is for the KV cache and what a step computes with."""
_SIZE = {"none": 1.0, "8bit": 0.6, "4bit": 0.4}
"""Of weights over their size in 16 bits: embeddings and norms stay as they are."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What `from_pretrained` is told of devices."""

    device_map: dict[str, torch.device] | str
    max_memory: dict[int | str, int] | None
    """Bytes for each GPU, by its number, and for the host, "cpu"."""


def choose_device(device: str) -> torch.device:
    """The device asked for; "auto" takes the first of cuda, mps, cpu that is there.

    Raises:
        StartupError: the device asked for is not there.
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
        raise StartupError(f"--device is {device}, but torch sees no such device here; use --device auto or cpu.")
    if kind != "cuda":
        return torch.device(kind)
    if int(index or 0) >= torch.cuda.device_count():
        raise StartupError(
            f"--device is {device}, but the last GPU that torch sees is cuda:{torch.cuda.device_count() - 1}."
        )
    return torch.device(kind, int(index or 0))


def place(
    device: torch.device, quantization: str, weights_bytes: int, free_bytes: int, host_bytes: Callable[[], int]
) -> Placement:
    """All of it on the device; where that is a GPU without room for the weights, the rest in the host's memory.

    Args:
        device: where it computes.
        quantization: "none", "8bit" or "4bit".
        weights_bytes: of the checkpoint.
        free_bytes: on the device.
        host_bytes: tells what is free on the host; asked only if need be.

    Raises:
        StartupError: there is no room for the weights in both together.
    """
    needed, room = int(weights_bytes * _SIZE[quantization]), int(free_bytes * _GPU_SHARE)
    if device.type != "cuda" or needed <= room:
        return Placement({"": device}, None)
    host = int(host_bytes() * _HOST_SHARE)
    if needed > room + host:
        raise StartupError(
            f"The weights take {needed / 2**30:.1f} GiB in {quantization}, and there is room for {room / 2**30:.1f} "
            f"GiB on {device} and for {host / 2**30:.1f} GiB in the host's memory; use fewer bits or a larger GPU."
        )
    return Placement("auto", {device.index: room, "cpu": host})


def describe(model: Any) -> dict[str, str]:
    """Where each part of a model lies, by its name, if that is more than one place; else empty."""
    places = {part or "model": str(place) for part, place in getattr(model, "hf_device_map", {}).items()}
    return places if len(set(places.values())) > 1 else {}
