"""Attention of each sequence by itself against transformers' attention: identical tokens in float32."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import pytest
import torch
import transformers

from devtools.paths import DEMO_MODEL
from predictor.engine.engine import Engine
from predictor.kernels import attention, sequence_attention, transformers_attention
from predictor.kernels.cpu import ops
from predictor.kernels.cuda import reference
from predictor.models import loader
from predictor.settings import Settings
from predictor.types import SamplingParams
from tests.predictor.engine.conftest import chunks_independent_of_time

__all__ = ["chunks_independent_of_time"]

needs_c = pytest.mark.skipif(ops.cpu_isa is None, reason="C kernels are unavailable")
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, top_p=1.0, top_k=0)


@cache
def load(dtype: str, quantization: str) -> loader.LoadedModel:
    return loader.load(DEMO_MODEL, device="cpu", dtype=dtype, trust_remote_code=False, quantization=quantization)


def generate(
    prompts: list[str],
    *,
    custom_attention: bool = True,
    max_num_batched_tokens: int = 2048,
    dtype: str = "float32",
    quantization: str = "none",
    kv_cache_dtype: Literal["auto", "int8"] = "auto",
    sequential: bool = False,
    model: Any = None,
) -> list[list[int]]:
    """Greedy tokens of all prompts, sequentially, or together and again with cached prefixes."""
    loaded = load(dtype, quantization)
    if model is not None:
        loaded = replace(loaded, model=model)
    loaded.model.set_attn_implementation("sdpa" if loaded.model._supports_sdpa else "eager")
    with pytest.MonkeyPatch.context() as patch:
        if not custom_attention:
            patch.setattr(attention, "install", lambda _: False)
        engine = Engine.from_model(
            loaded.model,
            Settings(
                max_num_seqs=32,
                max_queued_requests=32,
                max_num_batched_tokens=max_num_batched_tokens,
                kv_cache_tokens=16384,
                kv_cache_dtype=kv_cache_dtype,
            ),
            eos_token_ids=loaded.eos_token_ids,
            context_tokens=loaded.context_tokens,
        )
    assert transformers_attention.is_selected(loaded.model, transformers_attention.SEQUENCE) is custom_attention
    engine.start()

    async def read(prompt: str) -> list[int]:
        ids = loaded.tokenizer.encode(prompt)
        # Different lengths, so that steps mix decodes and prefills.
        [stream] = engine.submit([(ids, replace(GREEDY, max_tokens=8 + 5 * (sum(ids) % 7)))])
        try:
            return [token_id async for step in stream for token_id in step.token_ids]
        finally:
            stream.close()

    async def generate_all() -> list[list[int]]:
        if sequential:
            return [await read(prompt) for prompt in prompts]
        rounds = [await asyncio.gather(*map(read, prompts)) for _ in range(2)]
        return [*rounds[0], *rounds[1]]

    try:
        return asyncio.run(generate_all())
    finally:
        engine.stop()


# One has a complete page, which its sequence of the second round shares.
PROMPTS = [f"{a}+{a * b}=" * (1 + 6 * (b % 4)) for a in (2, 3) for b in range(1, 5)] + ["4", "12+34=" * 50]


@cache
def by_transformers() -> list[list[int]]:
    return generate(PROMPTS, custom_attention=False)


def only_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "supports_paged_attention", lambda *_: False)


def only_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_attention, "_attend_with_sdpa", None)


@pytest.mark.parametrize("max_num_batched_tokens", [2048, 16], ids=["whole-prompts", "chunked-prompts"])
@pytest.mark.parametrize("only", [only_sdpa, pytest.param(only_c, marks=needs_c)])
def test_attend_in_float32_matches_transformers(
    max_num_batched_tokens: int, only: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    actual = generate(PROMPTS, max_num_batched_tokens=max_num_batched_tokens)
    assert actual == by_transformers()
    assert any(len(tokens) > 1 for tokens in actual)


@needs_c
@pytest.mark.parametrize(
    ("model_type", "options", "limits"),
    [
        ("qwen2", {"use_sliding_window": True}, [2048, 16]),
        ("gemma2", {"head_dim": 16, "attn_logit_softcapping": 1.5}, [16]),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, [16]),
    ],
)
def test_windows_caps_and_sinks_in_c_match_transformers(
    model_type: str, options: dict[str, Any], limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that end within prompts, at their ends, and while tokens are generated."""
    model = random_model(model_type, **options)
    expected = generate(PROMPTS, custom_attention=False, model=model)
    only_c(monkeypatch)
    for limit in limits:
        assert generate(PROMPTS, model=model, max_num_batched_tokens=limit) == expected


def random_model(model_type: str, **options: Any) -> Any:
    """A model with and without windows by turns, whose tokens depend on the smallest mistakes."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=load("float32", "none").model.config.vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.5,
        **options,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("model_type", "options", "only"),
    [
        ("qwen2", {"use_sliding_window": True}, only_sdpa),
        pytest.param("qwen2", {"use_sliding_window": True}, only_c, marks=needs_c),
        pytest.param(
            "gpt_oss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, only_c, marks=needs_c
        ),
    ],
)
def test_int8_cache_with_windows_and_sinks_is_near_that_of_transformers(
    model_type: str,
    options: dict[str, Any],
    only: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys are rounded in the same way everywhere, and tokens differ where the sums before them round differently."""
    model, prompts = random_model(model_type, **options), PROMPTS[:10]
    expected = generate(prompts, custom_attention=False, model=model, kv_cache_dtype="int8")
    only(monkeypatch)
    actual = generate(prompts, model=model, kv_cache_dtype="int8", max_num_batched_tokens=16)
    equal = sum(tokens == others for tokens, others in zip(actual, expected, strict=True))
    assert equal >= 0.7 * len(expected)


@needs_c
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_tokens_are_independent_of_chunks(dtype: str) -> None:
    whole = generate(PROMPTS, dtype=dtype, quantization="8bit")
    assert whole == generate(PROMPTS, dtype=dtype, quantization="8bit", max_num_batched_tokens=37)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_tokens_are_independent_of_the_batch(dtype: str) -> None:
    prompts = [f"{a}+{b}=" for a in range(10, 18) for b in range(20, 24)]
    assert len(prompts) == 32
    together = generate(prompts, dtype=dtype, quantization="8bit")
    alone = generate(prompts[::4], dtype=dtype, quantization="8bit", sequential=True)
    assert together[::4] == [*alone, *alone]


def test_window_hides_the_keys_that_the_reference_does_not_see() -> None:
    window, num_heads, num_kv_heads = 4, 4, 2
    # A decode, prompts longer and shorter than the window, and a chunk with all earlier keys that the cache keeps.
    q_lengths, k_lengths = [1, 9, 3, 6], [4, 9, 3, 9]
    torch.manual_seed(1)
    query = torch.randn(num_heads, sum(q_lengths), 8)
    key, value = torch.randn(2, num_kv_heads, sum(k_lengths), 8)
    cu_seq_q, cu_seq_k = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (q_lengths, k_lengths)
    )
    metadata = sequence_attention._build_windowed_metadata(cu_seq_q, cu_seq_k, torch.zeros(0), window)
    outputs = [sequence_attention._single(query, key, value, single, 0.5) for single in metadata.singles]
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    options: dict[str, Any] = {"scale": 0.5, "window_size": (window - 1, 0), "enable_gqa": True}
    expected = reference.varlen_attn(query, key, value, cu_seq_q, cu_seq_k, 9, 9, **options)
    torch.testing.assert_close(torch.cat(outputs), expected)
