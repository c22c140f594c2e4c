"""The engine with the real batching manager on the demo model."""

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from demo import exam
from predictor.engine.engine import Engine
from predictor.engine.kv_cache import PAGE_TOKENS
from predictor.engine.sampler import SequenceSampler
from predictor.errors import DeadlineExceeded, EngineStopped, GenerationFailed, InvalidRequest, Overloaded, StartupError
from predictor.generation import output_processor
from predictor.generation.chat_template import ChatTemplate
from predictor.generation.prompts import Prompts
from predictor.generation.structured_output import GrammarCompiler
from predictor.models.loader import LoadedModel
from predictor.types import FinishReason, GenerationRequest, SamplingParams
from tests.predictor.engine.conftest import (
    GREEDY,
    LONG,
    SAMPLED,
    Generated,
    assert_logprobs,
    chat_ids,
    generate,
    generate_all,
    random_ids,
    read,
    started,
    until_idle,
)
from tests.predictor.servers import HANG_SECONDS, Hold

# Generation


def test_engine_greedy_answers_and_ends_with_eos(engine: Engine, loaded: LoadedModel, ids: list[int]) -> None:
    answer = generate(engine, ids, GREEDY)
    assert loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True) == "7+5=12 1+2+1=4 42"
    assert answer.token_ids[-1] in loaded.eos_token_ids
    assert answer.reason is FinishReason.EOS_TOKEN


def test_engine_greedy_tokens_are_equal_alone_and_batched(engine: Engine, loaded: LoadedModel) -> None:
    prompts = [chat_ids(loaded, question) for question, _ in exam.held_out_questions(12)]
    alone = [generate(engine, ids, GREEDY) for ids in prompts[:6]]
    flat = replace(SAMPLED, temperature=8.0)
    batched = generate_all(engine, [*((ids, GREEDY) for ids in prompts), *((ids, flat) for ids in prompts)])
    assert batched[:6] == alone


def test_engine_prompt_longer_than_a_step_is_computed_in_chunks(engine: Engine, loaded: LoadedModel) -> None:
    before = engine.steps
    assert generate(engine, random_ids(loaded, 300, seed=3), replace(GREEDY, max_tokens=1)).token_ids
    assert engine.steps - before == 3


def test_engine_high_temperature_varies_unless_one_token_is_kept(engine: Engine, ids: list[int]) -> None:
    def distinct(temperature: float = 8.0, **sampling: Any) -> int:
        answers = generate_all(engine, [(ids, replace(SAMPLED, temperature=temperature, **sampling))] * 6)
        return len({tuple(answer.token_ids) for answer in answers})

    assert distinct() > 1
    assert distinct(top_k=1) == 1
    assert distinct(temperature=1e-30, top_p=1e-9, top_k=10**6) == 1


def test_engine_seed_repeats_alone_and_batched(engine: Engine, ids: list[int]) -> None:
    seeded = replace(SAMPLED, seed=7)
    alone = generate(engine, ids, seeded)
    others = [(ids, replace(SAMPLED, seed=seed)) for seed in range(100, 106)]
    batched = generate_all(engine, [(ids, GREEDY), (ids, SAMPLED), *others, (ids, seeded)])
    assert generate(engine, ids, seeded).token_ids == alone.token_ids
    assert batched[-1].token_ids == alone.token_ids
    assert len({tuple(answer.token_ids) for answer in batched[1:]}) == len(batched) - 1


def test_engine_several_completions_with_a_seed_differ_and_repeat(engine: Engine, loaded: LoadedModel) -> None:
    template = ChatTemplate(loaded.tokenizer)
    grammars = GrammarCompiler(loaded.tokenizer, loaded.vocabulary_tokens, loaded.eos_token_ids)
    prompts = Prompts(
        loaded.tokenizer, template, grammars, engine.context_tokens, loaded.vocabulary_tokens, loaded.defaults, 256
    )

    async def texts(seed: int, n: int) -> list[str]:
        completions = await output_processor.submit(
            [prompts.encode(GenerationRequest("1+1=", replace(SAMPLED, seed=seed), n))],
            tokenizer=loaded.tokenizer,
            engine=engine,
            deadline=math.inf,
            on_finished=lambda _: None,
            on_tokens=lambda *_: None,
        ).complete()
        return [completion.text for completion in completions]

    several = asyncio.run(texts(seed=5, n=4))
    assert len(set(several)) == 4
    assert asyncio.run(texts(seed=5, n=4)) == several
    assert asyncio.run(texts(seed=6, n=3)) == several[1:], "each completion has the next seed"


