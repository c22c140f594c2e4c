"""Constants that preflight and the predictor must share without importing each other."""

from predictor.engine import kv_cache
from predictor.kernels import int8_heads
from preflight.checks import resources


def test_tokens_per_sequence_equals_that_of_the_predictor() -> None:
    assert resources.TOKENS_PER_SEQUENCE == kv_cache.SEQUENCE_TOKENS


def test_cache_bytes_of_int8_are_those_of_the_predictor() -> None:
    for head_dim in (64, 80, 128):
        model = resources.Model(1, 1, 3, 4, 2, head_dim, 1, tied=True, dtype="bfloat16")
        assert model.cache_bytes(10, "int8") == 10 * 2 * 3 * 2 * int8_heads.head_bytes(head_dim)
