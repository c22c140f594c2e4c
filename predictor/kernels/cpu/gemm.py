"""Linear kernels for a CPU, with weights prepacked in the kernel's layout.

    bfloat16  `gemm_bf16.c` where the CPU has AVX-512; else oneDNN's blocked layout
    int8      `gemm_int8.c` where the CPU has AMX or AVX-512 VNNI, with 8-bit activations;
              else fbgemm, with 8-bit activations where the CPU has VNNI and 7-bit ones elsewhere
    int4      `gemm_int4.c` where the CPU has AMX or AVX-512 VNNI, with 8-bit activations; else as int8

int8 weights have one scale per output channel, int4 weights one per group of input features, activations one per token.
Integer sums are exact, so a token's result is bit-identical in any batch. `torch.ops.quantized.linear_dynamic` would
use one activation scale for the whole batch.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Unpack

import torch
from torch import nn

from predictor.kernels import tensor_parallel
from predictor.kernels.cpu import gemm_ops, ops, torch_private
from predictor.kernels.cpu.gemm_ops import Fused, Int4Weight
from snapshot_format.recipe import MIN_SCALE

QUANTIZE_CHUNK_ROWS = 4096
PACK_CHUNK_ROWS = 16384
"""fbgemm packs a vocabulary-wide matrix four times slower in one piece: in one thread, uncached."""
_ACTIVATION_BITS = 8 if torch.cpu.get_capabilities().get("avx512_vnni") else 7
"""Without VNNI, fbgemm adds two products in 16 bits: 8 by 8 bits would saturate, 7 by 8 fit."""
_ACTIVATION_ZERO_POINT = 2 ** (_ACTIVATION_BITS - 1)
_ACTIVATION_SCALE = 1 / (_ACTIVATION_ZERO_POINT - 1)
"""Maps a token divided by its largest magnitude, -1..1, to unsigned bytes, 1..255 or 1..127."""

INT4_GROUP_SIZES = (32, 64, 128)
_SYMMETRIC_ZERO_POINT = 8


def has_int8() -> bool:
    """Whether this CPU has int8 kernels."""
    return ops.cpu_isa is not None or torch_private.supports_fbgemm()


def int8_backend() -> str:
    """Name of the int8 kernels in use: `amx`, `avx512_vnni` or `fbgemm`."""
    return ops.cpu_isa or "fbgemm"


def quantize_per_channel_int8(
    weight: torch.Tensor, *, has_part_of_rows: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weights (out_features, in_features) to int8; also return the float32 scales (out_features,).

    `has_part_of_rows`: each tensor-parallel rank has some columns; the scales are those of the whole rows.
    """
    qweight = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), QUANTIZE_CHUNK_ROWS):  # Chunks bound the size of the float32 copies.
        rows = slice(start, start + QUANTIZE_CHUNK_ROWS)
        largest = weight[rows].abs().amax(dim=1).float()
        if has_part_of_rows:
            largest = tensor_parallel.all_reduce_max(largest)
        scale[rows] = largest.clamp(min=MIN_SCALE) / 127
        qweight[rows] = (weight[rows] / scale[rows, None]).round_()
    return qweight, scale


