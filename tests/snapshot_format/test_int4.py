"""Quantization of weights to 4 bits."""

import pytest
import torch

from snapshot_format import int4
from snapshot_format.recipe import INT4_GROUP_SIZE


def dequantize(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    integers = torch.stack((packed & 15, packed >> 4), -1).flatten(1).float() - 8
    return integers * scale.repeat_interleave(INT4_GROUP_SIZE, 1)


def test_quantize_of_representable_weights_is_exact() -> None:
    torch.manual_seed(0)
    integers = torch.randint(-7, 8, (5, 96))
    integers[:, ::INT4_GROUP_SIZE] = -8
    scale = 2.0 ** torch.tensor([[-3, 0, 5], [1, 1, 1], [-9, -8, -7], [0, 0, 0], [9, -9, 3]])
    packed, found = int4.quantize(integers * scale.repeat_interleave(INT4_GROUP_SIZE, 1))
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, 48))
    assert torch.equal(found, scale)
    assert torch.equal(packed & 15, (integers[:, ::2] + 8).byte())
    assert torch.equal(packed >> 4, (integers[:, 1::2] + 8).byte())


def test_quantize_errs_less_than_the_largest_magnitude_as_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 1024)
    groups = weight.view(-1, INT4_GROUP_SIZE)
    plain = groups.abs().amax(1, keepdim=True) / 7
    plain_error = ((groups / plain).round() * plain - groups).norm()
    error = (dequantize(*int4.quantize(weight)) - weight).norm()
    assert error < 0.86 * plain_error
    assert 0.05 < error / weight.norm() < 0.083


@pytest.mark.parametrize("magnitude", [0, 1e-38, 1e-20, 1e20])
def test_quantize_of_any_magnitude_is_finite(magnitude: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 64) * magnitude
    packed, scale = int4.quantize(weight)
    assert scale.isfinite().all()
    assert (dequantize(packed, scale) - weight).abs().max() <= max(0.3 * magnitude, 1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_of_rows_is_that_of_the_whole_weight(dtype: torch.dtype) -> None:
    """The storage initializer quantizes blocks of rows, the predictor whole weights."""
    weight = torch.randn(300, 1024).to(dtype)
    packed, scale = int4.quantize(weight)
    blocks = [int4.quantize(rows) for rows in weight.split(7)]
    assert torch.equal(packed, torch.cat([block for block, _ in blocks]))
    assert torch.equal(scale, torch.cat([block for _, block in blocks]))
