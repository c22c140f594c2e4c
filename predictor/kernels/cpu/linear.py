"""Linear layers of a model, packed for CPU kernels.

Layers that read the same input, q/k/v or gate/up projections, are fused: few large kernels are faster than many small
ones.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from predictor.kernels import shards, tensor_parallel
from predictor.kernels.cpu import gemm
from predictor.kernels.cpu.composed_linear import ReorderedInputLinear, RowParallelLinear
from predictor.kernels.cpu.gemm import LinearKernel
from predictor.kernels.shards import Division
from snapshot_format import int4

FUSED_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling layers that read the same input, by their names in most architectures."""


class Int8Linear(nn.Module):
    """Linear layer with int8 weights as stored in a checkpoint; `pack_linear_layers` makes it computable.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        bias_dtype: None for a layer without a bias.
    """

    def __init__(self, in_features: int, out_features: int, bias_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        bias = None if bias_dtype is None else torch.empty(out_features, dtype=bias_dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


class Int4Linear(nn.Module):
    """Linear layer with 4-bit weights, packed by `int4.pack`; `pack_linear_layers` makes it computable.

    Args:
        in_features: size of an input; a multiple of `group_size`.
        out_features: size of an output.
        bias_dtype: None for a layer without a bias.
        group_size: inputs that share a scale.
        has_zero_points: whether each group has a zero point of its own; else it is 8.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_dtype: torch.dtype | None,
        *,
        group_size: int,
        has_zero_points: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups = in_features // group_size
        self.weight = nn.Parameter(torch.empty(out_features, in_features // 2, dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, groups, dtype=torch.float32), requires_grad=False)
        zero_point = torch.empty(out_features, groups, dtype=torch.uint8) if has_zero_points else None
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point, requires_grad=False)
        bias = None if bias_dtype is None else torch.empty(out_features, dtype=bias_dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.input_order: torch.Tensor | None = None
        """(in_features,): the input of each column of the weight; None if they are in order."""


_QUANTIZED = (Int8Linear, Int4Linear)


def pack_linear_layers(model: nn.Module, lm_head: nn.Module | None = None, *, quantize_lm_head: bool = False) -> None:
    """Replace the linear layers of `model` by packed ones in place, and free their weights.

    Args:
        model: on a CPU, with bfloat16 `nn.Linear` or `Int8Linear`; other layers are unchanged.
        lm_head: its layer that computes the logits.
        quantize_lm_head: quantize the weights of `lm_head` to int8.
    """
    divisions = shards.divisions(model)

    def replace(parent: nn.Module, names: tuple[str, ...]) -> None:
        layers = [parent.get_submodule(name) for name in names]
        is_lm_head = layers == [lm_head]
        division = shards.common(divisions, layers)
        kernel = fuse_linears(layers, division, quantize=is_lm_head and quantize_lm_head)
        if kernel is not None:
            sizes = [len(shards.local(layer.weight)) for layer in layers]
            for index, name in enumerate(names):
                packed: nn.Module = LMHead(kernel) if is_lm_head else FusedLinearSlice(kernel, sizes, index)
                if division is Division.GATHERED_OUTPUTS:
                    packed = GatheredOutputs(packed, layers[index].out_features)
                parent.register_module(name, packed)

    modules = list(model.modules())
    gemm.map_in_threads(replace, [(parent, names) for parent in modules for names in _fusion_groups(parent)])


def _fusion_groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the names of linear children, grouped into those that are fused."""
    linears = {name: child for name, child in parent.named_children() if isinstance(child, (nn.Linear, *_QUANTIZED))}
    for names in FUSED_PROJECTIONS:
        if all(name in linears for name in names) and len({_signature(linears[name]) for name in names}) == 1:
            for name in names:
                del linears[name]
            yield names
    yield from ((name,) for name in linears)


def fuse_linears(
    layers: Sequence[nn.Module], division: Division = Division.NONE, *, quantize: bool = False
) -> LinearKernel | None:
    """Pack layers that read the same input into one kernel with concatenated outputs.

    Args:
        layers: equal but for `out_features`.
        division: of all layers. If the outputs are divided, the kernel computes this rank's.
        quantize: quantize their weights to int8 first.

    Returns:
        None if no kernel supports the layers.
    """
    first = layers[0]
    signatures = {_signature(layer) for layer in layers}
    if len(signatures) > 1 or type(first) not in (nn.Linear, *_QUANTIZED) or first.weight.device.type != "cpu":
        return None
    if division is Division.OTHER:
        return None
    bias = None if first.bias is None else torch.cat([shards.local(layer.bias) for layer in layers])
    if division in (Division.INPUTS, Division.SPLIT_INPUTS):
        kernel = _pack(layers, None, quantize=quantize)
        return kernel and RowParallelLinear(kernel, bias, splits_input=division is Division.SPLIT_INPUTS)
    return _pack(layers, bias, quantize=quantize)


def _signature(layer: nn.Module) -> tuple[object, ...]:
    """Return what is equal in layers that can be fused."""
    signature = type(layer), layer.in_features, layer.bias is None, layer.weight.dtype
    if not isinstance(layer, Int4Linear):
        return signature
    order = None if layer.input_order is None else tuple(layer.input_order.tolist())
    return *signature, layer.group_size, layer.zero_point is None, order


def _pack(layers: Sequence[nn.Module], bias: torch.Tensor | None, *, quantize: bool) -> LinearKernel | None:
    """Pack this rank's part of the layers' weights."""
    first = layers[0]
    if isinstance(first, Int4Linear):
        return _pack_int4(layers, bias)
    weights: list[torch.Tensor] = [shards.local(layer.weight) for layer in layers]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    if isinstance(first, Int8Linear) or quantize:
        # `weights` is deleted before packing: another copy of a vocabulary-wide matrix would set the peak memory.
        if quantize:
            weight, scale = gemm.quantize_per_channel_int8(weight)
        else:
            scale = torch.cat([shards.local(layer.scale) for layer in layers])
        del weights
        return gemm.make_int8_linear(weight, scale, bias)
    return gemm.make_bf16_linear(weight, bias) if weight.dtype == torch.bfloat16 else None


def _pack_int4(layers: Sequence[Any], bias: torch.Tensor | None) -> LinearKernel:
    first = layers[0]
    kernel = gemm.make_int4_linear(
        int4.unpack(torch.cat([layer.weight for layer in layers])),
        torch.cat([layer.scale for layer in layers]),
        None if first.zero_point is None else torch.cat([layer.zero_point for layer in layers]),
        first.group_size,
        bias,
    )
    return kernel if first.input_order is None else ReorderedInputLinear(kernel, first.input_order)


class FusedLinearSlice(nn.Module):
    """One layer of those that a kernel computes together: a slice of the kernel's output."""

    def __init__(self, kernel: LinearKernel, sizes: Sequence[int], index: int) -> None:
        super().__init__()
        self.out_features = sizes[index]
        self._kernel = kernel
        self._offset = sum(sizes[:index])
        self._is_whole = len(sizes) == 1

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        if self._is_whole:
            return self._kernel(inputs)
        return self._kernel.forward_cached(inputs).narrow(-1, self._offset, self.out_features)


class GatheredOutputs(nn.Module):
    """Layer of which each tensor-parallel rank computes some outputs and gets all."""

    def __init__(self, layer: nn.Module, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self._layer = layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        return tensor_parallel.all_gather(self._layer(inputs), self.out_features)


class LMHead(nn.Module):
    """Output layer. Logits stay float32 for the sampler.

    Args:
        kernel: of the layer.
    """

    def __init__(self, kernel: LinearKernel) -> None:
        super().__init__()
        self._kernel = kernel
        self._num_candidates: int | None = None
        self._largest = torch.empty(0, dtype=torch.long)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., vocabulary), float32."""
        if self._num_candidates is None:
            return self._kernel(inputs.float())
        self._largest = self._kernel.argmax(inputs.float().flatten(0, -2), self._num_candidates)
        return inputs

    def largest(self, compute: Callable[[], Any], num_candidates: int) -> torch.Tensor:
        """Return the token of the largest logit of each input, (inputs,), int64, as `argmax` of the logits.

        No other thread may call the layer meanwhile.

        Args:
            compute: calls the layer once. The results of this call are not logits.
            num_candidates: number of tokens to choose from, the first ones.
        """
        self._num_candidates = num_candidates
        try:
            compute()
        finally:
            self._num_candidates = None
        return self._largest
