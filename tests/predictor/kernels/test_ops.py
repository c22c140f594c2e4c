"""What is computed in C, against the same in torch: products with int8 weights, attention over a paged cache."""

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

from predictor.kernels.cpu import gemm, ops

in_each_form = pytest.mark.parametrize("form", ["plain", "norm", "gated"])
many = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def by(*names: str) -> Any:
    """Run the test with each of them that this machine has."""
    return lambda test: pytest.mark.usefixtures("int8_kernel")(
        pytest.mark.parametrize("int8_kernel", names, indirect=True)(test)
    )


at_each_level = by("avx512_vnni", "amx")


class Layer:
    """Weights, and inputs for them, of which none is like another."""

    def __init__(self, tokens: int, inputs: int, outputs: int, form: str = "plain") -> None:
        torch.manual_seed(tokens * 1000 + inputs * 10 + outputs)
        self.weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        self.packed = ops.pack(self.weight)
        self.scales = (torch.rand(outputs) + 0.5) / 100 / inputs**0.5
        self.rows = torch.randn(tokens, inputs * (2 if form == "gated" else 1)) * (torch.rand(tokens, 1) * 10)
        self.more: dict[str, Any] = {
            "plain": {},
            "norm": {"norm": (torch.rand(inputs) + 0.5, 0.5)},
            "gated": {"gated": True},
        }[form]
        self.bias = torch.randn(outputs)
        self.onto = torch.randn(tokens, outputs)

    def __call__(self, rows: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        rows = (self.rows if rows is None else rows).clone()  # what is gated is overwritten
        return ops.product(rows, self.packed, self.scales, **self.more | more)


def expected(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """In float64, where sums of integers are exact; what is rounded to them was float32."""
    gain = torch.ones(len(rows), 1, dtype=torch.float64)
    if norm is not None:
        gain = (rows.double().square().mean(-1, keepdim=True) + norm[1]).rsqrt()
        rows = rows * norm[0]
    largest = rows.abs().amax(-1, keepdim=True)
    rounded = (rows * (torch.tensor(127.0) / largest)).round().double()  # a number over a tensor would be rounded twice
    outputs = (rounded @ weight.double().T) * (largest.double() / 127) * gain * scales.double()
    for more in (bias, onto):
        outputs = outputs if more is None else outputs + more.double()
    return outputs.float()


@at_each_level
@many
@given(
    tokens=st.sampled_from([1, 2, 11, 12, 13, 16, 17, 31, 32, 33, 70]),
    inputs=st.sampled_from([1, 3, 15, 16, 50, 64, 130, 896]),
    outputs=st.sampled_from([1, 16, 17, 31, 32, 37, 64, 100]),
    form=st.sampled_from(["plain", "norm", "gated"]),
    bias=st.booleans(),
    onto=st.booleans(),
)
def test_is_the_sum_of_integers(tokens: int, inputs: int, outputs: int, form: str, bias: bool, onto: bool) -> None:
    layer = Layer(tokens, inputs, outputs, form)
    more = ({"bias": layer.bias} if bias else {}) | ({"onto": layer.onto} if onto else {})
    rows = layer.rows.clone()
    found = ops.product(rows, layer.packed, layer.scales, **layer.more, **more)
    if form == "gated":
        gate, up = layer.rows.double().chunk(2, -1)
        torch.testing.assert_close(rows[:, :inputs], (nn.functional.silu(gate) * up).float(), rtol=2e-6, atol=1e-9)
        rows, norm = rows[:, :inputs], {}
    else:
        assert torch.equal(rows, layer.rows), "only what is gated is overwritten"
        norm = layer.more
    torch.testing.assert_close(found, expected(rows, layer.weight, layer.scales, **norm, **more))


@at_each_level
def test_rounds_halves_to_even() -> None:
    rows = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127, 126.5]])
    identity = ops.pack(torch.eye(8, dtype=torch.int8))
    assert ops.product(rows, identity, torch.ones(8)).tolist() == [[127, 0, 2, 2, 0, -2, -127, 126]]


@at_each_level
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("weight", [-127, 127])
def test_all_at_their_ranges_end_do_not_overflow(weight: int, sign: int) -> None:
    width = 32768
    packed = ops.pack(torch.full((33, width), weight, dtype=torch.int8))
    found = ops.product(torch.full((2, width), 3.0 * sign), packed, torch.full((33,), 1 / 127))
    torch.testing.assert_close(found, torch.full((2, 33), weight / 127 * 3.0 * sign * width))


