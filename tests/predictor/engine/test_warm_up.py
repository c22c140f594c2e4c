"""The warm-up compares the engine with forward passes without a KV cache."""

import asyncio
import math
from pathlib import Path

import pytest
import torch

from devtools.architectures import CASES, save_model
from devtools.paths import DEMO_MODEL
from predictor.engine import warm_up
from predictor.errors import GenerationFailed, StartupError
from predictor.generation.service import LLMService
from predictor.kernels import past_key_values
from predictor.models import architectures, loader
from predictor.models.loader import LoadedModel
from predictor.settings import Settings
from tests.predictor.engine.conftest import started
from tests.predictor.servers import HANG_SECONDS


def served(directory: Path) -> LLMService:
    settings = Settings(model_dir=directory, device="cpu", task="generate", max_num_seqs=4, kv_cache_tokens=1024)
    return LLMService(settings)


@pytest.mark.parametrize(("name", "model"), [("bloom", "BloomForCausalLM"), ("bert", "BertLMHeadModel")])
def test_warm_up_refuses_a_model_whose_attention_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, model: str
) -> None:
    save_model(CASES[name], tmp_path)
    monkeypatch.setattr(architectures, "refusal", lambda *_, **__: None)
    service = served(tmp_path)
    try:
        with pytest.raises(StartupError, match=rf"this {model} failed: its tokens are not those of a forward pass"):
            service.load()
        assert not service.is_ready
    finally:
        service.stop()


def test_warm_up_refuses_layers_that_drop_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(CASES["nemotron"], tmp_path)
    monkeypatch.setattr(past_key_values, "MODEL_TYPES", frozenset())
    service = served(tmp_path)
    try:
        with pytest.raises(StartupError, match=r"this NemotronForCausalLM failed: .* docs/architectures\.md"):
            service.load()
    finally:
        service.stop()


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_warm_up_accepts_fused_layers(quantization: str) -> None:
    loaded = loader.load(DEMO_MODEL, device="cpu", dtype="bfloat16", quantization=quantization)
    with started(loaded) as engine:
        before = loaded.model.config._attn_implementation
        asyncio.run(engine.warm_up(loaded.vocabulary_tokens, HANG_SECONDS))
        assert loaded.model.config._attn_implementation == before
        assert (engine.running, engine.waiting) == (0, 0)


@pytest.mark.parametrize("max_num_seqs", [1, 2])
def test_warm_up_fits_the_smallest_context_and_queue(loaded: LoadedModel, max_num_seqs: int) -> None:
    with started(loaded, max_num_seqs=max_num_seqs, max_queued_requests=0) as engine:
        engine.context_tokens = 2
        asyncio.run(engine.warm_up(loaded.vocabulary_tokens, HANG_SECONDS))


@pytest.mark.parametrize(("vocabulary", "context", "lengths"), [(512, 1024, [16, 8]), (3, 5, [3, 2]), (1, 2, [1, 1])])
def test_warm_up_prompts_fit_vocabulary_and_context(vocabulary: int, context: int, lengths: list[int]) -> None:
    prompts, max_tokens = warm_up.make_prompts(vocabulary, context, 8)
    assert [len(prompt) for prompt in prompts] == lengths
    assert all(0 <= token < vocabulary for prompt in prompts for token in prompt)
    assert max_tokens >= 1
    assert max(lengths) + max_tokens <= context
    assert warm_up.make_prompts(vocabulary, context, 1)[0] == prompts[:1]


def test_warm_up_check_allows_near_ties_by_dtype() -> None:
    logits = torch.zeros(3, 100)
    logits[0, 7], logits[0, 8] = 10.0, 9.5
    warm_up.check(logits, [7, 0])
    assert warm_up.shortfall(logits[:2], [8]) == pytest.approx(0.05)
    with pytest.raises(GenerationFailed, match=r"5% of the row's range"):
        warm_up.check(logits[:2], [8])
    warm_up.check(logits[:2].bfloat16(), [8])
    with pytest.raises(GenerationFailed, match="nan%"):
        warm_up.check(torch.full((2, 100), math.nan), [8])
