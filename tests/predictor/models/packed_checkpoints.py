"""Checkpoints as GPTQModel and AutoAWQ write them, and the float32 weights that they stand for, of the demo model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from devtools.paths import DEMO_MODEL
from snapshot_format.model_files import CONFIG, SINGLE

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of eight that is in each nibble, lowest first."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Quantized:
    """A weight in integers 0 to 15: weight[out, in] = (q - zero) * scale, by the group of the input."""

    q: NDArray[Any]
    """(in_features, out_features)."""
    zeros: NDArray[Any]
    """(groups, out_features)."""
    scales: NDArray[Any]
    """(groups, out_features), float16."""
    groups: NDArray[Any]
    """(in_features,): the group of each input."""

    def dequantized(self) -> torch.Tensor:
        weight = (self.q.astype(numpy.float32) - self.zeros[self.groups]) * self.scales.astype(numpy.float32)[
            self.groups
        ]
        return torch.from_numpy(weight.T.copy())


def quantize(
    weight: torch.Tensor, group_size: int, *, symmetric: bool, activation_order: bool = False, seed: int = 0
) -> Quantized:
    """Round a weight (out_features, in_features) to the nearest.

    With `activation_order` the inputs of a group are anywhere, by the seed and the number of inputs.
    """
    columns = weight.float().numpy().T
    size = len(columns) if group_size == -1 else group_size
    groups = numpy.arange(len(columns)) // size
    if activation_order:
        groups = groups[numpy.random.default_rng(seed).permutation(len(columns))]
    low = numpy.stack([columns[groups == group].min(0) for group in range(groups.max() + 1)]).clip(max=0)
    high = numpy.stack([columns[groups == group].max(0) for group in range(groups.max() + 1)]).clip(min=0)
    if symmetric:
        high = numpy.maximum(high, -low)
        low = -high
    scales = ((high - low) / 15).astype(numpy.float16)
    zeros = numpy.full_like(low, 8) if symmetric else (-low / scales).round().clip(1, 15)
    q = ((columns / scales[groups]).round() + zeros[groups]).clip(0, 15)
    return Quantized(q.astype(numpy.uint32), zeros.astype(numpy.uint32), scales, groups)


def pack_rows(values: NDArray[Any]) -> torch.Tensor:
    """Pack eight rows of (rows, columns) into one of 32-bit integers, the first one into the lowest bits."""
    packed = numpy.zeros((len(values) // 8, values.shape[1]), numpy.uint32)
    for row in range(len(values)):
        packed[row // 8] |= values[row].astype(numpy.uint32) << numpy.uint32(4 * (row % 8))
    return torch.from_numpy(packed.view(numpy.int32))


def pack_columns(values: NDArray[Any], order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack eight columns into one, those of `order` from the lowest bits on."""
    packed = numpy.zeros((len(values), values.shape[1] // 8), numpy.uint32)
    for nibble, column in enumerate(order):
        packed |= values[:, column::8].astype(numpy.uint32) << numpy.uint32(4 * nibble)
    return torch.from_numpy(packed.view(numpy.int32))


def gptq_tensors(name: str, layer: Quantized, *, zero_offset: int = 1) -> Tensors:
    """Return the tensors of a layer; GPTQ's first format stores zero points minus one."""
    return {
        f"{name}.qweight": pack_rows(layer.q),
        f"{name}.qzeros": pack_columns(layer.zeros - numpy.uint32(zero_offset)),
        f"{name}.scales": torch.from_numpy(layer.scales),
        f"{name}.g_idx": torch.from_numpy(layer.groups.astype(numpy.int32)),
    }


def awq_tensors(name: str, layer: Quantized) -> Tensors:
    """Return the tensors of a layer in AutoAWQ's GEMM format."""
    return {
        f"{name}.qweight": pack_columns(layer.q, AWQ_ORDER),
        f"{name}.qzeros": pack_columns(layer.zeros, AWQ_ORDER),
        f"{name}.scales": torch.from_numpy(layer.scales),
    }


def is_quantized(name: str) -> bool:
    """Whether a tensor of the demo model is a weight of a linear layer inside the decoder."""
    return name.endswith("_proj.weight")


def write(
    directory: Path,
    config: Mapping[str, Any],
    quantize_layer: Callable[[torch.Tensor], Quantized],
    tensors_of: Callable[[str, Quantized], Tensors],
) -> Path:
    """Write a quantized copy of the demo model, and one in float32 with the same weights in `directory`/float32."""
    packed: Tensors = {}
    float32: Tensors = {}
    for name, tensor in load_file(DEMO_MODEL / SINGLE).items():
        if is_quantized(name):
            layer = quantize_layer(tensor)
            packed |= tensors_of(name.removesuffix(".weight"), layer)
            float32[name] = layer.dequantized()
        else:
            # As these checkpoints have them.
            packed[name] = tensor.half()
            float32[name] = tensor.half().float()
    fields = json.loads((DEMO_MODEL / CONFIG).read_text())
    _write(directory, fields | {"dtype": "float16", "quantization_config": dict(config)}, packed)
    _write(directory / "float32", fields, float32)
    return directory


def _write(directory: Path, fields: Mapping[str, Any], tensors: Tensors) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for path in DEMO_MODEL.iterdir():
        if path.is_file() and path.name not in (CONFIG, SINGLE):
            (directory / path.name).symlink_to(path)
    (directory / CONFIG).write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / SINGLE, {"format": "pt"})
