"""What the tests of matrix products in C share: the kernels that a test runs with, random operands, int8 layers."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from predictor.kernels.cpu import gemm
from predictor.kernels.cpu.linear import Int8Linear

each_form = pytest.mark.parametrize("form", ["plain", "norm", "silu_and_mul"])

Test = TypeVar("Test", bound=Callable[..., None])


def by(fixture: str, *names: str) -> Callable[[Test], Test]:
    """Run the test with each of these kernels that the machine has, AMX emulated if need be.

    Args:
        fixture: that selects one, `int8_kernel` or `bf16_kernel`.
        names: of instruction sets.
    """
    selected = pytest.mark.parametrize(fixture, names, indirect=True)
    return lambda test: pytest.mark.usefixtures(fixture)(selected(test))


class Operands:
    """Random activations, `rows`, options of a product for a form, `more`, and what may be added to its outputs."""

    def __init__(self, tokens: int, inputs: int, outputs: int, form: str) -> None:
        self.rows = torch.randn(tokens, inputs * (2 if form == "silu_and_mul" else 1)) * (torch.rand(tokens, 1) * 10)
        forms: dict[str, dict[str, Any]] = {
            "plain": {},
            "norm": {"norm": (torch.rand(inputs) + 0.5, 0.5)},
            "silu_and_mul": {"silu_and_mul": True},
        }
        self.more = forms[form]
        self.bias = torch.randn(outputs)
        self.residual = torch.randn(tokens, outputs)


def quantized_product(
    rows: torch.Tensor, weight: torch.Tensor, norm: tuple[torch.Tensor, float] | None = None
) -> torch.Tensor:
    """Compute in float64 with activations that are quantized to int8 in float32.

    Args:
        rows: (tokens, inputs).
        weight: (outputs, inputs), float64.
        norm: RMSNorm's weight and epsilon.
    """
    gain = torch.ones(len(rows), 1, dtype=torch.float64)
    if norm is not None:
        gain = (rows.double().square().mean(-1, keepdim=True) + norm[1]).rsqrt()
        rows = rows * norm[0]
    largest = rows.abs().amax(-1, keepdim=True)
    rounded = (rows * (torch.tensor(127.0) / largest)).round().double()  # `127 / tensor` would round twice
    return (rounded @ weight.T) * (largest.double() / 127) * gain


def assert_independent_of_threads(compute: Callable[[], torch.Tensor]) -> None:
    """Compute with several numbers of threads, of which some have nothing to do: bit by bit the same outputs."""
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outputs.append(compute())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, outputs[0]) for other in outputs[1:])


def quantize_linear(layer: nn.Linear) -> Int8Linear:
    """Return an int8 layer with the same weights."""
    weight, scale = gemm.quantize_per_channel_int8(layer.weight.detach())
    bias = {} if layer.bias is None else {"bias": layer.bias}
    quantized = Int8Linear(layer.in_features, layer.out_features, None if layer.bias is None else layer.bias.dtype)
    quantized.load_state_dict({"weight": weight, "scale": scale} | bias)
    return quantized