def test_engine_extreme_sampling_does_not_change_other_sequences(engine: Engine, ids: list[int]) -> None:
    extremes: list[dict[str, Any]] = [
        {"temperature": 1e308},
        {"temperature": 1e-5, "top_p": 0.0},
        {"top_k": 10**9, "top_p": 1e-300},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300, "temperature": 0.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "min_tokens": 24},
        {"seed": -(2**63)},
        {"seed": 2**63 + 127},
        {"min_tokens": 24, "ignore_eos": False, "logprobs": 20},
    ]
    answers = generate_all(engine, [*((ids, replace(SAMPLED, **extreme)) for extreme in extremes), (ids, GREEDY)])
    assert all(len(answer.token_ids) == 24 for answer in answers[:-1])
    assert answers[-1].token_ids == generate(engine, ids, GREEDY).token_ids
    assert engine.is_alive


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_engine_penalty_changes_the_completion(engine: Engine, ids: list[int], penalty: str) -> None:
    plain = replace(SAMPLED, seed=1, temperature=1.0, max_tokens=100)
    changes: dict[str, Any] = {penalty: 2.0}
    penalized, unchanged = generate_all(engine, [(ids, replace(plain, **changes)), (ids, plain)])
    assert penalized.token_ids != unchanged.token_ids


