"""The bfloat16 GEMM in C, against float64."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from predictor.kernels.cpu import gemm_ops, ops
from tests.predictor.kernels.products import Operands, assert_independent_of_threads, by, each_form

each_isa = by("bf16_kernel", "avx512", "avx512_bf16", "amx")


class Layer(Operands):
    """Random weights and activations."""

    def __init__(self, tokens: int, inputs: int, outputs: int, form: str = "plain") -> None:
        torch.manual_seed(tokens * 1000 + inputs * 10 + outputs)
        self.weight = (torch.randn(outputs, inputs) / inputs**0.5).bfloat16()
        self.packed = gemm_ops.bf16_pack_weight(self.weight)
        super().__init__(tokens, inputs, outputs, form)

    def __call__(self, rows: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        return gemm_ops.bf16_mm(self.rows if rows is None else rows, self.packed, len(self.weight), **self.more | more)

    def operand(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations in the kernel's precision, and the factor per token that follows, in float64."""
        rows, factor = self.rows, torch.ones(len(self.rows), 1, dtype=torch.float64)
        if "norm" in self.more:
            weight, epsilon = self.more["norm"]
            factor = (rows.double().square().mean(-1, keepdim=True) + epsilon).rsqrt()
            rows = rows * weight
        elif "silu_and_mul" in self.more:
            gate, up = rows.chunk(2, -1)
            rows = (nn.functional.silu(gate.double()) * up).float()
        return (rows if ops.bf16_isa == "avx512" else rows.bfloat16()).double(), factor


@each_isa
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from([1, 2, 11, 12, 13, 16, 17, 31, 32, 33, 70, 97, 200]),
    inputs=st.sampled_from([1, 3, 15, 16, 31, 50, 64, 130, 896]),
    outputs=st.sampled_from([1, 16, 17, 31, 32, 37, 64, 100]),
    form=st.sampled_from(["plain", "norm", "silu_and_mul"]),
    bias=st.booleans(),
    residual=st.booleans(),
)
def test_bf16_mm_matches_float64(tokens: int, inputs: int, outputs: int, form: str, bias: bool, residual: bool) -> None:
    layer = Layer(tokens, inputs, outputs, form)
    more = ({"bias": layer.bias} if bias else {}) | ({"residual": layer.residual} if residual else {})
    rows = layer.rows.clone()
    result = layer(**more)
    assert torch.equal(layer.rows, rows), "inputs are not overwritten"
    operand, factor = layer.operand()
    weight = layer.weight.double().T
    expected = sum((term.double() for term in more.values()), operand @ weight * factor)
    # Activations that lie halfway between two bfloat16 numbers may be rounded either way after silu.
    rounding = 2**-8 if form == "silu_and_mul" and ops.bf16_isa != "avx512" else 3e-6
    tolerance = rounding * (operand.abs() @ weight.abs() * factor) + 1e-6 * expected.abs() + 1e-6
    assert ((result - expected).abs() <= tolerance).all()


@each_isa
@each_form
def test_bf16_mm_is_bit_identical_in_any_batch(form: str) -> None:
    layer = Layer(70, 130, 37, form)
    alone = [
        layer(layer.rows[row : row + 1], bias=layer.bias, residual=layer.residual[row : row + 1]) for row in range(70)
    ]
    for tokens in range(1, 71):
        together = layer(layer.rows[:tokens], bias=layer.bias, residual=layer.residual[:tokens])
        assert torch.equal(together, torch.cat(alone[:tokens]))


@each_isa
def test_bf16_mm_of_a_long_prompt_is_bit_identical_to_its_parts() -> None:
    layer = Layer(300, 400, 70)
    assert torch.equal(layer(), torch.cat([layer(part) for part in layer.rows.split([1, 95, 4, 200])]))


@each_isa
def test_bf16_mm_is_bit_identical_with_any_thread_count() -> None:
    layer = Layer(120, 130, 100)  # 100 outputs are four panels
    assert_independent_of_threads(lambda: layer(bias=layer.bias))


@by("bf16_kernel", "avx512_bf16", "amx")
def test_bf16_mm_rounds_activations_as_torch_does() -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F80FFFF, 0x7F7FFFFF, -0x407F8000], dtype=torch.int32)
    rows = bits.view(torch.float32)[:, None]
    outputs = gemm_ops.bf16_mm(rows, gemm_ops.bf16_pack_weight(torch.ones(1, 1, dtype=torch.bfloat16)), 1)
    assert torch.equal(outputs, rows.bfloat16().float())


@by("bf16_kernel", "avx512")
def test_bf16_mm_by_avx512_keeps_activations_in_float32() -> None:
    rows = torch.tensor([[1.0001, -3.3333]])
    identity = gemm_ops.bf16_pack_weight(torch.eye(2, dtype=torch.bfloat16))
    assert torch.equal(gemm_ops.bf16_mm(rows, identity, 2), rows)


@each_isa
@each_form
@pytest.mark.parametrize("place", [0, 15, 16, 47, 49])
def test_bf16_mm_propagates_nan_within_its_token_only(form: str, place: int) -> None:
    layer = Layer(13, 50, 37, form)
    before = layer(bias=layer.bias)
    # Its last bits alone say that it is no infinity.
    layer.rows[4, place] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    outputs = layer(bias=layer.bias)
    others = torch.arange(13) != 4
    assert outputs[4].isnan().all()
    assert torch.equal(outputs[others], before[others])


@each_isa
@each_form
def test_bf16_mm_of_zeros_is_the_bias(form: str) -> None:
    layer = Layer(13, 50, 37, form)
    zeros = torch.zeros_like(layer.rows)
    assert not layer(zeros).any()
    assert torch.equal(layer(zeros, bias=layer.bias), layer.bias.expand(13, -1))


@each_isa
@each_form
def test_bf16_mm_accepts_strided_tensors(form: str) -> None:
    layer = Layer(13, 50, 37, form)
    expected = layer(residual=layer.residual)
    rows, residual = layer.rows.T.contiguous().T, layer.residual.T.contiguous().T
    assert not rows.is_contiguous()
    assert torch.equal(layer(rows, residual=residual), expected)
    assert torch.equal(gemm_ops.bf16_pack_weight(layer.weight.T.contiguous().T), layer.packed)


@each_isa
def test_bf16_mm_without_tokens_is_empty() -> None:
    assert Layer(0, 50, 37)().shape == (0, 37)


def test_bf16_isa_is_one_that_the_cpu_has() -> None:
    capabilities = torch.cpu.get_capabilities()
    if ops.bf16_isa in ("avx512_bf16", "amx"):
        assert capabilities["avx512_bf16"]
    if ops.cpu_isa is not None:
        assert ops.bf16_isa is not None, "AVX-512 with VNNI includes what the kernel by AVX-512 needs"
