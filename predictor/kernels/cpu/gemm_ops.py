"""Python bindings of the C kernels of linear layers: packing of weights, and products with what is fused into them."""

import ctypes
from typing import Any, NamedTuple, TypedDict, Unpack

import torch

from predictor.kernels.cpu import ops

MIN_SCALE_EXPONENT = -100
"""Lower scales are zero: powers of two beyond float32 would not be finite."""


class LinearArguments(ctypes.Structure):
    """The struct of the same name in `kernels.h`."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("silu_and_mul", ctypes.c_int),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("m", ctypes.c_size_t),
        ("k", ctypes.c_size_t),
        ("n", ctypes.c_size_t),
        ("num_threads", ctypes.c_int),
    ]


class Fused(TypedDict, total=False):
    """What a kernel computes with its product; all tensors are float32."""

    bias: torch.Tensor | None
    """(out_features,)."""
    norm: tuple[torch.Tensor, float] | None
    """Weight (in_features,) and epsilon of an RMSNorm of the activations."""
    silu_and_mul: bool
    """Activations are (tokens, 2 x in_features), gate and up; silu(gate) * up is multiplied."""
    residual: torch.Tensor | None
    """Added to the output, (tokens, out_features)."""


class Int4Weight(NamedTuple):
    """int4 weights in the layout of `int4_scaled_mm`."""

    packed: torch.Tensor
    """Weights, scales of groups and zero points, uint8."""
    scales: torch.Tensor
    """Of the outputs, (out_features,), float32; the scales of groups are relative to them."""
    group_size: int
    """Input features with the same scale and zero point: 32, 64 or 128."""
    has_zero_points: bool


def int8_pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack int8 weights (out_features, in_features) into the layout of `int8_scaled_mm`, in one thread."""
    return _pack(weight, ops.library.int8_packed_bytes, ops.library.int8_pack_weight)


def int8_scaled_mm(
    activations: torch.Tensor, packed_weight: torch.Tensor, weight_scales: torch.Tensor, **fused: Unpack[Fused]
) -> torch.Tensor:
    """Multiply float32 activations, quantized per token to int8, by packed int8 weights.

    Args:
        activations: (tokens, in_features), float32. With `silu_and_mul` the product overwrites gate.
        packed_weight: from `int8_pack_weight`.
        weight_scales: (out_features,), float32.
        fused: computed with the product.

    Returns:
        (tokens, out_features), float32.
    """
    call = _Call(activations, len(weight_scales), **fused)
    call.allocate_scratch(ops.library.int8_scratch_bytes(call.tokens, call.in_features))
    ops.library.int8_scaled_mm(
        call.arguments, packed_weight.data_ptr(), weight_scales.data_ptr(), ops.CPU_ISAS.index(ops.cpu_isa)
    )
    return call.output


