"""Linear layers for a CPU: those of a model become ones whose products have a kernel.

Layers that read the same input, the projections to queries, keys and values or to gate and up, are computed at once:
few large kernels are faster than many small ones.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from predictor.kernels.cpu import gemm
from predictor.kernels.cpu.gemm import Kernel

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that read the same input, in most architectures."""


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


def pack(model: nn.Module, round_too: nn.Module | None = None) -> None:
    """Make the linear layers of `model` ready to compute on a CPU, in place; their plain weights are let go.

    Args:
        model: on a CPU, with `nn.Linear` in bfloat16 or `Int8Linear`; other layers are left as they are.
        round_too: the `nn.Linear` of it that makes the logits, to round it to int8, too.
    """

    def put(parent: nn.Module, names: tuple[str, ...]) -> None:
        layers = [parent.get_submodule(name) for name in names]
        is_head = layers == [round_too]
        kernel = join(layers, int8=is_head)
        if kernel is not None:
            sizes = [layer.out_features for layer in layers]
            for place, name in enumerate(names):
                packed: nn.Module = _Head(kernel) if is_head else _Packed(kernel, sizes, place)
                parent.register_module(name, packed)

    gemm.on_all_cores(put, [(parent, names) for parent in list(model.modules()) for names in _groups(parent)])


def _groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names of children, those that are computed at once together."""
    linear = {name: child for name, child in parent.named_children() if isinstance(child, (nn.Linear, Int8Linear))}
    for names in TOGETHER:
        if all(name in linear for name in names) and len({type(linear[name]) for name in names}) == 1:
            for name in names:
                del linear[name]
            yield names
    yield from ((name,) for name in linear)


def join(layers: Sequence[nn.Module], *, int8: bool = False) -> Kernel | None:
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
            weight, scale = gemm.to_int8(weight)
        else:
            scale = torch.cat([layer.scale.detach() for layer in layers])
        del weights
        return gemm.of_int8(weight, scale, bias)
    return gemm.of_bfloat16(weight, bias) if weight.dtype == torch.bfloat16 else None


class _Packed(nn.Module):  # type: ignore[misc]
    """One of the layers that a kernel computes at once."""

    def __init__(self, kernel: Kernel, sizes: Sequence[int], place: int) -> None:
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


class _Head(nn.Module):  # type: ignore[misc]
    """The layer that makes the logits. Its kernel makes float32, and that is what chooses tokens wants."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs) in float32."""
        return self._kernel(inputs.float())
