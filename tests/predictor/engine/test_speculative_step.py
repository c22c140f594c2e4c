"""Tokens, log probabilities and ends of sequences are bit by bit the same with and without guesses."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from devtools import architectures
from devtools.paths import DEMO_MODEL
from predictor.engine.engine import Engine
from predictor.engine.fair_queue import FairQueue
from predictor.engine.prompt_lookup import PromptLookup
from predictor.engine.speculative_step import has_independent_rows
from predictor.kernels.cpu import ops
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.types import Caller, FinishReason, SamplingParams
from tests.predictor.engine import sampling
from tests.predictor.engine.conftest import (
    GREEDY,
    Generated,
    chat_ids,
    generate,
    generate_all,
    random_ids,
    read,
    started,
    until_idle,
)
from tests.predictor.servers import HANG_SECONDS
from tests.sizes import IS_NIGHTLY

pytestmark = [
    pytest.mark.skipif(
        not ops.supports_paged_attention(torch.bfloat16, 4, 2, 64), reason="no C attention on this CPU, so no guesses"
    ),
]

Requests = list[tuple[list[int], SamplingParams]]
EVEN = np.packbits(np.arange(4096) % 2 == 0, bitorder="little")
FEATURES = [
    {**parameters, "token_masks": (lambda: lambda *_: EVEN,)} if "token_masks" in parameters else parameters
    for parameters in sampling.PARAMETERS
]
GREEDY_30 = replace(GREEDY, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def quantized() -> LoadedModel:
    return loader.load(DEMO_MODEL, device="cpu", dtype="bfloat16", trust_remote_code=False, quantization="8bit")


# Room for all prompts of a step: the chunks of a longer one depend on what else runs.
BATCH: dict[str, Any] = {"max_num_batched_tokens": 1024}


@pytest.fixture(scope="module")
def plain(quantized: LoadedModel) -> Iterator[Engine]:
    with started(quantized, speculation="none", **BATCH) as engine:
        yield engine


@pytest.fixture(scope="module")
def speculative(quantized: LoadedModel) -> Iterator[Engine]:
    with started(quantized, speculation="prompt_lookup", **BATCH) as engine:
        yield engine


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Callable[[Requests, Sequence[Generated]], None]:
    """Makes guesses from known answers, of which about every sixth token is wrong."""

    def install(requests: Requests, answers: Sequence[Generated]) -> None:
        texts = [[*ids, *answer.token_ids] for (ids, _), answer in zip(requests, answers, strict=True)]

        def guess(lookup: PromptLookup, count: int) -> list[int]:
            known = lookup._token_ids
            text = next(text for text in texts if text[: len(known)] == known)
            rng = random.Random(len(known))
            return [
                token_id if rng.random() > 1 / 6 else rng.randrange(5, 200)
                for token_id in text[len(known) : len(known) + count]
            ]

        monkeypatch.setattr(PromptLookup, "guess", guess)

    return install


def accepted(engine: Engine) -> int:
    return engine.speculation.num_accepted_tokens


def mixed_requests(loaded: LoadedModel, count: int, max_tokens: int) -> Requests:
    """Chats, texts that repeat and random texts, with each sampling feature in turn."""
    rng = random.Random(count)
    requests: Requests = []
    for index in range(count):
        ids = random_ids(loaded, rng.randrange(2, 40), index)
        prompt = [chat_ids(loaded, f"What is {index} + {index % 7}?"), ids * 3, ids][index % 3]
        parameters = {"seed": index, "max_tokens": max_tokens, "ignore_eos": bool(index % 5), **FEATURES[index % 17]}
        requests.append((prompt, SamplingParams(**parameters)))
    return requests


def test_speculative_step_alone_is_exact_with_each_sampling_feature(
    plain: Engine, speculative: Engine, quantized: LoadedModel, oracle: Callable[..., None]
) -> None:
    requests = mixed_requests(quantized, len(FEATURES), 16)
    expected = generate_all(plain, requests)
    oracle(requests, expected)
    before = speculative.steps, accepted(speculative)
    assert [generate(speculative, *request) for request in requests] == expected
    gained = accepted(speculative) - before[1]
    assert gained > 50
    tokens = sum(len(answer.token_ids) for answer in expected)
    assert speculative.steps - before[0] == tokens - gained


def test_speculative_step_in_a_crowd_is_exact(plain: Engine, speculative: Engine, quantized: LoadedModel) -> None:
    # More sequences than places, which arrive while others decode; the model's own repetitions are guessed.
    requests = mixed_requests(quantized, 30, 24)
    before = accepted(speculative)
    assert generate_all(speculative, requests) == generate_all(plain, requests)
    assert accepted(speculative) > before


@pytest.mark.slow
def test_speculative_step_of_many_prompts_is_exact(plain: Engine, speculative: Engine, quantized: LoadedModel) -> None:
    count = 1000 if IS_NIGHTLY else 240
    requests = mixed_requests(quantized, count, 24)
    before = accepted(speculative)
    for begin in range(0, count, 20):
        # Batches of one to twenty sequences, so that the policy guesses at times.
        size = 1 + 20 * begin // count
        part = requests[begin : begin + 20]
        expected = generate_all(plain, part)
        actual = [one for first in range(0, 20, size) for one in generate_all(speculative, part[first : first + size])]
        assert actual == expected
    assert accepted(speculative) > before


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 8, 9])
def test_speculative_step_ends_at_the_last_token(
    speculative: Engine, quantized: LoadedModel, plain: Engine, oracle: Callable[..., None], max_tokens: int
) -> None:
    ids = random_ids(quantized, 20, seed=3)
    full = generate(plain, ids, GREEDY_30)
    oracle([(ids, GREEDY_30)], [full])
    answer = generate(speculative, ids, replace(GREEDY_30, max_tokens=max_tokens))
    assert (answer.token_ids, answer.reason) == (full.token_ids[:max_tokens], FinishReason.LENGTH)


def test_speculative_step_ends_at_a_stop_token_among_right_guesses(
    speculative: Engine, quantized: LoadedModel, plain: Engine, oracle: Callable[..., None]
) -> None:
    ids = random_ids(quantized, 20, seed=3)
    full = generate(plain, ids, GREEDY_30)
    oracle([(ids, GREEDY_30)], [full])
    for stop in sorted(set(full.token_ids[:12])):
        answer = generate(speculative, ids, replace(GREEDY_30, stop_token_ids=(stop,)))
        end = full.token_ids.index(stop) + 1
        assert (answer.token_ids, answer.reason) == (full.token_ids[:end], FinishReason.STOP_SEQUENCE)


def test_speculative_step_shares_pages_that_accepted_tokens_complete(
    speculative: Engine, quantized: LoadedModel, plain: Engine, oracle: Callable[..., None]
) -> None:
    # The output crosses a page of 256 tokens at each place of a draft in turn, with wrong guesses behind it.
    cache = internals(speculative).cache
    for length in range(238, 242):
        ids = random_ids(quantized, length, seed=length)
        first = generate(plain, ids, GREEDY_30)
        follow_up = [*ids, *first.token_ids[:25]]
        second = generate(plain, follow_up, GREEDY_30)
        oracle([(ids, GREEDY_30)], [first])
        assert generate(speculative, ids, GREEDY_30) == first
        [allocator] = cache.cache_allocators.values()
        assert allocator.match_prefix_blocks(follow_up)
        oracle([(follow_up, GREEDY_30)], [second])
        assert generate(speculative, follow_up, GREEDY_30) == second


def internals(engine: Engine) -> Any:
    """The manager's batch processor."""
    return engine._executor._manager.batch_processor  # type: ignore[attr-defined]


