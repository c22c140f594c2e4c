"""Linear layers packed for a CPU, against the plain ones."""

import copy
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from predictor.kernels.cpu import gemm, linear
from predictor.kernels.cpu.linear import Int8Linear


class Block(nn.Module):
    """Projections as they are named in most architectures."""

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

    def rounded(self) -> "Block":
        """The same with int8 weights."""
        for name, layer in list(self.named_children()):
            bias = None if layer.bias is None else layer.bias.dtype
            int8 = Int8Linear(layer.in_features, layer.out_features, bias)
            weight, scale = gemm.to_int8(layer.weight.detach())
            int8.load_state_dict({"weight": weight, "scale": scale} | ({"bias": layer.bias} if bias else {}))
            self.register_module(name, int8)
        return self


def inputs(rows: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(rows)
    return torch.randn(1, rows, 64, dtype=dtype)


@pytest.fixture(autouse=True)
def _inference() -> None:
    torch.set_grad_enabled(False)


@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_what_it_was(bias: bool) -> None:
    given = inputs(5, torch.bfloat16)
    expected = Block(torch.bfloat16, bias=bias)(given)
    packed = Block(torch.bfloat16, bias=bias)
    linear.pack(packed)
    assert not list(packed.parameters()), "the plain weights are let go"
    for was, now in zip(expected, packed(given), strict=True):
        torch.testing.assert_close(now, was, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("int8_kernel")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_is_close_to_what_it_was(bias: bool, dtype: torch.dtype) -> None:
    given = inputs(5, dtype)
    expected = Block(dtype, bias=bias)(given)
    packed = Block(dtype, bias=bias).rounded()
    linear.pack(packed)
    for was, now in zip(expected, packed(given), strict=True):
        assert now.dtype == dtype
        assert (now - was).float().norm() < 0.02 * was.float().norm()


@pytest.mark.usefixtures("int8_kernel")
def test_int8_of_a_token_is_bit_by_bit_the_same_beside_any_others() -> None:
    packed = Block(torch.bfloat16, bias=True).rounded()
    linear.pack(packed)
    together = inputs(33, torch.bfloat16)
    together[0, 0] *= 1000  # one scale for all would leave the others next to nothing
    of_all = packed(together)
    for row in range(33):
        for alone, among in zip(packed(together[:, row : row + 1]), of_all, strict=True):
            assert torch.equal(alone[0, 0], among[0, row])


@pytest.mark.usefixtures("int8_kernel")
def test_zeros_stay_zeros() -> None:
    packed = Block(torch.float32, bias=False).rounded()
    linear.pack(packed)
    assert not any(output.any() for output in packed(torch.zeros(1, 3, 64)))


def test_weights_are_rounded_by_less_than_half_a_step() -> None:
    weight = torch.randn(8, 64)
    weight[3] = 0
    rounded, scale = gemm.to_int8(weight)
    assert ((rounded * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert rounded.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127, 127, 127, 127]


def test_neighbours_of_another_input_are_computed_anew() -> None:
    packed = Block(torch.bfloat16, bias=False)
    plain = Block(torch.bfloat16, bias=False)
    linear.pack(packed)
    one, other = inputs(2, torch.bfloat16), inputs(3, torch.bfloat16)
    packed.q_proj(one)
    torch.testing.assert_close(packed.k_proj(other), plain.k_proj(other), rtol=0.02, atol=0.02)


def test_layers_in_float32_are_left_as_they_are() -> None:
    block = Block(torch.float32, bias=True)
    linear.pack(block)
    assert all(type(layer) is nn.Linear for layer in block.children())


@pytest.mark.usefixtures("int8_kernel")
def test_one_layer_may_be_rounded_too() -> None:
    given = inputs(5, torch.bfloat16)
    packed, plain = Block(torch.bfloat16, bias=True), Block(torch.bfloat16, bias=True)
    linear.pack(packed, packed.out_proj)
    linear.pack(plain)
    *same, rounded = packed(given)
    *expected, exact = plain(given)
    assert all(torch.equal(now, was) for now, was in zip(same, expected, strict=True))
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).float().norm() < 0.02 * exact.float().norm()


@pytest.mark.usefixtures("int8_kernel")
def test_logits_of_a_rounded_last_layer_are_as_exact_as_their_kernel_makes_them() -> None:
    given = torch.randn(1, 5, 96, dtype=torch.bfloat16)
    block = Block(torch.bfloat16, bias=True)
    exact = copy.deepcopy(block.out_proj).float()(given.float())
    linear.pack(block, block.out_proj)
    logits = block.out_proj(given)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float()), "and nothing rounded them on their way"
    assert (logits - exact).norm() < 0.02 * exact.norm()


@pytest.mark.usefixtures("int8_kernel")
def test_int8_of_a_vocabularys_width_is_close_to_what_it_was() -> None:
    given = inputs(3, torch.float32)
    wide = nn.Linear(64, 3 * gemm._PACKED_AT_ONCE + 5)
    found = linear.join([wide], int8=True)(given)
    assert (found - wide(given)).norm() < 0.02 * wide(given).norm()


_ON_AN_OLDER_CPU = """
import torch
from torch import nn
from predictor.kernels.cpu import linear

assert not torch.cpu.get_capabilities()["avx512_vnni"]
torch.manual_seed(0)
plain = nn.Linear(512, 256)
plain.weight.data[0], plain.bias.data[0] = 1, 0  # all weights and inputs at the end of their range
given = torch.cat((torch.ones(1, 512), torch.randn(8, 512)))
expected, found = plain(given), linears.join([plain], int8=True)(given)
torch.testing.assert_close(found[0, 0].item(), 512.0)
assert (found - expected).norm() < 0.02 * expected.norm()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("qemu-x86_64"),
    reason="qemu-x86_64 (Debian: qemu-user) is not here",
)
def test_int8_is_as_close_on_a_cpu_without_vnni() -> None:
    # qemu knows AVX2, and no AVX-512.
    ran = subprocess.run(
        ["qemu-x86_64", "-cpu", "max", sys.executable, "-c", _ON_AN_OLDER_CPU],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr
