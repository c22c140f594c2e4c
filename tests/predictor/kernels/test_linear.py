"""Packed linear layers against `nn.Linear`."""

import copy
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from devtools.paths import ROOT
from predictor.kernels.cpu import gemm, linear
from tests.predictor.kernels.products import by, quantize_linear


class Block(nn.Module):  # type: ignore[misc]
    """Projections with the usual names."""

    def __init__(self, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.q_proj = nn.Linear(64, 96, bias=bias, dtype=dtype)
        self.k_proj = nn.Linear(64, 32, bias=bias, dtype=dtype)
        self.v_proj = nn.Linear(64, 32, bias=bias, dtype=dtype)
        self.out_proj = nn.Linear(96, 64, bias=bias, dtype=dtype)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query = self.q_proj(inputs)
        return query, self.k_proj(inputs), self.v_proj(inputs), self.out_proj(query)

    def quantize(self) -> "Block":
        """Replace the layers by `Int8Linear`, in place."""
        for name, layer in list(self.named_children()):
            self.register_module(name, quantize_linear(layer))
        return self


def inputs(rows: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(rows)
    return torch.randn(1, rows, 64, dtype=dtype)


@pytest.fixture(autouse=True)
def _inference() -> None:
    torch.set_grad_enabled(False)


@pytest.mark.usefixtures("bf16_kernel")
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_linear_matches_plain_linear(bias: bool) -> None:
    activations = inputs(5, torch.bfloat16)
    expected = Block(torch.bfloat16, bias=bias)(activations)
    packed = Block(torch.bfloat16, bias=bias)
    linear.pack_linear_layers(packed)
    assert not list(packed.parameters()), "plain weights must be freed"
    for plain, actual in zip(expected, packed(activations), strict=True):
        torch.testing.assert_close(actual, plain, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("int8_kernel")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_linear_is_close_to_plain_linear(bias: bool, dtype: torch.dtype) -> None:
    activations = inputs(5, dtype)
    expected = Block(dtype, bias=bias)(activations)
    packed = Block(dtype, bias=bias).quantize()
    linear.pack_linear_layers(packed)
    for plain, actual in zip(expected, packed(activations), strict=True):
        assert actual.dtype == dtype
        assert (actual - plain).float().norm() < 0.02 * plain.float().norm()


@by("bf16_kernel", "avx512", "avx512_bf16", "amx")
def test_bf16_linear_is_bit_identical_in_any_batch() -> None:
    packed = Block(torch.bfloat16, bias=True)
    linear.pack_linear_layers(packed)
    together = inputs(33, torch.bfloat16)
    of_all = packed(together)
    for row in range(33):
        for alone, among in zip(packed(together[:, row : row + 1]), of_all, strict=True):
            assert torch.equal(alone[0, 0], among[0, row])


@pytest.mark.usefixtures("int8_kernel")
def test_int8_linear_is_bit_identical_in_any_batch() -> None:
    packed = Block(torch.bfloat16, bias=True).quantize()
    linear.pack_linear_layers(packed)
    together = inputs(33, torch.bfloat16)
    together[0, 0] *= 1000  # one scale for the batch would quantize the other tokens to zero
    of_all = packed(together)
    for row in range(33):
        for alone, among in zip(packed(together[:, row : row + 1]), of_all, strict=True):
            assert torch.equal(alone[0, 0], among[0, row])


@pytest.mark.usefixtures("int8_kernel")
def test_int8_linear_of_zeros_is_zero() -> None:
    packed = Block(torch.float32, bias=False).quantize()
    linear.pack_linear_layers(packed)
    assert not any(output.any() for output in packed(torch.zeros(1, 3, 64)))


def test_quantize_per_channel_int8_errs_by_at_most_half_a_step() -> None:
    weight = torch.randn(8, 64)
    weight[3] = 0
    qweight, scale = gemm.quantize_per_channel_int8(weight)
    assert ((qweight * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert qweight.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127, 127, 127, 127]


def test_forward_cached_with_another_input_recomputes() -> None:
    packed = Block(torch.bfloat16, bias=False)
    plain = Block(torch.bfloat16, bias=False)
    linear.pack_linear_layers(packed)
    one, other = inputs(2, torch.bfloat16), inputs(3, torch.bfloat16)
    packed.q_proj(one)
    torch.testing.assert_close(packed.k_proj(other), plain.k_proj(other), rtol=0.02, atol=0.02)


def test_pack_linear_layers_leaves_float32_unchanged() -> None:
    block = Block(torch.float32, bias=True)
    linear.pack_linear_layers(block)
    assert all(type(layer) is nn.Linear for layer in block.children())


@pytest.mark.usefixtures("int8_kernel")
def test_pack_linear_layers_quantizes_the_lm_head() -> None:
    activations = inputs(5, torch.bfloat16)
    packed, plain = Block(torch.bfloat16, bias=True), Block(torch.bfloat16, bias=True)
    linear.pack_linear_layers(packed, packed.out_proj, quantize_lm_head=True)
    linear.pack_linear_layers(plain, plain.out_proj)
    *same, qweight = packed(activations)
    *expected, exact = plain(activations)
    assert all(torch.equal(actual, plain) for actual, plain in zip(same, expected, strict=True))
    assert not torch.equal(qweight, exact)
    assert (qweight - exact).float().norm() < 0.02 * exact.float().norm()


@pytest.mark.usefixtures("int8_kernel")
def test_quantized_lm_head_returns_float32_logits() -> None:
    activations = torch.randn(1, 5, 96, dtype=torch.bfloat16)
    block = Block(torch.bfloat16, bias=True)
    exact = copy.deepcopy(block.out_proj).float()(activations.float())
    linear.pack_linear_layers(block, block.out_proj, quantize_lm_head=True)
    logits = block.out_proj(activations)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert (logits - exact).norm() < 0.02 * exact.norm()


@by("bf16_kernel", "avx512", "avx512_bf16", "amx")
def test_bf16_lm_head_returns_float32_logits() -> None:
    activations = torch.randn(1, 5, 96, dtype=torch.bfloat16)
    block = Block(torch.bfloat16, bias=True)
    exact = copy.deepcopy(block.out_proj).float()(activations.float())
    linear.pack_linear_layers(block, block.out_proj)
    torch.testing.assert_close(block.out_proj(activations), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("int8_kernel")
def test_fuse_linears_with_several_pack_chunks_is_accurate() -> None:
    activations = inputs(3, torch.float32)
    wide = nn.Linear(64, 3 * gemm.PACK_CHUNK_ROWS + 5)
    kernel = linear.fuse_linears([wide], quantize=True)
    assert kernel is not None
    outputs = kernel(activations)
    assert (outputs - wide(activations)).norm() < 0.02 * wide(activations).norm()


@pytest.mark.packaging
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("qemu-x86_64"),
    reason="qemu-x86_64 (Debian: qemu-user) is not installed",
)
def test_int8_linear_on_a_cpu_without_vnni_is_accurate() -> None:
    # qemu emulates AVX2 without AVX-512.
    result = subprocess.run(
        ["qemu-x86_64", "-cpu", "max", sys.executable, str(ROOT / "tests/programs/int8_without_vnni.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
