"""The int4 GEMM in C, against exact sums in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from predictor.kernels.cpu import gemm, gemm_ops, ops
from tests.predictor.kernels.products import Operands, by, quantized_product

each_isa = by("int8_kernel", "avx512_vnni", "amx")


class Layer(Operands):
    """Random weights and activations; scales are exact in float16."""

    def __init__(
        self, tokens: int, inputs: int, outputs: int, group_size: int, *, zero_points: bool, gated: bool = False
    ) -> None:
        torch.manual_seed(tokens * 1000 + inputs * 10 + outputs)
        groups = -(-inputs // group_size)
        self.qweight = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
        self.scale = ((torch.rand(outputs, groups) + 0.1) / inputs**0.5).half().float()
        self.zero_point = torch.randint(0, 16, (outputs, groups), dtype=torch.uint8) if zero_points else None
        self.group_size = group_size
        self.packed = gemm_ops.int4_pack_weight(self.qweight, self.scale, self.zero_point, group_size)
        super().__init__(tokens, inputs, outputs, "silu_and_mul" if gated else "plain")

    def weight(self) -> torch.Tensor:
        """(outputs, inputs), float64."""
        group_of = torch.arange(self.qweight.shape[1]) // self.group_size
        zero_point = 8 if self.zero_point is None else self.zero_point.double()[:, group_of]
        return (self.qweight.double() - zero_point) * self.scale.double()[:, group_of]


@each_isa
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    tokens=st.sampled_from([1, 2, 7, 10, 11, 13, 16, 17, 33, 70]),
    inputs=st.sampled_from([1, 3, 31, 33, 64, 96, 130, 896]),
    outputs=st.sampled_from([1, 16, 17, 31, 32, 37, 100]),
    group_size=st.sampled_from(gemm.INT4_GROUP_SIZES),
    zero_points=st.booleans(),
    has_norm=st.booleans(),
)
def test_int4_scaled_mm_matches_float64(
    tokens: int, inputs: int, outputs: int, group_size: int, zero_points: bool, has_norm: bool
) -> None:
    layer = Layer(tokens, inputs, outputs, group_size, zero_points=zero_points)
    norm = (torch.rand(inputs) + 0.5, 0.5) if has_norm else None
    result = gemm_ops.int4_scaled_mm(layer.rows, layer.packed, norm=norm, bias=layer.bias, residual=layer.residual)
    product = quantized_product(layer.rows, layer.weight(), norm)
    error = result - (product + layer.bias + layer.residual)
    assert error.abs().max() < 3e-6 * (product.abs().max() + layer.bias.abs().max() + layer.residual.abs().max())


@each_isa
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", gemm.INT4_GROUP_SIZES)
def test_int4_silu_and_mul_matches_float64(group_size: int, zero_points: bool) -> None:
    layer = Layer(13, 130, 37, group_size, zero_points=zero_points, gated=True)
    gate, up = layer.rows.double().chunk(2, -1)
    rows = layer.rows.clone()
    result = gemm_ops.int4_scaled_mm(rows, layer.packed, silu_and_mul=True, residual=layer.residual)
    torch.testing.assert_close(rows[:, :130], (nn.functional.silu(gate) * up).float(), rtol=2e-6, atol=1e-9)
    product = quantized_product(rows[:, :130], layer.weight()) + layer.residual
    assert (result - product).abs().max() < 3e-6 * product.abs().max()


@each_isa
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", gemm.INT4_GROUP_SIZES)
def test_int4_scaled_mm_is_bit_identical_in_any_batch(group_size: int, zero_points: bool) -> None:
    layer = Layer(40, 300, 70, group_size, zero_points=zero_points)
    alone = [gemm_ops.int4_scaled_mm(row[None], layer.packed, bias=layer.bias)[0] for row in layer.rows]
    for tokens in range(1, 41):
        together = gemm_ops.int4_scaled_mm(layer.rows[:tokens], layer.packed, bias=layer.bias)
        assert torch.equal(together, torch.stack(alone[:tokens]))


@by("int8_kernel", "amx")
@pytest.mark.parametrize("group_size", gemm.INT4_GROUP_SIZES)
def test_int4_scaled_mm_is_bit_identical_with_vnni_and_amx(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(33, 300, 70, group_size, zero_points=True)
    by_amx = gemm_ops.int4_scaled_mm(layer.rows, layer.packed)
    monkeypatch.setattr(ops, "cpu_isa", "avx512_vnni")
    assert torch.equal(gemm_ops.int4_scaled_mm(layer.rows, layer.packed), by_amx)


@each_isa
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("quantized", "zero_point"), [(0, 15), (15, 0)])
def test_int4_scaled_mm_at_full_range_does_not_overflow(quantized: int, zero_point: int, sign: int) -> None:
    width = 32768
    qweight = torch.full((33, width), quantized, dtype=torch.uint8)
    groups = torch.ones(33, width // 128)
    packed = gemm_ops.int4_pack_weight(qweight, groups, groups.byte() * zero_point, 128)
    outputs = gemm_ops.int4_scaled_mm(torch.full((7, width), 3.0 * sign), packed)
    torch.testing.assert_close(outputs, torch.full((7, 33), (quantized - zero_point) * 3.0 * sign * width))


@each_isa
def test_int4_scaled_mm_propagates_nan_within_its_token_only() -> None:
    layer = Layer(13, 50, 37, 32, zero_points=True)
    before = gemm_ops.int4_scaled_mm(layer.rows, layer.packed)
    layer.rows[4, 49] = torch.nan
    outputs = gemm_ops.int4_scaled_mm(layer.rows, layer.packed)
    others = torch.arange(13) != 4
    assert outputs[4].isnan().all()
    assert torch.equal(outputs[others], before[others])


@each_isa
@pytest.mark.parametrize("magnitude", [1e-35, 1e-20, 1e20])
def test_int4_pack_weight_keeps_scales_of_any_magnitude(magnitude: float) -> None:
    """float16 alone would round them to zero or to infinity."""
    scale = torch.tensor([[0.75, 0.0, 0.5]]) * magnitude
    packed = gemm_ops.int4_pack_weight(torch.full((1, 96), 9, dtype=torch.uint8), scale, None, 32)
    outputs = gemm_ops.int4_scaled_mm(torch.eye(96)[[0, 40, 95]], packed)[:, 0]
    torch.testing.assert_close(outputs, scale[0], rtol=1e-3, atol=1e-35)


@pytest.mark.usefixtures("int8_kernel")
@pytest.mark.parametrize("zero_points", [False, True])
def test_make_int4_linear_is_close_to_its_dequantized_weights(zero_points: bool) -> None:
    """Also where fbgemm computes, in int8."""
    torch.manual_seed(0)
    qweight, scale = torch.randint(0, 16, (96, 130), dtype=torch.uint8), torch.rand(96, 5) / 10
    zero_point = torch.randint(0, 16, (96, 5), dtype=torch.uint8) if zero_points else None
    bias, residual, inputs = torch.randn(96), torch.randn(3, 96), torch.randn(3, 130)
    norm = gemm.RMSNorm(torch.rand(130) + 0.5, 1e-6)
    kernel = gemm.make_int4_linear(qweight, scale, zero_point, 32, bias)
    weight = gemm.dequantize_int4(qweight, scale, zero_point, 32)
    assert weight.shape == (96, 130)
    outputs = kernel.forward(inputs, norm, residual)
    plain = (inputs * norm.weight * norm.inverse_rms(inputs)) @ weight.T + bias + residual
    assert (outputs - plain).norm() < 0.03 * plain.norm()
    gate, up = torch.randn(2, 3, 130)
    outputs = kernel.silu_and_mul(torch.cat((gate, up), -1), residual)
    plain = (nn.functional.silu(gate) * up) @ weight.T + bias + residual
    assert (outputs - plain).norm() < 0.03 * plain.norm()


@pytest.mark.parametrize(("group_size", "groups"), [(16, 4), (64, 2), (32, 1)])
def test_make_int4_linear_with_other_groups_fails(group_size: int, groups: int) -> None:
    with pytest.raises(ValueError, match=rf"8 x 64 in groups of {group_size} with scales \(8, {groups}\): groups have"):
        gemm.make_int4_linear(torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, groups), None, group_size, None)
