"""Matrix products on a CPU: weights in the order in which their kernel reads them, in bfloat16 or as int8.

    bfloat16  onednn's blocked order, found once and not at every call
    int8      our own `int8.c` where the CPU has AMX or AVX-512 VNNI: activations of 8 bits
              else fbgemm: activations of 8 bits with VNNI, of 7 without

int8 weights have a scale for each output, activations one for each token. That is the token's own and sums of integers
are exact, so that a token's result is bit by bit the same whoever else is in the batch.
`torch.ops.quantized.linear_dynamic` would take one scale for all of them.
"""

import ctypes
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from predictor.kernels.cpu import ops

_ENGINE = "fbgemm"
_SMALLEST = 1e-30
"""Instead of a scale of zero, for a token of nothing but zeros."""
_ROUNDED_AT_ONCE = 4096
"""Outputs."""
_PACKED_AT_ONCE = 16384
"""Outputs. A vocabulary's width in one piece takes fbgemm four times as long: by one thread, uncached."""
_ACTIVATION_BITS = 8 if torch.cpu.get_capabilities().get("avx512_vnni") else 7
"""Without that instruction fbgemm adds two products in 16 bits: 8 by 8 bits would be cut off there, 7 by 8 fit."""
_ACTIVATION_ZERO = 2 ** (_ACTIVATION_BITS - 1)
_ACTIVATION_STEP = 1 / (_ACTIVATION_ZERO - 1)
"""A token over its largest number is in -1..1; as an unsigned byte, 1..255 or 1..127."""


def has_int8() -> bool:
    """Whether this CPU has kernels for int8: x86 with AVX2, as torch is built."""
    return ops.level is not None or _ENGINE in torch.backends.quantized.supported_engines


def int8_by() -> str:
    """What computes int8 here."""
    return ops.level or _ENGINE


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights (outputs, inputs) to int8, with a scale (outputs,) in float32 for each output."""
    rounded = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), _ROUNDED_AT_ONCE):  # of a vocabulary's width, float32 copies would be large
        part = slice(start, start + _ROUNDED_AT_ONCE)
        scale[part] = weight[part].abs().amax(dim=1).float().clamp(min=_SMALLEST) / 127
        rounded[part] = (weight[part] / scale[part, None]).round_()
    return rounded, scale


def on_all_cores(build: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What `build` makes of each: a kernel orders its weights in one thread, without Python's lock.

    In threads that end: each that computes has a team of OpenMP's, and where those are more than cores, all are slow.
    What is alone is built in the thread that asks.
    """

    def build_and_trim(arguments: tuple[Any, ...]) -> Any:
        built = build(*arguments)
        _give_back()
        return built

    with warnings.catch_warnings():
        # That quantized tensors will go one day; they are the only way to fbgemm's order of weights.
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        if len(given) == 1:
            return [build(*given[0])]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(build_and_trim, given))