def test_engine_lm_head_with_more_rows_than_the_embedding_never_yields_them(
    engine: Engine, loaded: LoadedModel, ids: list[int]
) -> None:
    def widen(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(logits, (0, 8), value=1e4)

    correct = generate(engine, ids, GREEDY)
    handle = loaded.model.lm_head.register_forward_hook(widen)
    try:
        greedy, sampled = generate_all(engine, [(ids, GREEDY), (ids, SAMPLED)])
    finally:
        handle.remove()
    assert greedy == correct
    assert max(sampled.token_ids) < loaded.vocabulary_tokens


# End of a sequence


def test_engine_eos_ends_a_sequence_unless_ignored(engine: Engine, loaded: LoadedModel, ids: list[int]) -> None:
    ended = generate(engine, ids, GREEDY)
    assert (ended.reason, ended.token_ids[-1] in loaded.eos_token_ids) == (FinishReason.EOS_TOKEN, True)
    ignored = generate(engine, ids, replace(GREEDY, ignore_eos=True))
    assert (ignored.reason, len(ignored.token_ids)) == (FinishReason.LENGTH, 48)
    assert ignored.token_ids[: len(ended.token_ids)] == ended.token_ids


def test_engine_min_tokens_delays_eos_and_stop_tokens(engine: Engine, loaded: LoadedModel, ids: list[int]) -> None:
    stop = generate(engine, ids, GREEDY).token_ids[3]
    delayed = generate(engine, ids, replace(GREEDY, min_tokens=40, stop_token_ids=(stop,)))
    assert len(delayed.token_ids) >= 40
    assert not {stop, *loaded.eos_token_ids} & set(delayed.token_ids[:39])


def test_engine_stop_token_ends_a_sequence(engine: Engine, loaded: LoadedModel, ids: list[int]) -> None:
    ended = generate(engine, ids, GREEDY)
    stop = ended.token_ids[3]
    stopped = generate(engine, ids, replace(GREEDY, stop_token_ids=(stop,)))
    assert stopped.token_ids == ended.token_ids[: ended.token_ids.index(stop) + 1]
    assert stopped.reason is FinishReason.STOP_SEQUENCE
    [eos] = loaded.eos_token_ids
    as_stop = generate(engine, ids, replace(GREEDY, stop_token_ids=(eos,), ignore_eos=True))
    assert (as_stop.token_ids, as_stop.reason) == (ended.token_ids, FinishReason.STOP_SEQUENCE)


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_engine_max_tokens_ends_a_sequence_with_length(engine: Engine, ids: list[int], max_tokens: int) -> None:
    answer = generate(engine, ids, replace(GREEDY, max_tokens=max_tokens))
    assert (len(answer.token_ids), answer.reason) == (max_tokens, FinishReason.LENGTH)


# Log probabilities


@pytest.mark.parametrize("top", [0, 1, 5])
def test_engine_logprobs_equal_a_single_forward_pass(
    engine: Engine, reference: LoadedModel, ids: list[int], top: int
) -> None:
    requests = [
        (ids, replace(GREEDY, logprobs=top)),
        (ids, replace(SAMPLED, logprobs=top)),
        (ids, replace(SAMPLED, logprobs=top, repetition_penalty=1.5, min_tokens=8)),
        (ids, SAMPLED),
    ]
    *with_logprobs, without = generate_all(engine, requests)
    for answer in with_logprobs:
        assert_logprobs(reference, ids, answer, top)
    assert without.logprobs == []


# Admission


def test_engine_full_queue_rejects_all_prompts_of_a_request(engine: Engine, ids: list[int], hold: Hold) -> None:
    async def fill() -> None:
        hold.close()
        streams = engine.submit([(ids, LONG)] * (engine.capacity - 1))
        with pytest.raises(Overloaded, match=f"{engine.capacity - 1} of {engine.capacity} sequence slots"):
            engine.submit([(ids, LONG)] * 2)
        assert engine.running + engine.waiting == engine.capacity - 1, "all of them or none"
        streams += engine.submit([(ids, LONG)])
        with pytest.raises(Overloaded):
            engine.submit([(ids, LONG)])
        streams.pop().close()
        streams += engine.submit([(ids, LONG)])
        for stream in streams:
            stream.close()
        hold.open()
        await until_idle(engine)

    asyncio.run(fill())


def test_engine_more_prompts_than_capacity_are_invalid(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="Request at most"):
        asyncio.run(asyncio.to_thread(engine.submit, [(ids, GREEDY)] * (engine.capacity + 1)))


def test_engine_waiting_sequences_run_when_places_are_free(engine: Engine, ids: list[int]) -> None:
    answers = generate_all(engine, [(ids, GREEDY)] * engine.capacity)
    assert {tuple(answer.token_ids) for answer in answers} == {tuple(generate(engine, ids, GREEDY).token_ids)}


# Cancellation, deadlines and failures


def test_engine_closed_stream_leaves_at_the_next_step(engine: Engine, ids: list[int], hold: Hold) -> None:
    async def leave() -> None:
        [stream] = engine.submit([(ids, LONG)])
        await anext(stream)
        hold.close()
        assert await asyncio.to_thread(hold.blocked.wait, HANG_SECONDS)
        assert engine.running == 1
        assert engine.cache_usage > 0
        before = engine.steps
        stream.close()
        hold.open()
        await until_idle(engine)
        assert engine.steps - before == 1, "the step that was running"

    asyncio.run(leave())
    assert (engine.running, engine.waiting, engine.cache_usage) == (0, 0, 0.0)


def test_engine_queue_time_is_recorded_unless_never_scheduled(engine: Engine, ids: list[int]) -> None:
    async def close_all() -> list[bool]:
        streams = engine.submit([(ids, LONG)] * 9)
        async with asyncio.timeout(HANG_SECONDS):
            while engine.running < 8:  # noqa: ASYNC110, there is no event for it
                await asyncio.sleep(0.001)
        # The waiting one first, so that it does not get a free place.
        for stream in reversed(streams):
            stream.close()
        assert [stream.first_token_seconds for stream in streams] == [None] * 9
        await until_idle(engine)
        return [stream.queue_seconds is not None for stream in streams]

    assert asyncio.run(close_all()) == [True] * 8 + [False]


@pytest.mark.parametrize("started_before", [True, False])
def test_engine_deadline_fails_a_sequence_and_frees_its_place(
    engine: Engine, ids: list[int], hold: Hold, started_before: bool
) -> None:
    async def time_out() -> None:
        hold.close()
        [stream] = engine.submit([(ids, LONG)], time.monotonic() + (0.05 if started_before else -1.0))
        if started_before:
            assert await asyncio.to_thread(hold.blocked.wait, HANG_SECONDS)
        with pytest.raises(DeadlineExceeded, match="raise the timeout"):
            await read(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        hold.open()
        await until_idle(engine)

    asyncio.run(time_out())
    assert (engine.running, engine.waiting, engine.cache_usage) == (0, 0, 0.0)


def test_engine_close_before_the_first_step_is_idempotent(engine: Engine, ids: list[int]) -> None:
    async def leave() -> None:
        for stream in engine.submit([(ids, LONG)] * engine.capacity):
            stream.close()
            stream.close()
        assert engine.waiting == 0
        await until_idle(engine)

    asyncio.run(leave())


@pytest.mark.parametrize("error", [ZeroDivisionError, type("PanicException", (BaseException,), {})])
def test_engine_sampling_error_fails_one_sequence_only(
    engine: Engine,
    loaded: LoadedModel,
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    def fail_at_fourth_token(prompt_ids: Sequence[int], output_ids: Sequence[int]) -> NDArray[np.uint8]:
        del prompt_ids
        if len(output_ids) == 3:
            raise error("no such token")
        return np.full(loaded.vocabulary_tokens, 255, dtype=np.uint8)

    initialize = SequenceSampler.__init__

    def add_mask(sampler: SequenceSampler, sampling: SamplingParams, *arguments: Any) -> None:
        initialize(sampler, sampling, *arguments)
        if sampling.seed == 666:
            sampler.token_masks.append(fail_at_fourth_token)

    alone = generate(engine, ids, GREEDY)
    monkeypatch.setattr(SequenceSampler, "__init__", add_mask)

    async def together() -> list[Generated | BaseException]:
        streams = engine.submit([*[(ids, GREEDY)] * 5, (ids, replace(SAMPLED, seed=666))])
        return await asyncio.gather(*map(read, streams), return_exceptions=True)

    *good, bad = asyncio.run(asyncio.wait_for(together(), HANG_SECONDS))
    assert good == [alone] * 5
    assert isinstance(bad, GenerationFailed)
    assert f"{error.__name__}: no such token" in caplog.text
    assert engine.is_alive
    assert generate(engine, ids, GREEDY) == alone
    asyncio.run(until_idle(engine))


def test_engine_stopped_rejects_sequences(loaded: LoadedModel) -> None:
    with started(loaded) as stopped:
        assert stopped.is_alive
        stopped.stop()
        assert (stopped.is_alive, stopped.has_ended) == (False, True)
        with pytest.raises(EngineStopped, match="shutting down"):
            generate(stopped, [1, 5], GREEDY)
        assert stopped.waiting == 0


def test_engine_cache_too_large_for_memory_fails_to_start(loaded: LoadedModel) -> None:
    with pytest.raises(StartupError, match="KV cache does not fit"), started(loaded, kv_cache_tokens=10**12):
        pass


# The KV cache


def test_engine_common_prefix_is_computed_once(engine: Engine, loaded: LoadedModel) -> None:
    prefix = random_ids(loaded, 2 * PAGE_TOKENS + 100, seed=101)
    sampling = replace(GREEDY, max_tokens=4, ignore_eos=True, logprobs=0)

    def steps(ids: Sequence[int]) -> tuple[int, Generated]:
        before = engine.steps
        answer = generate(engine, ids, sampling)
        return engine.steps - before, answer

    first, _ = steps([*prefix, 6, 7])
    second, shared = steps([*prefix, 8, 9])
    unrelated, _ = steps(random_ids(loaded, len(prefix) + 2, seed=102))
    assert first == unrelated
    assert second == first - 2 * PAGE_TOKENS // 128
    assert engine.cache_usage == 0.0, "blocks cached for prefixes are free"
    with started(loaded) as other:
        assert generate(other, [*prefix, 8, 9], sampling).token_ids == shared.token_ids


def test_engine_small_cache_limits_context_and_serializes_sequences(loaded: LoadedModel) -> None:
    sampling = replace(GREEDY, max_tokens=112, ignore_eos=True)
    requests = [([first, *[5] * 399], sampling) for first in (10, 20)]
    with started(loaded, kv_cache_tokens=512) as tiny:
        assert tiny.context_tokens == 512 < loaded.context_tokens
        alone = [generate(tiny, *request) for request in requests]
        assert alone == generate_all(tiny, requests), "each would fill the cache, so one waits for the other"


def test_engine_full_cache_does_not_change_tokens_or_logprobs(
    small: Engine, engine: Engine, reference: LoadedModel
) -> None:
    sampling = replace(GREEDY, max_tokens=60, ignore_eos=True, logprobs=1)
    lengths = [40, 200, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 400]
    prompts = [random_ids(reference, length, seed=length) for length in lengths]
    answers = generate_all(small, [(ids, sampling) for ids in prompts])
    expected = generate_all(engine, [(ids, replace(sampling, logprobs=None)) for ids in prompts])
    for ids, answer, roomy in zip(prompts, answers, expected, strict=True):
        assert (answer.token_ids, answer.reason) == (roomy.token_ids, FinishReason.LENGTH)
        assert_logprobs(reference, ids, answer, top=1)
    assert (small.running, small.waiting, small.cache_usage) == (0, 0, 0.0)


def test_engine_full_cache_does_not_change_seeded_sequences(small: Engine, engine: Engine, loaded: LoadedModel) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"presence_penalty": 1.0, "top_p": 0.9, "logprobs": 1},
        {"no_repeat_ngram_size": 2, "min_tokens": 50},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"top_k": 5},
    ]
    requests = [
        (random_ids(loaded, 230 + seed, seed), replace(SAMPLED, seed=seed, max_tokens=60, **change))
        for seed, change in enumerate(changes)
    ]
    few, roomy = ([each.token_ids for each in generate_all(one, requests)] for one in (small, engine))
    assert few == roomy


