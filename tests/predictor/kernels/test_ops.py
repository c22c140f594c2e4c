"""The int8 GEMM in C against torch."""

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from predictor.kernels.cpu import gemm, gemm_ops, ops
from tests.predictor.kernels.products import Operands, assert_independent_of_threads, by, each_form, quantized_product

each_isa = by("int8_kernel", "avx512_vnni", "amx")


class Layer(Operands):
    """Random weights and activations."""

    def __init__(self, tokens: int, inputs: int, outputs: int, form: str = "plain") -> None:
        torch.manual_seed(tokens * 1000 + inputs * 10 + outputs)
        self.weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        self.packed = gemm_ops.int8_pack_weight(self.weight)
        self.scales = (torch.rand(outputs) + 0.5) / 100 / inputs**0.5
        super().__init__(tokens, inputs, outputs, form)

    def __call__(self, rows: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        rows = (self.rows if rows is None else rows).clone()  # silu_and_mul overwrites its input
        return gemm_ops.int8_scaled_mm(rows, self.packed, self.scales, **self.more | more)


def expected(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute in float64, where integer sums are exact; activations are quantized in float32."""
    outputs = quantized_product(rows, weight.double(), norm) * scales.double()
    for more in (bias, residual):
        outputs = outputs if more is None else outputs + more.double()
    return outputs.float()


@each_isa
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from([1, 2, 11, 12, 13, 16, 17, 31, 32, 33, 70]),
    inputs=st.sampled_from([1, 3, 15, 16, 50, 64, 130, 896]),
    outputs=st.sampled_from([1, 16, 17, 31, 32, 37, 64, 100]),
    form=st.sampled_from(["plain", "norm", "silu_and_mul"]),
    bias=st.booleans(),
    residual=st.booleans(),
)
def test_int8_scaled_mm_matches_exact_integer_sums(
    tokens: int, inputs: int, outputs: int, form: str, bias: bool, residual: bool
) -> None:
    layer = Layer(tokens, inputs, outputs, form)
    more = ({"bias": layer.bias} if bias else {}) | ({"residual": layer.residual} if residual else {})
    rows = layer.rows.clone()
    outputs = gemm_ops.int8_scaled_mm(rows, layer.packed, layer.scales, **layer.more, **more)
    if form == "silu_and_mul":
        gate, up = layer.rows.double().chunk(2, -1)
        torch.testing.assert_close(rows[:, :inputs], (nn.functional.silu(gate) * up).float(), rtol=2e-6, atol=1e-9)
        rows, norm = rows[:, :inputs], {}
    else:
        assert torch.equal(rows, layer.rows), "only silu_and_mul overwrites its input"
        norm = layer.more
    torch.testing.assert_close(outputs, expected(rows, layer.weight, layer.scales, **norm, **more))


@each_isa
@pytest.mark.parametrize("outputs", [1, 37, 5000])
@pytest.mark.parametrize("tokens", [1, 13, 70])
def test_int8_argmax_is_that_of_the_outputs(tokens: int, outputs: int) -> None:
    layer = Layer(tokens, 130, outputs)
    assert torch.equal(
        gemm_ops.int8_argmax(layer.rows, layer.packed, layer.scales, outputs, layer.bias),
        layer(bias=layer.bias).argmax(-1),
    )


@each_isa
@pytest.mark.parametrize("value", [-torch.inf, -1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("places", [[36, 70], [70, 36], [4000], [100, 101, 4999]])
def test_int8_argmax_is_the_first_of_equal_outputs(places: list[int], value: float) -> None:
    layer = Layer(3, 64, 5000)
    bias = torch.full((5000,), -torch.inf)
    bias[places] = value
    largest = gemm_ops.int8_argmax(torch.zeros(3, 64), layer.packed, layer.scales, 5000, bias)
    assert largest.tolist() == [0 if value == -torch.inf else min(places)] * 3


@each_isa
def test_int8_argmax_ignores_further_outputs() -> None:
    layer = Layer(2, 64, 50)
    bias = torch.arange(50.0) * 100
    assert gemm_ops.int8_argmax(layer.rows, layer.packed, layer.scales, 33, bias).tolist() == [32, 32]


@each_isa
def test_int8_argmax_of_a_nan_token_is_the_first_output() -> None:
    layer = Layer(2, 64, 50)
    layer.rows[1, 3] = torch.nan
    largest = gemm_ops.int8_argmax(layer.rows, layer.packed, layer.scales, 50)
    assert largest.tolist() == [int(layer()[0].argmax()), 0]


@each_isa
def test_int8_scaled_mm_rounds_halves_to_even() -> None:
    rows = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127, 126.5]])
    identity = gemm_ops.int8_pack_weight(torch.eye(8, dtype=torch.int8))
    assert gemm_ops.int8_scaled_mm(rows, identity, torch.ones(8)).tolist() == [[127, 0, 2, 2, 0, -2, -127, 126]]


@each_isa
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("weight", [-127, 127])
def test_int8_scaled_mm_at_full_range_does_not_overflow(weight: int, sign: int) -> None:
    width = 32768
    packed = gemm_ops.int8_pack_weight(torch.full((33, width), weight, dtype=torch.int8))
    outputs = gemm_ops.int8_scaled_mm(torch.full((2, width), 3.0 * sign), packed, torch.full((33,), 1 / 127))
    torch.testing.assert_close(outputs, torch.full((2, 33), weight / 127 * 3.0 * sign * width))


@each_isa
@each_form
def test_int8_scaled_mm_is_bit_identical_in_any_batch(form: str) -> None:
    layer = Layer(70, 130, 37, form)
    of_all = layer(bias=layer.bias, residual=layer.residual)
    for token in range(70):
        alone = layer(layer.rows[token : token + 1], bias=layer.bias, residual=layer.residual[token : token + 1])
        assert torch.equal(alone[0], of_all[token])


@by("int8_kernel", "amx")
@each_form
@pytest.mark.parametrize("tokens", [1, 33])
def test_int8_scaled_mm_is_bit_identical_with_vnni_and_amx(
    form: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(tokens, 130, 37, form)
    by_amx = layer(bias=layer.bias, residual=layer.residual)
    monkeypatch.setattr(ops, "cpu_isa", "avx512_vnni")
    assert torch.equal(layer(bias=layer.bias, residual=layer.residual), by_amx)


@each_isa
@each_form
def test_int8_scaled_mm_is_bit_identical_with_any_thread_count(form: str) -> None:
    layer = Layer(33, 130, 100, form)  # 100 outputs are four panels
    assert_independent_of_threads(lambda: layer(bias=layer.bias))


@each_isa
@each_form
@pytest.mark.parametrize("place", [0, 15, 16, 47, 49])
def test_int8_scaled_mm_propagates_nan_within_its_token_only(form: str, place: int) -> None:
    layer = Layer(13, 50, 37, form)
    before = layer(bias=layer.bias, residual=layer.residual)
    layer.rows[4, place] = torch.nan
    outputs = layer(bias=layer.bias, residual=layer.residual)
    assert outputs[4].isnan().all()
    others = torch.arange(13) != 4
    assert torch.equal(outputs[others], before[others])


@each_isa
def test_int8_scaled_mm_propagates_nan_of_the_norm_weight() -> None:
    layer = Layer(2, 50, 37, "norm")
    layer.more["norm"][0][3] = torch.nan
    assert layer().isnan().all()


@each_isa
@each_form
def test_int8_scaled_mm_of_zeros_is_the_bias(form: str) -> None:
    layer = Layer(13, 50, 37, form)
    zeros = torch.zeros_like(layer.rows)
    assert not layer(zeros).any()
    assert torch.equal(layer(zeros, bias=layer.bias), layer.bias.expand(13, -1))


@each_isa
def test_silu_and_mul_is_accurate_at_any_magnitude() -> None:
    gate = torch.tensor(
        [0, -0.0, 1e-30, -1e-30, 0.34, -0.35, 1, -1, 20, -20, 80, -80, 100, -100, 1e4, -1e4, 1e30, -1e30]
    )
    rows = torch.stack((gate, torch.full_like(gate, 3.0)), 1)  # one value per token, so that each has its own scale
    outputs = gemm_ops.int8_scaled_mm(
        rows,
        gemm_ops.int8_pack_weight(torch.full((1, 1), 127, dtype=torch.int8)),
        torch.tensor([1 / 127]),
        silu_and_mul=True,
    )
    torch.testing.assert_close(outputs[:, 0], 3 * nn.functional.silu(gate), rtol=1e-5, atol=1e-29)


@each_isa
@each_form
def test_int8_scaled_mm_accepts_strided_tensors(form: str) -> None:
    layer = Layer(13, 50, 37, form)
    expected = layer(bias=layer.bias, residual=layer.residual)
    for rows, residual in (
        (layer.rows.T.contiguous().T, layer.residual.T.contiguous().T),
        (layer.rows.repeat_interleave(2, -1)[:, ::2], layer.residual.repeat_interleave(2, -1)[:, ::2]),
    ):
        assert not rows.is_contiguous()
        assert not residual.is_contiguous()
        outputs = gemm_ops.int8_scaled_mm(
            rows, layer.packed, layer.scales, bias=layer.bias, residual=residual, **layer.more
        )
        assert torch.equal(outputs, expected)
    assert torch.equal(gemm_ops.int8_pack_weight(layer.weight.T.contiguous().T), layer.packed)


@each_isa
def test_int8_scaled_mm_leaves_its_inputs_unchanged() -> None:
    layer = Layer(13, 50, 37)
    tensors = [layer.rows, layer.packed, layer.scales, layer.bias, layer.residual]
    before = [tensor.clone() for tensor in tensors]
    gemm_ops.int8_scaled_mm(*tensors[:3], bias=layer.bias, residual=layer.residual)
    assert all(torch.equal(now, was) for now, was in zip(tensors, before, strict=True))


@each_isa
def test_int8_scaled_mm_without_tokens_is_empty() -> None:
    assert Layer(0, 50, 37)().shape == (0, 37)


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or not shutil.which("gcc"),
    reason="needs gcc on Linux on x86_64",
)
def test_library_is_available_on_supported_cpus() -> None:
    assert (ops.cpu_isa is not None) == torch.cpu.get_capabilities()["avx512_vnni"], ops._load_error
    assert not ops.unavailable_reason()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "with a C compiler"), (b"of another architecture", "install the package again")]
)
def test_load_failure_returns_the_reason(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "libnative.so"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(ops, "LIBRARY", file)
    library, reason = ops._load()
    assert library is None
    assert str(file) in reason
    assert message in reason


def test_load_with_a_newer_source_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("libnative.so", "gemm_int8.c"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "libnative.so", (1, 1))
    monkeypatch.setattr(ops, "LIBRARY", tmp_path / "libnative.so")
    monkeypatch.setattr(ops, "SOURCES", tmp_path)
    assert "older than its sources" in ops._load()[1]


def test_int8_backend_without_native_kernels_is_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "cpu_isa", None)
    assert gemm.int8_backend() == "fbgemm"


@by("int8_kernel", "avx512_vnni")
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 80), (128, 32), (50, 20)])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_rotate_to_bf16_is_the_rotation_of_each_pair(head_dim: int, rotary_dim: int, tokens: int) -> None:
    torch.manual_seed(tokens)
    heads, angles = torch.randn(tokens, 5, head_dim), torch.randn(tokens, rotary_dim // 2)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    actual = ops.rotate_to_bf16(heads, cos, sin, 3)
    pairs = torch.complex(*heads[:, :3, :rotary_dim].double().chunk(2, -1))
    turned = pairs * torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    expected = heads.double()
    expected[:, :3, :rotary_dim] = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(actual, expected.to(torch.bfloat16), rtol=2**-8, atol=1e-6)
    assert torch.equal(actual[:, 3:], heads[:, 3:].to(torch.bfloat16))
    for token in range(tokens):
        place = slice(token, token + 1)
        assert torch.equal(ops.rotate_to_bf16(heads[place], cos[place], sin[place], 3)[0], actual[token])


@by("int8_kernel", "avx512_vnni")
def test_rotate_to_bf16_rounds_as_torch() -> None:
    numbers = [torch.nan, torch.inf, -torch.inf, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40]
    heads = torch.tensor(numbers)[None, None]
    actual = ops.rotate_to_bf16(heads, torch.empty(1, 0), torch.empty(1, 0), 0)
    torch.testing.assert_close(actual, heads.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
