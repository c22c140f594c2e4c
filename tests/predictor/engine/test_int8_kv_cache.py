"""A KV cache in int8: the same tokens in any batch, chunk, shared prefix and with guesses, in half the memory."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from demo import evaluate, exam
from devtools.paths import DEMO_MODEL
from predictor.engine import kv_cache
from predictor.engine.engine import Engine
from predictor.engine.kv_cache import PAGE_TOKENS
from predictor.errors import InvalidSettings
from predictor.generation import model_load
from predictor.generation.service import LLMService
from predictor.kernels.cpu import ops
from predictor.models import loader, placement
from predictor.models.loader import LoadedModel
from predictor.models.snapshot import Snapshot
from predictor.resources import memory
from predictor.settings import Settings
from predictor.types import SamplingParams
from tests.predictor.engine.conftest import (
    GREEDY,
    assert_logprobs,
    chat_ids,
    generate,
    generate_all,
    random_ids,
    started,
    until_idle,
)

needs_c = pytest.mark.skipif(
    not ops.supports_paged_attention(torch.bfloat16, 4, 2, 32), reason="no C attention on this CPU"
)

Requests = list[tuple[list[int], SamplingParams]]
INT8: dict[str, Any] = {"kv_cache_dtype": "int8"}
SAMPLED = SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def quantized() -> LoadedModel:
    return loader.load(DEMO_MODEL, device="cpu", dtype="bfloat16", trust_remote_code=False, quantization="8bit")


@pytest.fixture(scope="module")
def int8(quantized: LoadedModel) -> Iterator[Engine]:
    with started(quantized, speculation="none", **INT8) as engine:
        yield engine


def requests(loaded: LoadedModel) -> Requests:
    """Sums, repetitions and a prompt of more than one page."""
    sums = [(chat_ids(loaded, f"What is {number} + {number % 7}?"), GREEDY) for number in range(11, 14)]
    repeated = [([7, 8, 9, seed] * 9, replace(SAMPLED, seed=seed)) for seed in range(20, 23)]
    return [*sums, *repeated, (random_ids(loaded, PAGE_TOKENS + 44, seed=1), SAMPLED)]


@needs_c
def test_int8_cache_tokens_are_the_same_alone_and_with_neighbours(int8: Engine, quantized: LoadedModel) -> None:
    alone = [generate(int8, *request) for request in requests(quantized)]
    assert generate_all(int8, requests(quantized)) == alone


@needs_c
@pytest.mark.parametrize("max_num_batched_tokens", [37, 1024])
def test_int8_cache_tokens_are_the_same_in_any_chunks(
    int8: Engine, quantized: LoadedModel, max_num_batched_tokens: int
) -> None:
    expected = generate_all(int8, requests(quantized))
    limits = {"speculation": "none", "max_num_batched_tokens": max_num_batched_tokens}
    with started(quantized, **limits, **INT8) as engine:
        assert generate_all(engine, requests(quantized)) == expected


@needs_c
def test_int8_cache_tokens_are_the_same_after_a_shared_prefix(int8: Engine, quantized: LoadedModel) -> None:
    prefix = random_ids(quantized, 2 * PAGE_TOKENS, seed=2)
    first, second = ((prefix + random_ids(quantized, 9, seed=seed), SAMPLED) for seed in (3, 4))
    with started(quantized, speculation="none", **INT8) as fresh:
        expected = generate(fresh, *second)
    generate(int8, *first)
    steps = int8.steps
    assert generate(int8, *second) == expected
    # One step for the rest of the prompt instead of five for all of it.
    assert int8.steps - steps == len(expected.token_ids)


@needs_c
def test_int8_cache_tokens_are_the_same_with_guesses(int8: Engine, quantized: LoadedModel) -> None:
    expected = generate_all(int8, requests(quantized))
    with started(quantized, speculation="prompt_lookup", **INT8) as engine:
        assert generate_all(engine, requests(quantized)) == expected
        assert engine.speculation.num_accepted_tokens > 0


@needs_c
def test_int8_cache_that_is_full_gives_the_same_tokens(int8: Engine, quantized: LoadedModel) -> None:
    """Sequences leave and start again, whose keys are then computed in other steps."""
    crowd = [(random_ids(quantized, 200, seed), replace(SAMPLED, max_tokens=70, seed=seed)) for seed in range(5)]
    expected = [generate(int8, *request) for request in crowd]
    with started(quantized, kv_cache_tokens=1024, **INT8) as engine:
        assert generate_all(engine, crowd) == expected
        asyncio.run(until_idle(engine))
        assert engine.cache_usage == 0.0


@pytest.mark.parametrize("in_c", [pytest.param(True, marks=needs_c), False])
def test_int8_cache_log_probabilities_are_near_those_of_the_model(
    loaded: LoadedModel, reference: LoadedModel, monkeypatch: pytest.MonkeyPatch, in_c: bool
) -> None:
    if not in_c:
        monkeypatch.setattr(ops, "supports_paged_attention", lambda *_: False)
    with started(loaded, **INT8) as engine:
        for number in range(20, 24):
            ids = chat_ids(loaded, f"What is {number} + 9?")
            answer = generate(engine, ids, replace(GREEDY, logprobs=1))
            text = loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            assert exam.final_number(text) == number + 9
            assert_logprobs(reference, ids, answer, 1, tolerance=0.1)


def test_int8_cache_passes_the_exam(quantized: LoadedModel) -> None:
    sums = exam.held_out_questions(200)
    with started(quantized, max_num_seqs=32, max_queued_requests=200, **INT8) as engine:
        answers = generate_all(engine, [(chat_ids(quantized, question), GREEDY) for question, _ in sums])
    texts = [quantized.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
    assert evaluate.accuracy(texts, [result for _, result in sums]) >= 0.97


def test_int8_cache_has_little_more_than_half_the_bytes(loaded: LoadedModel, quantized: LoadedModel) -> None:
    sizes = {}
    for name, model in (("float32", loaded), ("bfloat16", quantized)):
        for dtype in ("auto", "int8"):
            with started(model, kv_cache_dtype=dtype, speculation="none", kv_cache_tokens=1024) as engine:
                assert engine.cache_tokens == 1024
                cache = engine._executor._manager.batch_processor.cache  # type: ignore[attr-defined]
                sizes[name, dtype] = cache.cache_tensor.nbytes
    # Of 32 numbers each, with a scale of two bytes.
    assert sizes["bfloat16", "int8"] * 64 == sizes["bfloat16", "auto"] * 34
    assert sizes["float32", "int8"] * 128 == sizes["float32", "auto"] * 34


def test_int8_cache_of_the_same_memory_has_more_tokens(quantized: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _: 64 * 2**20)
    auto, int8 = (
        kv_cache.token_budget(
            quantized.model,
            Settings(max_num_seqs=200, max_num_batched_tokens=200, **changes),
            context_tokens=1024,
            dense_mask=False,
            in_place=True,
        )
        for changes in ({}, INT8)
    )
    assert int8 / auto == pytest.approx(64 / 34, rel=0.02)


@pytest.mark.parametrize("device", [torch.device("cuda", 1), torch.device("mps")], ids=str)
def test_int8_cache_on_a_gpu_is_refused_before_weights_are_read(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "choose_device", lambda _: device)
    monkeypatch.setattr(loader, "load", None)
    load: Any = model_load.load_weights
    with pytest.raises(InvalidSettings, match=f"--kv_cache_dtype int8 needs a CPU, but the device is {device}. Set"):
        load(Settings(**INT8), Snapshot(DEMO_MODEL, None), None, time_phase=None, report_weights=None)


def test_int8_cache_is_named_in_the_log_and_warms_up(caplog: pytest.LogCaptureFixture) -> None:
    service = LLMService(
        Settings(model_dir=DEMO_MODEL, device="cpu", dtype="float32", max_num_seqs=4, kv_cache_tokens=1024, **INT8)
    )
    try:
        with caplog.at_level("INFO"):
            service.load()
        assert service.is_ready
    finally:
        service.stop()
    assert "KV cache of 1024 tokens in int8" in caplog.text