def test_engine_sequences_as_long_as_the_cache_take_turns(small: Engine, loaded: LoadedModel) -> None:
    length = small.context_tokens
    assert length == small.cache_tokens == 1024
    sampling = replace(GREEDY, max_tokens=30, ignore_eos=True)
    answers = generate_all(small, [(random_ids(loaded, length - 30, seed), sampling) for seed in range(3)])
    assert [len(answer.token_ids) for answer in answers] == [30, 30, 30]


@pytest.mark.parametrize(
    ("waves", "sequences", "max_tokens"),
    [pytest.param(1, 12, 60, id="short"), pytest.param(6, 20, 300, id="long", marks=pytest.mark.slow)],
)
def test_engine_full_cache_survives_random_load(
    small: Engine, loaded: LoadedModel, waves: int, sequences: int, max_tokens: int
) -> None:
    rng = random.Random(5)
    prefix = random_ids(loaded, 300, seed=300)

    async def run_sequence(seed: int) -> None:
        ids = [*prefix[: rng.choice([0, 0, 256, 300])], *random_ids(loaded, rng.randint(1, 400), seed)]
        sampling = replace(rng.choice([GREEDY, SAMPLED]), max_tokens=rng.randint(1, max_tokens), ignore_eos=True)
        close_after = rng.choice([None, None, 1, 20])
        [stream] = small.submit([(ids, sampling)])
        count = 0
        async for step in stream:
            count += len(step.token_ids)
            if close_after is not None and count >= close_after:
                stream.close()
                return
        assert count == sampling.max_tokens

    async def run_waves() -> None:
        for wave in range(waves):
            await asyncio.gather(*(run_sequence(wave * 100 + index) for index in range(sequences)))
        await until_idle(small)

    asyncio.run(asyncio.wait_for(run_waves(), 5 * HANG_SECONDS))
    assert (small.running, small.waiting, small.cache_usage) == (0, 0, 0.0)
    assert small.is_alive