def map_in_threads(fn: Callable[..., Any], args: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call `fn` with each tuple of arguments in a thread pool; packing is single-threaded and releases the GIL.

    Threads are short-lived: each thread that runs OpenMP code keeps its own worker team, and oversubscription slows
    all of them. A single call runs in the calling thread.
    """

    def call_and_trim(arguments: tuple[Any, ...]) -> Any:
        result = fn(*arguments)
        _malloc_trim()
        return result

    with torch_private.ignore_deprecated_quantization():
        if len(args) == 1:
            return [fn(*args[0])]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(call_and_trim, args))


def _malloc_trim() -> None:
    """Return freed memory to the kernel; glibc's per-thread arenas would keep a second copy of all weights."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class RMSNorm:
    """Root-mean-square norm: a weight per feature and a factor per token."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self.weight, self.epsilon = weight.detach().float().contiguous(), epsilon
        self._epsilon = torch.tensor(epsilon)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize float32, (..., features) to the same."""
        return (hidden_states * self.inverse_rms(hidden_states)).mul_(self.weight)

    def apply_(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize float32 in place, (..., features)."""
        return hidden_states.mul_(self.inverse_rms(hidden_states)).mul_(self.weight)

    def inverse_rms(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute 1 / sqrt(mean(x^2) + epsilon), (..., features) to (..., 1)."""
        l2_norm = torch.linalg.vector_norm(hidden_states, 2, -1, keepdim=True)
        mean_factor = 1 / hidden_states.shape[-1]
        return torch.addcmul(self._epsilon, l2_norm, l2_norm, value=mean_factor).rsqrt_()


class LinearKernel(ABC):
    """Linear layer with prepacked weights and an optional bias."""

    def __init__(self) -> None:
        self._cached_input: torch.Tensor | None = None
        self._cached_output: torch.Tensor | None = None

    def forward_cached(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `self(inputs)`, from the cache if the last call had the same tensor.

        q/k/v and gate/up projections are called one after the other with the same input.
        """
        if self._cached_output is None or self._cached_input is not inputs:
            self._cached_input, self._cached_output = inputs, self(inputs)
        return self._cached_output

    @abstractmethod
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), in the dtype of the inputs."""

    @abstractmethod
    def forward(
        self, hidden_states: torch.Tensor, norm: RMSNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply the layer to (tokens, in_features), float32; return (tokens, out_features), float32.

        Args:
            hidden_states: the inputs.
            norm: applied to the inputs.
            residual: added to the outputs, (tokens, out_features).
        """

    def silu_and_mul(self, gate_up: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the layer to silu(gate) * up; `gate_up` is (tokens, 2 x in_features) and is overwritten."""
        gate, up = gate_up.chunk(2, -1)
        return self.forward(nn.functional.silu(gate).mul_(up), residual=residual)

    def argmax(self, hidden_states: torch.Tensor, num_outputs: int) -> torch.Tensor:
        """Return which of the first `num_outputs` outputs is the largest, the first of equal ones.

        (tokens, in_features), float32, to (tokens,), int64.
        """
        return self.forward(hidden_states)[:, :num_outputs].argmax(-1)


class OneDNNBf16Linear(LinearKernel):
    """bfloat16 weights, multiplied by oneDNN."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = torch_private.onednn_pack_weight(weight), bias

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), in the dtype of the inputs."""
        outputs = torch_private.onednn_linear(inputs.to(torch.bfloat16), self._weight, self._bias)
        return outputs.to(inputs.dtype)

    def forward(
        self, hidden_states: torch.Tensor, norm: RMSNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply the layer in bfloat16; norm and residual in float32."""
        if norm is not None:
            hidden_states = hidden_states * norm.weight * norm.inverse_rms(hidden_states)
        outputs = self(hidden_states)
        return outputs if residual is None else outputs.add_(residual)


class Float32InputLinear(LinearKernel):
    """Linear kernel whose `forward` is the general case; `__call__` converts to float32 and back."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), in the dtype of the inputs."""
        outputs = self.forward(inputs.float().reshape(-1, inputs.shape[-1])).to(inputs.dtype)
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


class NativeLinear(Float32InputLinear):
    """Linear kernel in C, with norm, activation and residual in the same call."""

    def __init__(self, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._bias = None if bias is None else bias.float()

    def forward(
        self, hidden_states: torch.Tensor, norm: RMSNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply norm, layer and residual."""
        norm_arguments = None if norm is None else (norm.weight, norm.epsilon)
        return self._multiply(hidden_states, bias=self._bias, norm=norm_arguments, residual=residual)

    def silu_and_mul(self, gate_up: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Apply activation, layer and residual; `gate_up` may be overwritten."""
        return self._multiply(gate_up, bias=self._bias, silu_and_mul=True, residual=residual)

    @abstractmethod
    def _multiply(self, activations: torch.Tensor, **fused: Unpack[Fused]) -> torch.Tensor:
        """Multiply by the packed weights."""


class NativeBf16Linear(NativeLinear):
    """bfloat16 weights, multiplied by `gemm_bf16.c`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(bias)
        self._weight, self._out_features = gemm_ops.bf16_pack_weight(weight), len(weight)

    def _multiply(self, activations: torch.Tensor, **fused: Unpack[Fused]) -> torch.Tensor:
        return gemm_ops.bf16_mm(activations, self._weight, self._out_features, **fused)


class NativeInt8Linear(NativeLinear):
    """int8 weights, multiplied by `gemm_int8.c`."""

    def __init__(self, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(bias)
        self._weight, self._scale = gemm_ops.int8_pack_weight(qweight), scale.float().contiguous()

    def argmax(self, hidden_states: torch.Tensor, num_outputs: int) -> torch.Tensor:
        """Find the largest outputs without writing all of them."""
        num_outputs = min(num_outputs, len(self._scale))
        return gemm_ops.int8_argmax(hidden_states, self._weight, self._scale, num_outputs, self._bias)

    def _multiply(self, activations: torch.Tensor, **fused: Unpack[Fused]) -> torch.Tensor:
        return gemm_ops.int8_scaled_mm(activations, self._weight, self._scale, **fused)


class NativeInt4Linear(NativeLinear):
    """int4 weights, multiplied by `gemm_int4.c`."""

    def __init__(self, weight: Int4Weight, bias: torch.Tensor | None) -> None:
        super().__init__(bias)
        self._weight = weight

    def _multiply(self, activations: torch.Tensor, **fused: Unpack[Fused]) -> torch.Tensor:
        return gemm_ops.int4_scaled_mm(activations, self._weight, **fused)


class FbgemmInt8Linear(Float32InputLinear):
    """int8 weights, multiplied by fbgemm."""

    def __init__(self, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        chunks = -(-len(scale) // PACK_CHUNK_ROWS)
        pairs = list(zip(qweight.chunk(chunks), scale.chunk(chunks), strict=True))
        self._weights = map_in_threads(torch_private.fbgemm_pack_weight, pairs)
        self._bias = None if bias is None else bias.float()

    def forward(
        self, hidden_states: torch.Tensor, norm: RMSNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply the layer; RMSNorm's factor per token joins the activation scale."""
        # `amax(abs)`, because `vector_norm` of infinite order is far slower.
        inputs = hidden_states if norm is None else hidden_states * norm.weight
        abs_max = inputs.abs().amax(-1, keepdim=True).clamp_(min=MIN_SCALE)
        outputs = self._multiply(inputs / abs_max)
        scale = abs_max if norm is None else abs_max.mul_(norm.inverse_rms(hidden_states))
        if residual is not None:
            outputs = torch.addcmul(residual, outputs, scale)
            return outputs if self._bias is None else outputs.add_(self._bias)
        return outputs.mul_(scale) if self._bias is None else torch.addcmul(self._bias, outputs, scale)

    def _multiply(self, normalized: torch.Tensor) -> torch.Tensor:
        """Multiply tokens within -1..1 by the weights."""
        outputs = [
            torch_private.fbgemm_linear(normalized, _ACTIVATION_SCALE, _ACTIVATION_ZERO_POINT, weight)
            for weight in self._weights
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def make_bf16_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel | None:
    """Pack bfloat16 weights (out_features, in_features); None if this CPU has no bfloat16 kernel."""
    if ops.bf16_isa is not None:
        return NativeBf16Linear(weight, bias)
    return OneDNNBf16Linear(weight, bias) if torch_private.supports_onednn_bf16() else None


def make_int8_linear(qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel:
    """Pack weights and scales of `quantize_per_channel_int8`."""
    return (FbgemmInt8Linear if ops.cpu_isa is None else NativeInt8Linear)(qweight, scale, bias)


def make_int4_linear(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> LinearKernel:
    """Pack int4 weights, each worth (qweight - zero_point) * scale.

    Without AVX-512 VNNI the weights are quantized again, to int8: dequantized ones would take the memory of an
    unquantized model, or be computed anew at every step. That changes them by far less than 4 bits did.

    Args:
        qweight: (out_features, in_features), uint8, 0 to 15.
        scale: (out_features, groups), float32, of groups of `group_size` input features. The last may be shorter.
        zero_point: (out_features, groups), uint8, 0 to 15; None: 8.
        group_size: 32, 64 or 128.
        bias: (out_features,), or None.

    Raises:
        ValueError: the group size is not supported, or the scales are not those of its groups.
    """
    out_features, in_features = qweight.shape
    shape = (out_features, -(-in_features // group_size))
    if group_size not in INT4_GROUP_SIZES or scale.shape != shape:
        raise ValueError(
            f"int4 weights of {shape[0]} x {in_features} in groups of {group_size} with scales {tuple(scale.shape)}: "
            f"groups have {', '.join(map(str, INT4_GROUP_SIZES))} weights of an output, each group a scale"
        )
    if ops.cpu_isa is not None:
        return NativeInt4Linear(gemm_ops.int4_pack_weight(qweight, scale, zero_point, group_size), bias)
    return FbgemmInt8Linear(*quantize_per_channel_int8(dequantize_int4(qweight, scale, zero_point, group_size)), bias)


def dequantize_int4(
    qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """Return float32 weights (out_features, in_features); arguments as those of `make_int4_linear`."""
    expanded = [
        each if isinstance(each, int) else each.repeat_interleave(group_size, 1)[:, : qweight.shape[1]]
        for each in (_SYMMETRIC_ZERO_POINT if zero_point is None else zero_point.float(), scale)
    ]
    return (qweight.float() - expanded[0]) * expanded[1]