def int8_argmax(
    activations: torch.Tensor,
    packed_weight: torch.Tensor,
    weight_scales: torch.Tensor,
    num_outputs: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return which output of `int8_scaled_mm` is the largest, the first of equal ones, without writing the outputs.

    Args, in addition to those of `int8_scaled_mm`:
        num_outputs: number of outputs to look at, of which the first ones are.

    Returns:
        (tokens,), int64, as `argmax` of the outputs.
    """
    call = _Call(activations, num_outputs, has_output=False, bias=bias)
    scratch_bytes = ops.library.int8_argmax_scratch_bytes(call.tokens, call.in_features, torch.get_num_threads())
    call.allocate_scratch(scratch_bytes)
    largest = torch.empty(call.tokens, dtype=torch.int64)
    ops.library.int8_argmax(
        call.arguments,
        packed_weight.data_ptr(),
        weight_scales.data_ptr(),
        largest.data_ptr(),
        ops.CPU_ISAS.index(ops.cpu_isa),
    )
    return largest


def int4_pack_weight(
    qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int
) -> Int4Weight:
    """Pack int4 weights, in one thread. Scales are kept in float16, relative to a power of two per output.

    Args:
        qweight: (out_features, in_features), uint8, 0 to 15.
        scale: (out_features, groups), float32.
        zero_point: (out_features, groups), uint8, 0 to 15; None: 8.
        group_size: 32, 64 or 128. The last group may be shorter.
    """
    out_features, in_features = qweight.shape
    exponent = torch.frexp(scale.abs().amax(1)).exponent.clamp_(min=MIN_SCALE_EXPONENT)
    relative = torch.ldexp(scale, -exponent[:, None]).half().contiguous()
    packed = torch.empty(
        ops.library.int4_packed_bytes(out_features, in_features, group_size, zero_point is not None), dtype=torch.uint8
    )
    qweight = qweight.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    ops.library.int4_pack_weight(
        qweight.data_ptr(),
        relative.data_ptr(),
        _pointer(zero_point),
        packed.data_ptr(),
        out_features,
        in_features,
        group_size,
    )
    return Int4Weight(packed, torch.ldexp(torch.ones(out_features), exponent), group_size, zero_point is not None)


def int4_scaled_mm(activations: torch.Tensor, weight: Int4Weight, **fused: Unpack[Fused]) -> torch.Tensor:
    """Multiply float32 activations, quantized per token to int8, by packed int4 weights.

    Arguments and result are those of `int8_scaled_mm`, but for the weight.
    """
    call = _Call(activations, len(weight.scales), **fused)
    call.allocate_scratch(ops.library.int4_scratch_bytes(call.tokens, call.in_features, weight.group_size))
    ops.library.int4_scaled_mm(
        call.arguments,
        weight.packed.data_ptr(),
        weight.scales.data_ptr(),
        weight.group_size,
        weight.has_zero_points,
        ops.CPU_ISAS.index(ops.cpu_isa),
    )
    return call.output


def bf16_pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack bfloat16 weights (out_features, in_features) into the layout of `bf16_mm`, in one thread."""
    return _pack(weight, ops.library.bf16_packed_bytes, ops.library.bf16_pack_weight)


def bf16_mm(
    activations: torch.Tensor, packed_weight: torch.Tensor, out_features: int, **fused: Unpack[Fused]
) -> torch.Tensor:
    """Multiply float32 activations by packed bfloat16 weights. Sums are float32.

    Args:
        activations: (tokens, in_features), float32. AMX and AVX512-BF16 round them to bfloat16.
        packed_weight: from `bf16_pack_weight`.
        out_features: of the weights.
        fused: computed with the product.

    Returns:
        (tokens, out_features), float32.
    """
    isa = ops.BF16_ISAS.index(ops.bf16_isa)
    call = _Call(activations, out_features, **fused)
    call.allocate_scratch(ops.library.bf16_scratch_bytes(call.tokens, call.in_features, isa))
    ops.library.bf16_mm(call.arguments, packed_weight.data_ptr(), isa)
    return call.output


class _Call:
    """Arguments of one product, and the tensors that they point to."""

    def __init__(
        self,
        activations: torch.Tensor,
        out_features: int,
        *,
        has_output: bool = True,
        bias: torch.Tensor | None = None,
        norm: tuple[torch.Tensor, float] | None = None,
        silu_and_mul: bool = False,
        residual: torch.Tensor | None = None,
    ) -> None:
        activations = activations.contiguous()
        residual = None if residual is None else residual.contiguous()
        self.tokens, self.in_features = len(activations), activations.shape[1] // (2 if silu_and_mul else 1)
        self.output = torch.empty(self.tokens, out_features if has_output else 0, dtype=torch.float32)
        norm_weight, epsilon = norm or (None, 0.0)
        self._tensors: Any = (activations, norm_weight, bias, residual)
        self._struct = LinearArguments(
            activations.data_ptr(),
            _pointer(norm_weight),
            epsilon,
            silu_and_mul,
            _pointer(bias),
            _pointer(residual),
            self.output.data_ptr(),
            None,
            self.tokens,
            self.in_features,
            out_features,
            torch.get_num_threads(),
        )

    @property
    def arguments(self) -> Any:
        """Pointer to the arguments; valid as long as this object."""
        return ctypes.byref(self._struct)

    def allocate_scratch(self, size: int) -> None:
        """Allocate the kernel's working memory, in bytes."""
        self._scratch = torch.empty(size, dtype=torch.uint8)
        self._struct.scratch = self._scratch.data_ptr()


def _pack(weight: torch.Tensor, packed_bytes: Any, pack_weight: Any) -> torch.Tensor:
    """Pack weights by functions of the library."""
    packed_weight = torch.empty(packed_bytes(*weight.shape), dtype=torch.uint8)
    weight = weight.contiguous()
    pack_weight(weight.data_ptr(), packed_weight.data_ptr(), *weight.shape)
    return packed_weight


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
