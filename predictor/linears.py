"""Linear layers for a CPU: weights in the order in which its kernels read them, in bfloat16 or as int8.

    bfloat16  onednn's blocked order, found once and not at every call
    int8      fbgemm: weights with a scale for each output, activations with a scale for each token; these have 8 bits
              where the CPU has AVX-512 VNNI, else 7

An activation's scale is its token's own and sums of integers are exact, so that a token's result is bit by bit the same
whoever else is in the batch. `torch.ops.quantized.linear_dynamic` would take one scale for all of them.

Layers that read the same input, the projections to queries, keys and values or to gate and up, are computed at once:
few large kernels are faster than many small ones.
"""

import ctypes
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that read the same input, in most architectures."""

_ENGINE = "fbgemm"
_SMALLEST = 1e-30
"""Instead of a scale of zero, for a token of nothing but zeros."""
_ROUNDED_AT_ONCE = 4096
"""Outputs."""
_PACKED_AT_ONCE = 16384
"""Outputs. A vocabulary's width in one piece takes four times as long: one thread, and nothing stays in its cache."""
_ACTIVATION_BITS = 8 if torch.cpu.get_capabilities().get("avx512_vnni") else 7
"""Without that instruction fbgemm adds two products in 16 bits: 8 by 8 bits would be cut off there, 7 by 8 fit."""
_ACTIVATION_ZERO = 2 ** (_ACTIVATION_BITS - 1)
_ACTIVATION_STEP = 1 / (_ACTIVATION_ZERO - 1)
"""A token over its largest number is in -1..1; as an unsigned byte, 1..255 or 1..127."""


class Int8Linear(nn.Module):  # type: ignore[misc]
    """The weights of a linear layer as int8, as they lie in memory or in a file; `pack` makes them ready to compute.

    Args:
        inputs: size of an input.
        outputs: size of an output.
        bias: of which format it is, or None.
    """

    def __init__(self, inputs: int, outputs: int, bias: torch.dtype | None) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(outputs, dtype=torch.float32), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(torch.empty(outputs, dtype=bias), requires_grad=False)


def has_int8() -> bool:
    """Whether this CPU has the kernels: x86 with AVX2, as torch is built."""
    return _ENGINE in torch.backends.quantized.supported_engines


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights (outputs, inputs) to int8, with a scale (outputs,) in float32 for each output."""
    rounded = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), _ROUNDED_AT_ONCE):  # of a vocabulary's width, float32 copies would be large
        part = slice(start, start + _ROUNDED_AT_ONCE)
        scale[part] = weight[part].abs().amax(dim=1).float().clamp(min=_SMALLEST) / 127
        rounded[part] = (weight[part] / scale[part, None]).round_()
    return rounded, scale


def pack(model: nn.Module, round_too: nn.Module | None = None) -> None:
    """Make the linear layers of `model` ready to compute on a CPU, in place; their plain weights are let go.

    Args:
        model: on a CPU, with `nn.Linear` in bfloat16 or `Int8Linear`; other layers are left as they are.
        round_too: an `nn.Linear` of it to round to int8: the one that makes the logits, say.
    """

    def put(parent: nn.Module, names: tuple[str, ...]) -> None:
        layers = [parent.get_submodule(name) for name in names]
        kernel = join(layers, int8=layers == [round_too])
        if kernel is not None:
            sizes = [layer.out_features for layer in layers]
            for place, name in enumerate(names):
                parent.register_module(name, _Packed(kernel, sizes, place))

    on_all_cores(put, [(parent, names) for parent in list(model.modules()) for names in _groups(parent)])


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


def _groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names of children, those that are computed at once together."""
    linear = {name: child for name, child in parent.named_children() if isinstance(child, (nn.Linear, Int8Linear))}
    for names in TOGETHER:
        if all(name in linear for name in names) and len({type(linear[name]) for name in names}) == 1:
            for name in names:
                del linear[name]
            yield names
    yield from ((name,) for name in linear)


def join(layers: Sequence[nn.Module], *, int8: bool = False) -> "Kernel | None":
    """One kernel for layers that read the same input, their outputs side by side; None if there is none for them.

    Args:
        layers: alike, but for the number of outputs.
        int8: round them first.
    """
    first = layers[0]
    alike = {(type(layer), layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}
    if len(alike) > 1 or type(first) not in (nn.Linear, Int8Linear) or first.weight.device.type != "cpu":
        return None
    weights: list[torch.Tensor] = [layer.weight.detach() for layer in layers]
    bias = None if first.bias is None else torch.cat([layer.bias.detach() for layer in layers])
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    if isinstance(first, Int8Linear) or int8:
        # Not one function of another: of a vocabulary's width, a copy more would be the most memory that a load takes.
        if int8:
            weight, scale = to_int8(weight)
        else:
            scale = torch.cat([layer.scale.detach() for layer in layers])
        parts = -(-len(scale) // _PACKED_AT_ONCE)
        del weights
        return _Int8(on_all_cores(_prepack, list(zip(weight.chunk(parts), scale.chunk(parts), strict=True))), bias)
    return _Bfloat16(weight, bias) if weight.dtype == torch.bfloat16 and _has_bfloat16_kernels() else None


def _prepack(weight: torch.Tensor, scale: torch.Tensor) -> Any:
    """int8 weights (outputs, inputs) in the order in which fbgemm reads them."""
    torch.backends.quantized.engine = _ENGINE
    zero = torch.zeros(len(scale), dtype=torch.long)
    quantized = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zero, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def _has_bfloat16_kernels() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Packed(nn.Module):  # type: ignore[misc]
    """One of the layers that a kernel computes at once."""

    def __init__(self, kernel: Any, sizes: Sequence[int], place: int) -> None:
        super().__init__()
        self.out_features = sizes[place]
        self._kernel = kernel
        self._from = sum(sizes[:place])
        self._alone = len(sizes) == 1

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs)."""
        if self._alone:
            return self._kernel(inputs)
        return self._kernel.shared(inputs).narrow(-1, self._from, self.out_features)


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
    def rows(
        self, rows: torch.Tensor, gain: torch.Tensor | None = None, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(tokens, inputs) to (tokens, outputs), both float32.

        Args:
            rows: the inputs.
            gain: by which each token is multiplied first, (tokens, 1).
            onto: what the product is added to, (tokens, outputs).
        """


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

    def rows(
        self, rows: torch.Tensor, gain: torch.Tensor | None = None, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        outputs = self(rows if gain is None else rows * gain)
        return outputs if onto is None else outputs.add_(onto)


class _Int8(Kernel):
    def __init__(self, parts: Sequence[Any], bias: torch.Tensor | None) -> None:
        super().__init__()
        self._parts = parts
        self._bias = None if bias is None else bias.float()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.rows(inputs.float()).to(inputs.dtype)

    def rows(
        self, rows: torch.Tensor, gain: torch.Tensor | None = None, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        # A token's gain changes nothing of its rounding, so that it joins the scale. `vector_norm` takes far longer.
        largest = rows.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST)
        outputs = self._product(rows / largest)
        scale = largest if gain is None else largest.mul_(gain)
        if onto is not None:
            outputs = torch.addcmul(onto, outputs, scale)
            return outputs if self._bias is None else outputs.add_(self._bias)
        return outputs.mul_(scale) if self._bias is None else torch.addcmul(self._bias, outputs, scale)

    def _product(self, unit: torch.Tensor) -> torch.Tensor:
        """Of tokens in -1..1."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        outputs = [product(unit, _ACTIVATION_STEP, _ACTIVATION_ZERO, part) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
