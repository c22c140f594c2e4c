"""4-bit checkpoints of GPTQ and AWQ: which of them can be served on a CPU, and how their tensors are packed.

    GPTQ       qweight int32 (in_features / 8, out_features), eight inputs to an integer; qzeros int32 (groups,
               out_features / 8), eight outputs to an integer, minus one in the first format; g_idx (in_features,), the
               group of each input
    AWQ, GEMM  qweight int32 (in_features, out_features / 8), qzeros int32 (groups, out_features / 8), eight outputs to
               an integer in another order

Both have scales (groups, out_features) in float16: weight = (q - zero point) * scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from predictor.errors import UnsupportedModel
from predictor.kernels.cpu.gemm import INT4_GROUP_SIZES
from predictor.kernels.cpu.linear import Int4Linear
from snapshot_format import int4

METHODS = ("gptq", "awq")
"""`quant_method` of the checkpoints."""
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that is in each nibble of an AWQ integer, lowest nibble first."""
_GPTQ_ZERO_POINT_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""Added to stored zero points, by `checkpoint_format`."""
_ADVICE = "Use a GPTQ or AWQ (GEMM) checkpoint of 4 bits, or the original weights with --quantization 4bit or 8bit."


@dataclass(frozen=True, slots=True)
class Packing:
    """How the tensors of a checkpoint are packed."""

    is_awq: bool
    group_size: int
    """Inputs that share a scale; -1: all of a layer."""
    zero_point_offset: int
    """Added to stored zero points."""


def read_packing(fields: Mapping[str, Any], directory: Path) -> Packing:
    """Read the `quantization_config` of config.json.

    Args:
        fields: its `quant_method` is one of `METHODS`.
        directory: of the model, for the message.

    Raises:
        UnsupportedModel: the checkpoint is packed in another way.
    """
    method, bits, group_size = fields["quant_method"], fields.get("bits", 4), fields.get("group_size", 128)
    is_awq = method == "awq"
    name = "version" if is_awq else "checkpoint_format"
    packing = str(fields.get(name) or fields.get("format") or ("gemm" if is_awq else "gptq")).lower()
    packings = ("gemm",) if is_awq else tuple(_GPTQ_ZERO_POINT_OFFSETS)
    refusal = ""
    if bits != 4:
        refusal = f"bits {bits} instead of 4"
    elif packing not in packings or fields.get("is_marlin_format") or fields.get("backend") == "llm-awq":
        refusal = f"{name} {fields.get('backend') or packing} instead of {' or '.join(packings)}"
    elif not isinstance(group_size, int) or (group_size != -1 and not _kernel_group_size(group_size)):
        refusal = f"group_size {group_size}, which is neither -1 nor a multiple of {min(INT4_GROUP_SIZES)}"
    elif override := _first_override(fields, bits, group_size):
        refusal = f"layers of their own bits or group_size (dynamic: {override})"
    if refusal:
        raise UnsupportedModel(f"The weights in {directory} are quantized by {method} with {refusal}. {_ADVICE}")
    return Packing(is_awq, group_size, 0 if is_awq else _GPTQ_ZERO_POINT_OFFSETS[packing])


def _kernel_group_size(group_size: int) -> int:
    """Return the largest group size of the kernels that divides a group; 0 if there is none."""
    return max((size for size in INT4_GROUP_SIZES if group_size > 0 and group_size % size == 0), default=0)


def _first_override(fields: Mapping[str, Any], bits: int, group_size: int) -> str:
    """Return the first pattern of GPTQModel's `dynamic` whose layers are packed in another way; empty without one."""
    for pattern, settings in (fields.get("dynamic") or {}).items():
        own = settings or {}
        if (own.get("bits", bits), own.get("group_size", group_size)) != (bits, group_size):
            return str(pattern)
    return ""