def _give_back() -> None:
    """Return freed memory to the kernel. glibc keeps it for each thread by itself: a second copy of all weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Norm:
    """A root-mean-square norm: a weight for each feature, and a gain for each token."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self.weight, self.epsilon = weight.detach().float().contiguous(), epsilon
        self._epsilon = torch.tensor(epsilon)

    def gain(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, features) to (…, 1)."""
        length = torch.linalg.vector_norm(rows, 2, -1, keepdim=True)
        return torch.addcmul(self._epsilon, length, length, value=1 / rows.shape[-1]).rsqrt_()


class Kernel(ABC):
    """A matrix product with weights in the order in which it reads them, and a bias where the layers have one."""

    def __init__(self) -> None:
        # The neighbours ask for the same one after the other.
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def shared(self, inputs: torch.Tensor) -> torch.Tensor:
        """`self(inputs)`, or what came of it the last time if the input is the last one."""
        if self._output is None or self._input is not inputs:
            self._input, self._output = inputs, self(inputs)
        return self._output

    @abstractmethod
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs), in the format of the inputs."""

    @abstractmethod
    def rows(self, rows: torch.Tensor, norm: Norm | None = None, onto: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens, inputs) to (tokens, outputs), both float32.

        Args:
            rows: the inputs.
            norm: of each token, to be computed first.
            onto: what the product is added to, (tokens, outputs).
        """

    def gated(self, rows: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        """The same of silu(gate) * up; rows are (tokens, 2 x inputs), gate and up side by side, and are overwritten."""
        gate, up = rows.chunk(2, -1)
        return self.rows(nn.functional.silu(gate).mul_(up), onto=onto)


class _Bfloat16(Kernel):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self._bias = bias

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = torch.ops.mkldnn._linear_pointwise(
            inputs.to(torch.bfloat16), self._weight, self._bias, "none", [], ""
        )
        return outputs.to(inputs.dtype)

    def rows(self, rows: torch.Tensor, norm: Norm | None = None, onto: torch.Tensor | None = None) -> torch.Tensor:
        outputs = self(rows if norm is None else rows * norm.weight * norm.gain(rows))
        return outputs if onto is None else outputs.add_(onto)


class _OnFloat32(Kernel):
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.rows(inputs.float().reshape(-1, inputs.shape[-1])).to(inputs.dtype)
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


class _Int8(_OnFloat32):
    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._weight, self._scale = ops.pack(weight), scale.float().contiguous()
        self._bias = None if bias is None else bias.float()

    def rows(self, rows: torch.Tensor, norm: Norm | None = None, onto: torch.Tensor | None = None) -> torch.Tensor:
        first = None if norm is None else (norm.weight, norm.epsilon)
        return ops.product(rows, self._weight, self._scale, bias=self._bias, norm=first, onto=onto)

    def gated(self, rows: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        return ops.product(rows, self._weight, self._scale, bias=self._bias, gated=True, onto=onto)


class _Fbgemm(_OnFloat32):
    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        parts = -(-len(scale) // _PACKED_AT_ONCE)
        self._parts = on_all_cores(_prepack, list(zip(weight.chunk(parts), scale.chunk(parts), strict=True)))
        self._bias = None if bias is None else bias.float()

    def rows(self, rows: torch.Tensor, norm: Norm | None = None, onto: torch.Tensor | None = None) -> torch.Tensor:
        # A token's gain changes nothing of its rounding, so that it joins the scale. `vector_norm` takes far longer.
        inputs = rows if norm is None else rows * norm.weight
        largest = inputs.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST)
        outputs = self._product(inputs / largest)
        scale = largest if norm is None else largest.mul_(norm.gain(rows))
        if onto is not None:
            outputs = torch.addcmul(onto, outputs, scale)
            return outputs if self._bias is None else outputs.add_(self._bias)
        return outputs.mul_(scale) if self._bias is None else torch.addcmul(self._bias, outputs, scale)

    def _product(self, unit: torch.Tensor) -> torch.Tensor:
        """Of tokens in -1..1."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        outputs = [product(unit, _ACTIVATION_STEP, _ACTIVATION_ZERO, part) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _prepack(weight: torch.Tensor, scale: torch.Tensor) -> Any:
    """int8 weights (outputs, inputs) in the order in which fbgemm reads them."""
    torch.backends.quantized.engine = _ENGINE
    zero = torch.zeros(len(scale), dtype=torch.long)
    quantized = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zero, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def of_bfloat16(weight: torch.Tensor, bias: torch.Tensor | None) -> Kernel | None:
    """For weights (outputs, inputs) in bfloat16; None where this CPU has none."""
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _Bfloat16(weight, bias) if has else None


def of_int8(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Kernel:
    """For int8 weights (outputs, inputs) with a scale (outputs,) for each output, as `to_int8` made them."""
    return (_Fbgemm if ops.level is None else _Int8)(weight, scale, bias)