@at_each_level
@in_each_form
def test_a_token_is_bit_by_bit_the_same_beside_any_others(form: str) -> None:
    layer = Layer(70, 130, 37, form)
    of_all = layer(bias=layer.bias, onto=layer.onto)
    for token in range(70):
        alone = layer(layer.rows[token : token + 1], bias=layer.bias, onto=layer.onto[token : token + 1])
        assert torch.equal(alone[0], of_all[token])


@by("amx")
@in_each_form
@pytest.mark.parametrize("tokens", [1, 33])
def test_is_bit_by_bit_the_same_by_either_instruction(form: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(tokens, 130, 37, form)
    by_amx = layer(bias=layer.bias, onto=layer.onto)
    monkeypatch.setattr(ops, "level", "avx512_vnni")
    assert torch.equal(layer(bias=layer.bias, onto=layer.onto), by_amx)


@at_each_level
@in_each_form
def test_the_number_of_threads_changes_nothing(form: str) -> None:
    layer, before = Layer(33, 130, 100, form), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):  # 100 outputs are four panels: some threads have none
            torch.set_num_threads(threads)
            found.append(layer(bias=layer.bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@at_each_level
@in_each_form
@pytest.mark.parametrize("place", [0, 15, 16, 47, 49])
def test_what_is_not_a_number_is_none_for_that_token_alone(form: str, place: int) -> None:
    layer = Layer(13, 50, 37, form)
    before = layer(bias=layer.bias, onto=layer.onto)
    layer.rows[4, place] = torch.nan
    found = layer(bias=layer.bias, onto=layer.onto)
    assert found[4].isnan().all()
    others = torch.arange(13) != 4
    assert torch.equal(found[others], before[others])


@at_each_level
def test_what_is_not_a_number_in_a_norms_weight_is_not_lost() -> None:
    layer = Layer(2, 50, 37, "norm")
    layer.more["norm"][0][3] = torch.nan
    assert layer().isnan().all()


@at_each_level
@in_each_form
def test_zeros_give_the_bias(form: str) -> None:
    layer = Layer(13, 50, 37, form)
    zeros = torch.zeros_like(layer.rows)
    assert not layer(zeros).any()
    assert torch.equal(layer(zeros, bias=layer.bias), layer.bias.expand(13, -1))


@at_each_level
def test_silu_is_right_at_any_size() -> None:
    gate = torch.tensor(
        [0, -0.0, 1e-30, -1e-30, 0.34, -0.35, 1, -1, 20, -20, 80, -80, 100, -100, 1e4, -1e4, 1e30, -1e30]
    )
    rows = torch.stack((gate, torch.full_like(gate, 3.0)), 1)  # each alone in its token, so that its scale is its own
    found = ops.product(rows, ops.pack(torch.full((1, 1), 127, dtype=torch.int8)), torch.tensor([1 / 127]), gated=True)
    torch.testing.assert_close(found[:, 0], 3 * nn.functional.silu(gate), rtol=1e-5, atol=1e-29)


@at_each_level
@in_each_form
def test_reads_what_does_not_lie_row_by_row(form: str) -> None:
    layer = Layer(13, 50, 37, form)
    right = layer(bias=layer.bias, onto=layer.onto)
    for apart in (lambda given: given.T.contiguous().T, lambda given: given.repeat_interleave(2, -1)[:, ::2]):
        rows, onto = apart(layer.rows), apart(layer.onto)
        assert not rows.is_contiguous()
        assert not onto.is_contiguous()
        found = ops.product(rows, layer.packed, layer.scales, bias=layer.bias, onto=onto, **layer.more)
        assert torch.equal(found, right)
    assert torch.equal(ops.pack(layer.weight.T.contiguous().T), layer.packed)


@at_each_level
def test_nothing_but_the_outputs_is_written() -> None:
    layer = Layer(13, 50, 37)
    given = [layer.rows, layer.packed, layer.scales, layer.bias, layer.onto]
    before = [tensor.clone() for tensor in given]
    ops.product(*given[:3], bias=layer.bias, onto=layer.onto)
    assert all(torch.equal(now, was) for now, was in zip(given, before, strict=True))


@at_each_level
def test_no_tokens_give_no_outputs() -> None:
    assert Layer(0, 50, 37)().shape == (0, 37)


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or not shutil.which("gcc"),
    reason="needs gcc on Linux on x86_64",
)
def test_is_compiled_for_the_cpus_that_it_is_for() -> None:
    assert (ops.level is not None) == torch.cpu.get_capabilities()["avx512_vnni"], ops._lack
    assert not ops.lack()


@pytest.mark.parametrize(
    ("content", "said"), [(None, "build where there is a C compiler"), (b"of another architecture", "install again")]
)
def test_says_why_nothing_is_computed_in_c(
    content: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "libnative.so"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(ops, "LIBRARY", file)
    library, lack = ops._load()
    assert library is None
    assert str(file) in lack
    assert said in lack


def test_is_not_used_when_a_source_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("libnative.so", "int8.c"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "libnative.so", (1, 1))
    monkeypatch.setattr(ops, "LIBRARY", tmp_path / "libnative.so")
    assert "older than its sources" in ops._load()[1]


def test_fbgemm_computes_where_ours_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "level", None)
    assert gemm.int8_by() == "fbgemm"


class Cache:
    """Keys and values of sequences, scattered over a cache, and one query of each among others'."""

    def __init__(self, lengths: list[int], heads: int = 14, key_heads: int = 2, size: int = 64) -> None:
        torch.manual_seed(sum(lengths))
        places = torch.randperm(sum(lengths) + 50)[: sum(lengths)]
        ends = torch.tensor(lengths).cumsum(0)
        self.keys, self.values = torch.randn(2, sum(lengths) + 50, key_heads, size).to(torch.bfloat16).unbind()
        self.queries = torch.randn(2 * len(lengths), heads, size).to(torch.bfloat16)
        self.asked = {
            "tokens": torch.arange(len(lengths)) * 2 + 1,
            "places": places,
            "spans": torch.stack((ends - torch.tensor(lengths), ends), 1),
        }
        self.scaling = size**-0.5

    def attention(self, sequences: slice = slice(None)) -> torch.Tensor:
        asked = {name: those if name == "places" else those[sequences] for name, those in self.asked.items()}
        return ops.attention(self.queries, self.keys, self.values, scaling=self.scaling, **asked)

    def right(self) -> torch.Tensor:
        found = []
        for token, (start, end) in zip(self.asked["tokens"], self.asked["spans"].tolist(), strict=True):
            places = self.asked["places"][start:end]
            keys, values = (
                those[places].transpose(0, 1).repeat_interleave(self.queries.shape[1] // those.shape[1], 0).double()
                for those in (self.keys, self.values)
            )
            scores = keys @ self.queries[token].double()[:, :, None] * self.scaling
            found.append((scores.softmax(1) * values).sum(1))
        return torch.stack(found).float()


@pytest.mark.skipif(ops.level is None, reason="nothing is computed in C here")
class TestAttention:
    @pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 32), (14, 2, 64), (3, 3, 96), (16, 1, 128)])
    def test_is_exact(self, heads: int, key_heads: int, size: int) -> None:
        assert ops.attends(torch.bfloat16, heads, key_heads, size)
        cache = Cache([1, 2, 31, 32, 33, 64, 100, 700], heads, key_heads, size)
        torch.testing.assert_close(cache.attention(), cache.right(), rtol=1e-5, atol=2e-6)

    def test_of_a_sequence_is_bit_by_bit_the_same_beside_any_others(self) -> None:
        cache = Cache([5, 90, 33, 1])
        together = cache.attention()
        for row in range(4):
            assert torch.equal(cache.attention(slice(row, row + 1))[0], together[row])

    def test_survives_scores_of_any_size(self) -> None:
        cache = Cache([3, 40, 200])
        cache.queries *= 3000
        found = cache.attention()
        assert found.isfinite().all()
        torch.testing.assert_close(found, cache.right(), rtol=1e-3, atol=1e-3)

    def test_reads_queries_that_lie_among_keys_and_values(self) -> None:
        cache = Cache([9, 17])
        expected = cache.attention()
        cache.queries = torch.cat((cache.queries, torch.full_like(cache.queries, torch.nan)), 1)[:, :14]
        assert torch.equal(cache.attention(), expected)
        cache.queries = cache.queries.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(cache.attention(), expected)

    @pytest.mark.parametrize(
        ("dtype", "heads", "key_heads", "size"),
        [(torch.float32, 14, 2, 64), (torch.bfloat16, 34, 2, 64), (torch.bfloat16, 14, 2, 80)],
    )
    def test_leaves_what_it_cannot_compute_to_torch(
        self, dtype: torch.dtype, heads: int, key_heads: int, size: int
    ) -> None:
        assert not ops.attends(dtype, heads, key_heads, size)