class PackedLinear(nn.Module):
    """Linear layer with the tensors of a checkpoint; `unpack` makes it computable.

    Args:
        in_features: size of an input; a multiple of the group size.
        out_features: size of an output; a multiple of 8.
        bias_dtype: None for a layer without a bias.
        packing: of the checkpoint.
        has_group_indices: whether the layer has GPTQ's `g_idx`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_dtype: torch.dtype | None,
        packing: Packing,
        *,
        has_group_indices: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._packing = packing
        self._group_size = in_features if packing.group_size == -1 else packing.group_size
        groups = in_features // self._group_size
        packed_size = (in_features, out_features // 8) if packing.is_awq else (in_features // 8, out_features)
        self.qweight = _parameter(packed_size, torch.int32)
        self.qzeros = _parameter((groups, out_features // 8), torch.int32)
        self.scales = _parameter((groups, out_features), torch.float32)
        self.g_idx = _parameter((in_features,), torch.int32) if has_group_indices else None
        self.bias = None if bias_dtype is None else _parameter((out_features,), bias_dtype)

    def unpack(self) -> Int4Linear:
        """Return the layer as the kernels need it.

        Raises:
            ValueError: groups have different sizes.
        """
        qweight = unpack_awq(self.qweight) if self._packing.is_awq else unpack_gptq(self.qweight)
        order = None if self.g_idx is None else input_order(self.g_idx.long(), self._group_size)
        if order is not None:
            qweight = qweight[:, order]
        zero_point = self._zero_points()
        repeats = self._group_size // _kernel_group_size(self._group_size)
        bias_dtype = None if self.bias is None else self.bias.dtype
        with torch.device("meta"):
            layer = Int4Linear(
                self.in_features,
                self.out_features,
                bias_dtype,
                group_size=self._group_size // repeats,
                has_zero_points=bool((zero_point != 8).any()),
            )
        layer.weight = nn.Parameter(int4.pack(qweight), requires_grad=False)
        layer.scale = nn.Parameter(self.scales.T.repeat_interleave(repeats, 1).contiguous(), requires_grad=False)
        if layer.zero_point is not None:
            layer.zero_point = nn.Parameter(zero_point.repeat_interleave(repeats, 1), requires_grad=False)
        layer.bias, layer.input_order = self.bias, order
        return layer

    def _zero_points(self) -> torch.Tensor:
        """Return the zero points (out_features, groups), uint8."""
        if self._packing.is_awq:
            return unpack_awq(self.qzeros)
        # Of whole integers: the offset was subtracted so, and zero minus one borrows from the next nibble.
        return unpack_nibbles(self.qzeros + 0x11111111 * self._packing.zero_point_offset).flatten(1).T.contiguous()


def _parameter(size: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Split integers of 32 bits (rows, columns) into (rows, columns, 8), uint8, lowest nibble first."""
    return int4.unpack(packed.contiguous().view(torch.uint8).view(*packed.shape, 4))


def unpack_gptq(packed: torch.Tensor) -> torch.Tensor:
    """Unpack (in_features / 8, out_features) to (out_features, in_features), uint8."""
    return unpack_nibbles(packed).transpose(0, 1).flatten(1)


def unpack_awq(packed: torch.Tensor) -> torch.Tensor:
    """Unpack (rows, out_features / 8) to (out_features, rows), uint8."""
    nibbles = torch.tensor(_AWQ_COLUMNS).argsort()
    return unpack_nibbles(packed)[..., nibbles].flatten(1).T.contiguous()


def input_order(groups: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """Return the order in which inputs of a group are side by side; None if they are.

    Args:
        groups: (in_features,): the group of each input.
        group_size: number of its inputs.

    Raises:
        ValueError: a group has more or fewer inputs.
    """
    if not torch.equal(groups.sort().values, torch.arange(len(groups)) // group_size):
        raise ValueError(f"groups of g_idx have other sizes than {group_size}")
    order = groups.argsort(stable=True)
    return None if torch.equal(order, torch.arange(len(groups))) else order


def unpack_layers(model: nn.Module, directory: Path) -> None:
    """Replace the `PackedLinear`s of a model by `Int4Linear`s in place.

    Raises:
        UnsupportedModel: the groups of a layer have different sizes.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            try:
                model.set_submodule(name, layer.unpack())
            except ValueError as error:
                raise UnsupportedModel(f"{name} in {directory} cannot be used ({error}). {_ADVICE}") from error
