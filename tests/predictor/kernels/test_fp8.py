"""fp8 layers on a CPU, against a float32 reference."""

import pytest
import torch

from predictor.kernels.fp8 import FP8, Fp8Linear, quantize_rows


def make_layer(bias: bool) -> tuple[Fp8Linear, torch.Tensor]:
    """A layer, and its weights before they were quantized."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(48, 64, generator=generator) * torch.logspace(-3, 2, 48)[:, None]
    layer = Fp8Linear(64, 48, torch.bfloat16 if bias else None)
    quantized, scales = quantize_rows(weights)
    layer.weight.data, layer.scale.data = quantized, scales[:, 0]
    if layer.bias is not None:
        layer.bias.data = torch.randn(48, generator=generator).bfloat16()
    return layer, weights


def test_quantize_rows_error_is_within_half_a_step_of_the_format() -> None:
    rows = torch.randn(32, 256, generator=torch.Generator().manual_seed(2)) * torch.logspace(-20, 20, 32)[:, None]
    quantized, scales = quantize_rows(rows)
    assert (quantized.dtype, scales.shape) == (FP8, (32, 1))
    errors = (quantized.float() * scales - rows).abs()
    # 3 bits after the leading one; below the smallest normal number steps are equal.
    assert (errors <= torch.maximum(rows.abs() / 16, scales * 2**-10) * 1.001).all()
    assert quantized.float().abs().amax(dim=1).eq(448).all()


def test_quantize_rows_of_zeros_are_zeros() -> None:
    quantized, scales = quantize_rows(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert quantized.float().eq(0).all()
    assert scales.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_fp8_linear_is_the_product_of_the_quantized_numbers(dtype: torch.dtype, *, bias: bool) -> None:
    layer, weights = make_layer(bias)
    inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    outputs = layer(inputs)
    assert (outputs.shape, outputs.dtype) == ((2, 5, 48), dtype)
    rows, scales = quantize_rows(inputs.view(-1, 64))
    exact = (rows.float() * scales) @ (layer.weight.float() * layer.scale[:, None]).t()
    addend = 0.0 if layer.bias is None else layer.bias.float()
    exact = exact.view(2, 5, 48) + addend
    assert torch.allclose(outputs.float(), exact, rtol=2**-6, atol=2**-6 * float(exact.abs().max()) / 16)
    reference = inputs.float() @ weights.t() + addend
    assert (outputs.float() - reference).norm() < 0.05 * reference.norm()


def test_fp8_linear_row_does_not_depend_on_the_batch() -> None:
    layer, _ = make_layer(bias=False)
    inputs = torch.randn(7, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert torch.equal(layer(inputs)[3:4], layer(inputs[3:4]))
