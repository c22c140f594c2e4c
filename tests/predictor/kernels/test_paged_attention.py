"""Attention in C over a paged KV cache against float64, and bit by bit against itself in other steps."""

import math
from typing import Any

import pytest
import torch

from predictor.kernels import int8_heads
from predictor.kernels.cpu import ops
from tests.predictor.kernels.products import assert_independent_of_threads

pytestmark = pytest.mark.skipif(ops.cpu_isa is None, reason="C kernels are unavailable")


class Sequences:
    """Random queries, keys and values of whole sequences, which a step computes in parts.

    Args:
        lengths: of the sequences.
        heads: number of query heads and of KV heads, and head_dim.
        dtype: of the states.
        is_int8: whether keys and values are int8 heads.
        options: `window`, `softcap` and `sinks` of `ops.paged_attention`.
    """

    def __init__(
        self,
        lengths: list[int],
        heads: tuple[int, int, int] = (6, 2, 64),
        dtype: torch.dtype = torch.bfloat16,
        *,
        is_int8: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(sum(lengths))
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.scale = self.head_dim**-0.5
        self.options, self.is_int8 = options, is_int8
        self.queries, self.keys, self.values = (
            [torch.randn(length, count, self.head_dim).to(dtype) for length in lengths]
            for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        )

    def step(self, parts: list[tuple[int, int, int]], tile_queries: int | None = None) -> list[torch.Tensor]:
        """Compute tokens [start, end) of each (sequence, start, end), those before are in the cache if the window has
        them."""
        window = self.options.get("window") or math.inf
        first_keys = [max(0, start - int(min(window - 1, start))) for _, start, _ in parts]
        slots = sum(start - first for (_, start, _), first in zip(parts, first_keys, strict=True))
        slot_mapping = torch.randperm(slots + 50)[:slots]
        caches = [self._unwritten(slots + 50) for _ in "kv"]
        sequences, tiles, slot, token = [], [], 0, 0
        size = tile_queries or ops.ATTENTION_ROWS // (self.num_heads // self.num_kv_heads)
        for row, ((seq, start, end), first) in enumerate(zip(parts, first_keys, strict=True)):
            written = slot_mapping[slot : slot + start - first]
            for cache, states in zip(caches, (self.keys, self.values), strict=True):
                cache[written] = self._stored(states[seq][first:start])
            sequences.append([token, start, first, slot])
            tiles += [[row, query, min(size, end - start - query)] for query in range(0, end - start, size)]
            slot, token = slot + start - first, token + end - start
        query, key, value = (
            torch.cat([of[seq][start:end] for seq, start, end in parts])
            for of in (self.queries, self.keys, self.values)
        )
        indices: dict[str, Any] = {
            "slot_mapping": slot_mapping,
            "sequences": torch.tensor(sequences),
            "tiles": torch.tensor(tiles),
        }
        key, value = self._stored(key), self._stored(value)
        key_cache, value_cache = caches
        output = ops.paged_attention(
            query, key, value, key_cache, value_cache, scale=self.scale, **indices, **self.options
        )
        return list(output.split([end - start for _, start, end in parts]))

    def _stored(self, states: torch.Tensor) -> torch.Tensor:
        return int8_heads.quantize(states) if self.is_int8 else states

    def _unwritten(self, slots: int) -> torch.Tensor:
        """A cache of NaN: int8 heads have scales of all bits set."""
        heads = self._stored(self.keys[0])
        return torch.full((slots, *heads.shape[1:]), -1 if self.is_int8 else torch.nan, dtype=heads.dtype)

    def expected(self, seq: int) -> torch.Tensor:
        """Compute a sequence in float64."""
        length, groups = len(self.queries[seq]), self.num_heads // self.num_kv_heads
        key, value = self.keys[seq], self.values[seq]
        if self.is_int8:
            key, value = (int8_heads.dequantize(self._stored(of), self.head_dim, torch.float32) for of in (key, value))
        query, key, value = (of.double().transpose(0, 1) for of in (self.queries[seq], key, value))
        scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * self.scale
        if softcap := self.options.get("softcap"):
            scores = softcap * (scores / softcap).tanh()
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        if window := self.options.get("window"):
            visible.triu_(1 - window)
        scores.masked_fill_(~visible, -torch.inf)
        sinks = self.options.get("sinks")
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, length, 1)), -1)
        weights = scores.softmax(-1)[..., :length]
        return (weights @ value.repeat_interleave(groups, 0)).transpose(0, 1).float()

    def one_by_one(self, seq: int) -> torch.Tensor:
        """Compute a sequence in one step for each token."""
        return torch.cat([self.step([(seq, token, token + 1)])[0] for token in range(len(self.queries[seq]))])