def test_speculative_step_charges_a_caller_for_right_guesses_only(
    speculative: Engine,
    quantized: LoadedModel,
    plain: Engine,
    oracle: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = random_ids(quantized, 20, seed=3)
    oracle([(ids, GREEDY_30)], [generate(plain, ids, GREEDY_30)])

    async def charge(engine: Engine) -> float:
        queue = FairQueue()
        monkeypatch.setattr(internals(engine).scheduler, "fair_queue", queue)
        [stream] = engine.submit([(ids, GREEDY_30)], caller=Caller("alice"))
        await read(stream)
        async with asyncio.timeout(HANG_SECONDS):
            while engine.speculation.accepted:  # noqa: ASYNC110, the last step is charged after its tokens are read
                await asyncio.sleep(0.001)
        return queue._used["alice"]

    before = speculative.speculation.num_draft_tokens, accepted(speculative)
    charges = [asyncio.run(charge(engine)) for engine in (plain, speculative)]
    rejected = speculative.speculation.num_draft_tokens - before[0] - (accepted(speculative) - before[1])
    assert rejected > 0
    assert charges == [20 + 29, 20 + 29], "the last token is not computed"


def test_speculative_step_in_a_full_cache_completes_all_sequences(quantized: LoadedModel) -> None:
    requests = [
        (random_ids(quantized, 200, seed) + [9, 8, 7] * 10, replace(GREEDY_30, max_tokens=60)) for seed in range(6)
    ]
    with started(quantized, speculation="prompt_lookup", kv_cache_tokens=1024) as engine:
        answers = generate_all(engine, requests)
        assert [len(answer.token_ids) for answer in answers] == [60] * 6
        asyncio.run(until_idle(engine))
        assert engine.cache_usage == 0.0


@pytest.mark.parametrize("error", [ZeroDivisionError(), MemoryError()], ids=["error", "out-of-memory"])
def test_speculative_step_that_fails_ends_its_sequences_only(
    speculative: Engine, quantized: LoadedModel, plain: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    requests = [([7, 8, 9] * 8, replace(GREEDY_30, logprobs=1)), (random_ids(quantized, 9, seed=5), GREEDY_30)]
    expected = generate_all(plain, requests)
    processor = internals(speculative)
    sample, calls = processor.model_runner._sampler.sample, []

    def fail_at_third_guess(scores: torch.Tensor, states: Sequence[Any]) -> None:
        calls.append(len(states))
        if len(calls) == 3:
            raise error
        sample(scores, states)

    monkeypatch.setattr(processor.model_runner, "_sampler", SimpleNamespace(sample=fail_at_third_guess))

    async def outcomes() -> list[Generated | BaseException]:
        async with asyncio.timeout(HANG_SECONDS):
            results = await asyncio.gather(*map(read, speculative.submit(requests)), return_exceptions=True)
            await until_idle(speculative)
        return results

    results = asyncio.run(outcomes())
    assert any(isinstance(result, BaseException) for result in results)
    for result, right in zip(results, expected, strict=True):
        if isinstance(result, Generated):
            # It has started again, and the attention of a prompt rounds in another order.
            assert result.token_ids == right.token_ids
            assert [one.token_id for one in result.logprobs] == [one.token_id for one in right.logprobs]
    monkeypatch.undo()
    processor.scheduler.limited_steps = 0
    assert generate_all(speculative, requests) == expected


def test_speculative_step_cancelled_in_the_middle_leaves_the_batch(speculative: Engine) -> None:
    async def cancel() -> None:
        [stream] = speculative.submit([([7, 8, 9] * 8, replace(GREEDY_30, max_tokens=900))])
        async for step in stream:
            assert step.token_ids
            break
        stream.close()
        async with asyncio.timeout(HANG_SECONDS):
            await until_idle(speculative)

    asyncio.run(cancel())
    assert speculative.cache_usage == 0.0


def test_speculation_none_guesses_nothing(plain: Engine) -> None:
    generate(plain, [7, 8, 9] * 8, GREEDY_30)
    assert plain.speculation.num_drafts == 0


@pytest.mark.parametrize(("mode", "level"), [("auto", "INFO"), ("prompt_lookup", "WARNING")])
def test_speculation_of_dependent_rows_is_off_and_logged(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture, mode: str, level: str
) -> None:
    with caplog.at_level("INFO"), started(loaded, speculation=mode) as engine:
        answer = generate(engine, [7, 8, 9] * 8, GREEDY_30)
    assert len(answer.token_ids) == 30
    assert engine.speculation.num_drafts == 0
    [record] = [record for record in caplog.records if record.message.startswith("speculation: none, because")]
    assert record.levelname == level


def test_speculation_with_a_sliding_window_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = architectures.CASES["mistral, sliding window"]
    architectures.save_config(case, tmp_path)
    architectures.save_model(case, tmp_path)
    windowed = loader.load(tmp_path, device="cpu", dtype="bfloat16", quantization="8bit")
    with caplog.at_level("INFO"), started(windowed, speculation="auto", kv_cache_tokens=4096) as engine:
        generate(engine, [7, 8, 9] * 8, GREEDY_30)
    assert engine.speculation.num_drafts == 0
    assert "speculation: none, because a sliding window overwrites keys" in caplog.text


def test_independent_rows_are_those_of_8_bits(quantized: LoadedModel) -> None:
    assert has_independent_rows(quantized.model)
