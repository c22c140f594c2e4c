"""Constants that preflight and the predictor must share without importing each other."""

from predictor.engine import kv_cache
from preflight.checks import resources


def test_tokens_per_sequence_equals_that_of_the_predictor() -> None:
    assert resources.TOKENS_PER_SEQUENCE == kv_cache.SEQUENCE_TOKENS
