"""The context that the positions of a model allow, in tokens."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from predictor.errors import InvalidSettings, UnsupportedModel
from predictor.models import context_length, load_plan, loader
from predictor.models.context_length import ContextLength
from tests.predictor.models.conftest import Rewrite

THETA = {"rope_theta": 10000.0}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0}
DYNAMIC = THETA | {"rope_type": "dynamic", "factor": 4.0}
LONGROPE = THETA | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ContextLength(1024, 1024)),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 1024}}, ContextLength(4096, 4096)),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 256}}, ContextLength(1024, 1024)),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 512}}, ContextLength(2048, 2048)),
        ({"rope_parameters": DYNAMIC}, ContextLength(1024, 4096)),
        ({"rope_parameters": THETA | {"rope_type": "linear", "factor": 2.0}}, ContextLength(1024, 2048)),
        ({"rope_parameters": LLAMA3}, ContextLength(1024, 1024)),
    ],
    ids=["default", "yarn", "yarn-included", "yarn-partly-included", "dynamic", "linear", "llama3"],
)
def test_context_length_follows_the_rope_type(fields: dict[str, Any], expected: ContextLength) -> None:
    config = transformers.LlamaConfig(max_position_embeddings=1024, **fields)
    assert context_length.context_length(config) == expected


def test_context_length_of_longrope_ends_where_its_factors_change() -> None:
    config = transformers.Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        original_max_position_embeddings=128,
        rope_parameters=LONGROPE,
    )
    assert context_length.context_length(config) == ContextLength(128, 4096)


def test_context_length_of_rope_by_layer_type_is_that_of_all_types() -> None:
    layer_types = ["full_attention", "sliding_attention"]
    linear = THETA | {"rope_type": "linear", "factor": 8.0}
    config = transformers.Gemma3TextConfig(
        max_position_embeddings=2048,
        num_hidden_layers=2,
        layer_types=layer_types,
        rope_parameters={"full_attention": linear, "sliding_attention": THETA | {"rope_type": "default"}},
    )
    assert context_length.context_length(config) == ContextLength(2048, 2048)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": YARN | {"original_max_position_embeddings": 1024}},
        {
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        },
    ],
    ids=["rope_parameters", "rope_scaling"],
)
def test_plan_counts_the_factor_of_yarn_in_both_spellings(
    weights: Path, rewrite: Rewrite, fields: dict[str, Any]
) -> None:
    rewrite("config.json", **fields)
    assert load_plan.make_plan(weights, device="cpu").context_tokens == 4096
    assert load_plan.make_plan(weights, device="cpu", max_model_len=4096).context_tokens == 4096


@pytest.mark.parametrize(("max_model_len", "expected"), [(None, 1024), (1024, 1024), (1000, 1000), (2, 2)])
def test_plan_max_model_len_lowers_the_context(weights: Path, max_model_len: int | None, expected: int) -> None:
    assert load_plan.make_plan(weights, device="cpu", max_model_len=max_model_len).context_tokens == expected


def test_plan_max_model_len_above_the_positions_is_an_error_with_both_numbers(weights: Path, rewrite: Rewrite) -> None:
    expected = r"^--max_model_len is 1025, but .* positions for 1024 tokens\. Set at most 1024, or scale the rope"
    with pytest.raises(InvalidSettings, match=expected):
        load_plan.make_plan(weights, device="cpu", max_model_len=1025)
    rewrite("config.json", rope_parameters=DYNAMIC)
    assert load_plan.make_plan(weights, device="cpu", max_model_len=4096).context_tokens == 4096
    with pytest.raises(InvalidSettings, match=r"positions for 4096 tokens"):
        load_plan.make_plan(weights, device="cpu", max_model_len=4097)


def test_resolve_learned_positions_cannot_be_exceeded() -> None:
    config = transformers.GPT2Config(n_positions=512)
    assert context_length.resolve(config, Path("gpt2"), None) == 512
    with pytest.raises(InvalidSettings, match=r"positions for 512 tokens\. Set at most 512\.$"):
        context_length.resolve(config, Path("gpt2"), 513)


def test_plan_dynamic_rope_warns_that_its_context_can_be_longer(
    weights: Path, rewrite: Rewrite, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite("config.json", rope_parameters=DYNAMIC)
    assert load_plan.make_plan(weights, device="cpu").context_tokens == 1024
    assert "the context is 1024 tokens" in caplog.text
    assert "--max_model_len up to 4096" in caplog.text


def test_load_unlimited_tokenizer_does_not_set_the_context(weights: Path, rewrite: Rewrite) -> None:
    rewrite("tokenizer_config.json", model_max_length=int(1e30))
    assert loader.load(weights, device="cpu").context_tokens == 1024


def test_context_without_positions_is_the_tokenizers_unless_that_is_unlimited() -> None:
    config = transformers.MambaConfig()
    assert context_length.resolve(config, Path("mamba"), None) is None
    assert context_length.resolve(config, Path("mamba"), 300) == 300
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), model_max_length=2048)
    assert context_length.from_tokenizer(tokenizer, Path("mamba")) == 2048
    unlimited = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer())
    with pytest.raises(UnsupportedModel, match=r"length of the context\. Set --max_model_len\."):
        context_length.from_tokenizer(unlimited, Path("mamba"))


def _tokenizer() -> Any:
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
