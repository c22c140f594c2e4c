"""Heads of keys and values in int8: torch against its own bounds, and C against torch bit by bit."""

import math

import pytest
import torch

from predictor.kernels import int8_heads
from predictor.kernels.cpu import ops

needs_c = pytest.mark.skipif(ops.cpu_isa is None, reason="C kernels are unavailable")


def states(head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heads of different sizes, (tokens, 3, head_dim), with outliers, ties, zeros, tiny and infinite numbers, NaN."""
    torch.manual_seed(head_dim)
    heads = torch.randn(70, 3, head_dim) * torch.logspace(-6, 6, 70)[:, None, None]
    heads[::5, :, 1] *= 300
    heads[1] = torch.linspace(-127, 127, 2 * head_dim)[1::2]
    heads[2] = 0
    heads[3] = 0
    heads[3, :, 0] = torch.tensor([1e-31, 1e-44, 3e38])
    heads[4, 0, 3], heads[4, 1, 3], heads[4, 2, 3] = math.inf, -math.inf, math.nan
    return heads.to(dtype)


@pytest.mark.parametrize("head_dim", [1, 5, 16, 64, 80, 128])
def test_dequantize_returns_numbers_within_half_a_step(head_dim: int) -> None:
    torch.manual_seed(0)
    heads = torch.randn(50, 3, head_dim) * torch.logspace(-6, 6, 50)[:, None, None]
    quantized = int8_heads.quantize(heads)
    assert quantized.shape == (50, 3, int8_heads.head_bytes(head_dim))
    assert quantized.dtype == torch.int8
    groups = torch.nn.functional.pad(heads, (0, -head_dim % 32)).unflatten(-1, (-1, 32)).abs().amax(-1)
    # A scale in bfloat16 is rounded up by 1 / 128 at most.
    steps = groups.repeat_interleave(32, -1)[..., :head_dim] / 127 * (1 + 1 / 128)
    assert ((int8_heads.dequantize(quantized, head_dim, torch.float32) - heads).abs() <= 0.501 * steps).all()


def test_head_bytes_are_little_more_than_half_of_16_bits() -> None:
    assert [int8_heads.head_bytes(head_dim) for head_dim in (64, 80, 128, 256)] == [68, 86, 136, 272]


def test_quantize_outlier_does_not_round_other_groups() -> None:
    heads = torch.linspace(-1, 1, 64)
    heads[5] = 1000
    dequantized = int8_heads.dequantize(int8_heads.quantize(heads), 64, torch.float32)
    assert (dequantized[32:] - heads[32:]).abs().amax() < 0.005


def test_dequantize_is_not_finite_where_the_head_was_not() -> None:
    heads = states(64)[4]
    dequantized = int8_heads.dequantize(int8_heads.quantize(heads), 64, torch.float32)
    assert dequantized[:, :32].isnan().all()
    assert dequantized[:, 32:].isfinite().all()


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
def test_quantize_kv_in_c_is_bit_identical_to_torch(head_dim: int, dtype: torch.dtype) -> None:
    keys = states(head_dim, dtype)
    values = keys.flip(0)
    strided = torch.cat((keys, keys), 1)[:, :3]
    expected = torch.stack((int8_heads.quantize(keys), int8_heads.quantize(values)))
    for key in (keys, strided):
        assert torch.equal(ops.quantize_kv(key, values), expected)
    # One token by itself, and none.
    assert torch.equal(ops.quantize_kv(keys[7:8], values[7:8]), expected[:, 7:8])
    assert ops.quantize_kv(keys[:0], values[:0]).shape == (2, 0, 3, int8_heads.head_bytes(head_dim))