HEADS = [
    (4, 2, 16),
    (4, 4, 32),
    (14, 2, 64),
    (3, 1, 80),
    (3, 3, 96),
    (16, 1, 128),
    (5, 1, 192),
    (8, 4, 256),
    (96, 1, 16),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 37},
    "short-window": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.linspace(-1, 3, 6)},
    "all": {"window": 70, "softcap": 1.5, "sinks": torch.linspace(-1, 3, 6)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


@each_dtype
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prompts_and_decodes_match_float64(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert ops.supports_paged_attention(dtype, *heads)
    sequences = Sequences([1, 63, 64, 65, 200], heads, dtype)
    expected = [sequences.expected(seq) for seq in range(5)]
    for output, whole in zip(sequences.step([(seq, 0, len(expected[seq])) for seq in range(5)]), expected, strict=True):
        torch.testing.assert_close(output, whole, rtol=1e-5, atol=3e-6)
    parts = [(seq, len(expected[seq]) - 1, len(expected[seq])) for seq in range(5)]
    for output, whole in zip(sequences.step(parts), expected, strict=True):
        torch.testing.assert_close(output, whole[-1:], rtol=1e-5, atol=3e-6)


@each_option
def test_forms_of_scores_match_float64(options: dict[str, Any]) -> None:
    sequences = Sequences([150], **options)
    torch.testing.assert_close(sequences.step([(0, 0, 150)])[0], sequences.expected(0), rtol=1e-5, atol=3e-6)


@each_dtype
@each_option
@pytest.mark.parametrize("is_int8", [False, True], ids=["same-dtype", "int8"])
def test_a_token_is_bit_identical_in_any_step(options: dict[str, Any], dtype: torch.dtype, is_int8: bool) -> None:
    sequences = Sequences([150, 3, 64], dtype=dtype, is_int8=is_int8, **options)
    alone = [sequences.one_by_one(seq) for seq in range(3)]
    together = sequences.step([(0, 0, 150), (1, 0, 3), (2, 0, 64)])
    assert all(torch.equal(*outputs) for outputs in zip(together, alone, strict=True))
    # Chunks of prompts, decodes and verified guesses.
    for parts in ([(0, 0, 66), (1, 2, 3)], [(0, 66, 129), (2, 0, 5)], [(0, 129, 145), (2, 63, 64)], [(0, 145, 150)]):
        for tile_queries in (None, 5):
            for (seq, start, end), output in zip(parts, sequences.step(parts, tile_queries), strict=True):
                assert torch.equal(output, alone[seq][start:end])


@pytest.mark.parametrize("is_int8", [False, True], ids=["same-dtype", "int8"])
def test_results_are_bit_identical_with_any_thread_count(is_int8: bool) -> None:
    sequences = Sequences([40, 130], is_int8=is_int8)
    assert_independent_of_threads(lambda: torch.cat(sequences.step([(0, 0, 40), (1, 3, 130)])))


INT8_BOUNDS = {"rtol": 2e-4, "atol": 2e-4}
"""Queries have 15 bits for products with keys in int8."""


@each_dtype
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_int8_prompts_and_decodes_match_float64(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    sequences = Sequences([1, 63, 64, 65, 200], heads, dtype, is_int8=True)
    expected = [sequences.expected(seq) for seq in range(5)]
    for output, whole in zip(sequences.step([(seq, 0, len(expected[seq])) for seq in range(5)]), expected, strict=True):
        torch.testing.assert_close(output, whole, **INT8_BOUNDS)
    parts = [(seq, len(expected[seq]) - 1, len(expected[seq])) for seq in range(5)]
    for output, whole in zip(sequences.step(parts), expected, strict=True):
        torch.testing.assert_close(output, whole[-1:], **INT8_BOUNDS)


@each_option
def test_int8_forms_of_scores_match_float64(options: dict[str, Any]) -> None:
    sequences = Sequences([150], is_int8=True, **options)
    torch.testing.assert_close(sequences.step([(0, 0, 150)])[0], sequences.expected(0), **INT8_BOUNDS)


@pytest.mark.parametrize("query", [0.0, 1e-35, math.inf, math.nan])
def test_int8_with_queries_of_any_size_matches_float64(query: float) -> None:
    sequences = Sequences([70], is_int8=True)
    before = sequences.step([(0, 0, 70)])[0]
    sequences.queries[0][66] = query
    [output] = sequences.step([(0, 0, 70)])
    others = [token for token in range(70) if token != 66]
    assert torch.equal(output[others], before[others])
    if math.isfinite(query):
        torch.testing.assert_close(output[66], sequences.expected(0)[66], **INT8_BOUNDS)
    else:
        assert output[66].isnan().all()


def test_large_scores_are_finite() -> None:
    sequences = Sequences([200])
    sequences.queries[0] *= 3000
    [output] = sequences.step([(0, 0, 200)])
    assert output.isfinite().all()
    torch.testing.assert_close(output, sequences.expected(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_int8", [False, True], ids=["same-dtype", "int8"])
def test_nan_stays_in_its_sequence(is_int8: bool) -> None:
    sequences = Sequences([20, 90], is_int8=is_int8)
    before = sequences.step([(0, 0, 20), (1, 60, 90)])
    sequences.keys[0][3] = torch.nan
    outputs = sequences.step([(0, 0, 20), (1, 60, 90)])
    assert outputs[0][3:].isnan().all()
    assert torch.equal(outputs[0][:3], before[0][:3])
    assert torch.equal(outputs[1], before[1])


def test_strided_states_give_the_same_result() -> None:
    sequences = Sequences([30, 20])
    parts = [(0, 0, 30), (1, 10, 20)]
    expected = torch.cat(sequences.step(parts))
    for of in (sequences.queries, sequences.keys, sequences.values):
        of[:] = [torch.cat((states, torch.full_like(states, torch.nan)), 1)[:, : states.shape[1]] for states in of]
    assert torch.equal(torch.cat(sequences.step(parts)), expected)


@pytest.mark.parametrize(
    ("dtype", "num_heads", "num_kv_heads", "head_dim"),
    [
        (torch.float16, 14, 2, 64),
        (torch.bfloat16, 97, 1, 64),
        (torch.bfloat16, 14, 2, 72),
        (torch.bfloat16, 14, 2, 272),
    ],
)
def test_unsupported_heads_are_rejected(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    assert not ops.supports_paged_attention(dtype, num_heads, num_kv_heads, head_dim)
