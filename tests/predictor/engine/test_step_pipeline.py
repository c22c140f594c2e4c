"""A step prepared while another one runs, on a CPU: the same tokens, ends and failures as of single steps."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from predictor.engine import batching_manager
from predictor.engine.engine import Engine
from predictor.engine.kv_cache import PAGE_TOKENS
from predictor.engine.step_pipeline import OverlappedIOs
from predictor.errors import DeadlineExceeded, EngineStopped, GenerationFailed
from predictor.generation.structured_output import GrammarCompiler
from predictor.kernels import tensor_parallel
from predictor.models.loader import LoadedModel
from predictor.types import Caller, FinishReason, GrammarKind, SamplingParams, StructuredOutput
from tests.predictor.engine.conftest import (
    GREEDY,
    LONG,
    SAMPLED,
    Generated,
    chat_ids,
    generate,
    generate_all,
    random_ids,
    read,
    started,
    until_idle,
)
from tests.predictor.servers import HANG_SECONDS, Hold

ALICE, BOB = (Caller(name, share=1 / 2) for name in ("alice", "bob"))
ALL_TOKENS = np.full(1024, 255, dtype=np.uint8)
TEN = replace(GREEDY, max_tokens=10, ignore_eos=True)
LOGPROBS = replace(SAMPLED, temperature=2.0, logprobs=2, seed=1)
Requests = list[tuple[list[int], SamplingParams]]


@pytest.fixture(scope="module")
def overlapped(loaded: LoadedModel) -> Iterator[Engine]:
    with started_overlapped(loaded) as running:
        yield running


@pytest.fixture(scope="module")
def small_overlapped(loaded: LoadedModel) -> Iterator[Engine]:
    """An engine whose cache is full with one sequence of the whole context."""
    with started_overlapped(loaded, kv_cache_tokens=1024) as running:
        yield running


@contextmanager
def started_overlapped(loaded: LoadedModel, **changes: Any) -> Iterator[Engine]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batching_manager, "_overlaps", lambda _: True)
            engine = stack.enter_context(started(loaded, **changes))
        yield engine


def processor_of(engine: Engine) -> Any:
    return engine._executor._manager.batch_processor  # type: ignore[attr-defined]


def assert_idle(engine: Engine) -> None:
    assert (engine.is_alive, engine.running, engine.waiting, engine.cache_usage) == (True, 0, 0, 0.0)
    assert engine._executor._step_sampler.samplers == {}  # type: ignore[attr-defined]


def assert_same(answers: Sequence[Generated], expected: Sequence[Generated]) -> None:
    """The same tokens and ends, and log probabilities up to the rounding of other batches."""
    for answer, correct in zip(answers, expected, strict=True):
        assert (answer.token_ids, answer.reason) == (correct.token_ids, correct.reason)
        for logprobs, others in (
            (answer.logprobs, correct.logprobs),
            (answer.prompt_logprobs, correct.prompt_logprobs),
        ):
            assert [one.token_id for one in logprobs] == [one.token_id for one in others]
            values = [one.logprob for one in others if one.logprob is not None]
            assert [one.logprob for one in logprobs if one.logprob is not None] == pytest.approx(values, abs=1e-3)


async def blocked(hold: Hold) -> None:
    assert await asyncio.to_thread(hold.blocked.wait, HANG_SECONDS)
    await asyncio.sleep(0)  # outputs of the last step were scheduled before


# The same tokens


def mixed_requests(loaded: LoadedModel) -> Requests:
    """Sequences of every kind, more than the batch has places, that start and end in different steps."""
    compiler = GrammarCompiler(loaded.tokenizer, loaded.vocabulary_tokens, loaded.eos_token_ids)
    number = compiler.compile(StructuredOutput(GrammarKind.REGEX, "[0-9]{3,9}")).token_mask
    chat = chat_ids(loaded, "What is 17 + 25?")
    samplings = [
        GREEDY,
        replace(LOGPROBS, max_tokens=19),
        replace(GREEDY, token_masks=(number,)),
        replace(LOGPROBS, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=4, ignore_eos=False),
        replace(GREEDY, max_tokens=1),
        replace(LOGPROBS, token_masks=(number,), ignore_eos=False),
        replace(TEN, no_repeat_ngram_size=2, bad_words_ids=((7, 8), (9,))),
        replace(TEN, max_tokens=2, prompt_logprobs=1),
        replace(GREEDY, stop_token_ids=(34,)),
        replace(LOGPROBS, logit_bias=((6, 5.0),), top_k=20, top_p=0.9),
    ]
    long = [(random_ids(loaded, 300 + count, count), replace(TEN, prompt_logprobs=0)) for count in range(2)]
    return [*((chat, sampling) for sampling in samplings), *long, *((chat, sampling) for sampling in samplings)]


def test_overlapped_steps_give_the_tokens_of_single_steps(
    engine: Engine, overlapped: Engine, loaded: LoadedModel
) -> None:
    assert isinstance(processor_of(overlapped).inputs_and_outputs, OverlappedIOs)
    requests = mixed_requests(loaded)
    expected = generate_all(engine, requests)
    assert_same(generate_all(overlapped, requests), expected)
    ends = {FinishReason.EOS_TOKEN, FinishReason.LENGTH, FinishReason.STOP_SEQUENCE}
    assert {answer.reason for answer in expected} == ends
    asyncio.run(until_idle(overlapped))
    assert_idle(overlapped)


def test_overlapped_full_cache_does_not_change_sequences(
    engine: Engine, small_overlapped: Engine, loaded: LoadedModel
) -> None:
    sampled = replace(LOGPROBS, max_tokens=60)
    requests = [(random_ids(loaded, 230 + seed, seed), replace(sampled, seed=seed)) for seed in range(6)]
    requests.append((random_ids(loaded, 1014, 7), TEN))
    assert_same(generate_all(small_overlapped, requests), generate_all(engine, requests))
    assert_idle(small_overlapped)


def test_overlapped_sequences_that_lack_cache_make_room_at_once(
    small_overlapped: Engine, loaded: LoadedModel, hold: Hold
) -> None:
    """Four sequences fill the cache, and need more of it from the ninth step on."""

    async def run() -> None:
        hold.close()
        streams = small_overlapped.submit([(random_ids(loaded, 250 + seed, seed), LONG) for seed in range(4)])
        await blocked(hold)
        hold.step(12)
        await blocked(hold)
        assert small_overlapped.running < 4
        for stream in streams:
            stream.close()
        hold.open()
        await until_idle(small_overlapped)

    asyncio.run(run())


def test_overlapped_chunks_of_a_prompt_are_shared(overlapped: Engine, loaded: LoadedModel) -> None:
    """The second of three chunks completes the page; the third is scheduled before the second is registered."""
    ids = random_ids(loaded, PAGE_TOKENS + 44, seed=50)
    first, before = generate(overlapped, ids, TEN), overlapped.steps
    assert generate(overlapped, ids, TEN) == first
    assert overlapped.steps - before == 10, "one step for the rest of the prompt"


def test_overlapped_sequence_that_leaves_a_full_batch_keeps_its_tokens(
    overlapped: Engine, loaded: LoadedModel, ids: list[int]
) -> None:
    sampled = [replace(LOGPROBS, max_tokens=40, seed=seed) for seed in range(10)]
    undisturbed = generate_all(overlapped, [(ids, sampling) for sampling in sampled])

    async def run() -> list[Generated]:
        streams = [overlapped.submit([(ids, sampling)], caller=ALICE)[0] for sampling in sampled]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        for seed in range(6):
            [other] = overlapped.submit([(random_ids(loaded, 9, seed), TEN)], caller=BOB)
            assert len((await read(other)).token_ids) == 10
        return await asyncio.gather(*readers)

    assert_same(asyncio.run(asyncio.wait_for(run(), HANG_SECONDS)), undisturbed)


def test_overlapped_newcomer_gets_one_of_the_two_places_of_another_caller(loaded: LoadedModel, ids: list[int]) -> None:
    async def run(engine: Engine) -> None:
        streams = engine.submit([(ids, LONG)] * 2, caller=ALICE)
        for stream in streams:
            await anext(stream)
        before = engine.steps
        [other] = engine.submit([(ids, TEN)], caller=BOB)
        assert len((await read(other)).token_ids) == 10
        assert engine.steps - before < 100, "long before the others end"
        for stream in streams:
            stream.close()
        await until_idle(engine)

    with started_overlapped(loaded, max_num_seqs=2) as engine:
        asyncio.run(asyncio.wait_for(run(engine), HANG_SECONDS))


# Ends


def test_overlapped_sampler_is_called_once_per_token(overlapped: Engine, ids: list[int]) -> None:
    """With all tokens before it, and not for the step that was prepared before the end was known."""
    seen: list[list[int]] = []

    def record(_: Sequence[int], output_ids: Sequence[int]) -> NDArray[np.uint8]:
        seen.append(list(output_ids))
        return ALL_TOKENS

    before = overlapped.steps
    answer = generate(overlapped, ids, replace(GREEDY, token_masks=(lambda: record,)))
    assert answer.reason is FinishReason.EOS_TOKEN
    generate(overlapped, ids, replace(GREEDY, max_tokens=1))
    assert seen == [answer.token_ids[:count] for count in range(len(answer.token_ids))]
    assert overlapped.steps - before == len(answer.token_ids) + 1 + 1, "one step after the end"


def test_overlapped_sampler_is_not_called_after_the_end(overlapped: Engine, ids: list[int]) -> None:
    """Though the event loop, which drops it, is busy."""
    lengths: list[int] = []

    def record(_: Sequence[int], output_ids: Sequence[int]) -> NDArray[np.uint8]:
        lengths.append(len(output_ids))
        return ALL_TOKENS

    async def run() -> int:
        [stream] = overlapped.submit([(ids, replace(GREEDY, token_masks=(lambda: record,)))])
        first = await anext(stream)
        while processor_of(overlapped).has_pending_requests() or processor_of(overlapped).inputs_and_outputs.is_pending:
            time.sleep(0.001)  # noqa: ASYNC251, it is to block
        return len(first.token_ids) + len((await read(stream)).token_ids)

    count = asyncio.run(asyncio.wait_for(run(), HANG_SECONDS))
    assert lengths == list(range(count))


def test_overlapped_sequence_cancelled_when_it_completes_a_page_fails_no_step(
    overlapped: Engine, loaded: LoadedModel, hold: Hold
) -> None:
    """The step that runs completes a page of a sequence that has left."""
    failed = overlapped.failed_steps

    async def leave() -> None:
        hold.close(after=1)
        [stream] = overlapped.submit([(random_ids(loaded, PAGE_TOKENS, seed=60), LONG)])
        await blocked(hold)
        stream.close()
        hold.open()
        await until_idle(overlapped)

    asyncio.run(leave())
    generate(overlapped, random_ids(loaded, 9, seed=61), TEN)
    assert overlapped.failed_steps == failed
    assert_idle(overlapped)


def test_overlapped_sequence_that_ends_by_length_has_no_further_step(overlapped: Engine, ids: list[int]) -> None:
    # A test before may have ended while its last step ran, which is over once another sequence has ended.
    generate(overlapped, ids, TEN)
    before = overlapped.steps
    generate(overlapped, ids, TEN)
    generate(overlapped, ids, replace(TEN, max_tokens=1))
    assert overlapped.steps - before == 10 + 1


def test_overlapped_closed_stream_leaves_with_the_step_that_runs(
    overlapped: Engine, ids: list[int], hold: Hold
) -> None:
    alone = generate(overlapped, ids, TEN)

    async def leave() -> Generated:
        stream, other = overlapped.submit([(ids, LONG), (ids, TEN)])
        await anext(stream)
        hold.close()
        await blocked(hold)
        before = overlapped.steps
        stream.close()
        hold.step(1)
        await blocked(hold)
        assert (overlapped.steps - before, overlapped.running) == (1, 1)
        hold.open()
        rest = await read(other)
        await until_idle(overlapped)
        return rest

    assert asyncio.run(leave()) == alone
    assert_idle(overlapped)


def test_overlapped_deadline_frees_the_place(overlapped: Engine, ids: list[int], hold: Hold) -> None:
    async def time_out() -> None:
        hold.close(after=3)
        [stream] = overlapped.submit([(ids, LONG)], time.monotonic() + 0.3)
        with pytest.raises(DeadlineExceeded):
            await read(stream)
        hold.open()
        await until_idle(overlapped)

    asyncio.run(time_out())
    assert_idle(overlapped)


def test_overlapped_stop_fails_the_sequences_of_both_steps(loaded: LoadedModel, ids: list[int]) -> None:
    async def run(engine: Engine) -> None:
        [stream] = engine.submit([(ids, LONG)])
        await anext(stream)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineStopped):
            await read(stream)

    with started_overlapped(loaded) as engine:
        asyncio.run(asyncio.wait_for(run(engine), HANG_SECONDS))
        assert engine.has_ended


# Failures


def outcomes(engine: Engine, requests: Requests) -> list[Generated | BaseException]:
    async def together() -> list[Generated | BaseException]:
        async with asyncio.timeout(HANG_SECONDS):
            results = await asyncio.gather(*map(read, engine.submit(requests)), return_exceptions=True)
            await until_idle(engine)
        return results

    return asyncio.run(together())


@pytest.mark.parametrize("at", [1, 2, 7, 15])
def test_overlapped_failure_in_forward_keeps_the_tokens_of_the_step_before(
    overlapped: Engine, loaded: LoadedModel, at: int
) -> None:
    requests = [(random_ids(loaded, 20 + seed, seed), replace(TEN, max_tokens=4 + seed)) for seed in range(12)]
    expected = generate_all(overlapped, requests)
    steps = overlapped.failed_steps
    failing: set[str] = set()
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            failing.update(state.request_id for state in processor_of(overlapped).scheduler.scheduled)
            raise RuntimeError("a kernel failed")

    handle = loaded.model.model.layers[-1].register_forward_pre_hook(fail)
    try:
        results = outcomes(overlapped, requests)
    finally:
        handle.remove()
    failed = [result for result in results if isinstance(result, GenerationFailed)]
    assert 0 < len(failed) == len(failing) < len(requests)
    assert overlapped.failed_steps == steps + 1
    for result, correct in zip(results, expected, strict=True):
        assert isinstance(result, GenerationFailed) or result == correct
    assert_idle(overlapped)
    assert generate_all(overlapped, requests) == expected


@pytest.mark.parametrize(("method", "at"), [("can_store_request_tokens", 20), ("mark_complete_blocks", 6)])
def test_overlapped_failure_outside_forward_fails_its_sequences_only(
    overlapped: Engine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, method: str, at: int
) -> None:
    requests = [(random_ids(loaded, 20 + seed, seed), TEN) for seed in range(12)]
    expected = generate_all(overlapped, requests)
    cache = processor_of(overlapped).cache
    call, calls = getattr(cache, method), 0

    def fail_once(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyError("request")
        return call(*args, **options)

    monkeypatch.setattr(cache, method, fail_once)
    results = outcomes(overlapped, requests)
    assert 0 < sum(isinstance(result, GenerationFailed) for result in results) < len(requests)
    monkeypatch.undo()
    for result, correct in zip(results, expected, strict=True):
        assert isinstance(result, GenerationFailed) or result == correct
    assert_idle(overlapped)
    assert generate_all(overlapped, requests) == expected


def test_overlapped_failure_after_the_end_fails_no_sequence(
    overlapped: Engine, loaded: LoadedModel, ids: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    answer = generate(overlapped, ids, GREEDY)
    assert answer.reason is FinishReason.EOS_TOKEN
    asyncio.run(until_idle(overlapped))
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == len(answer.token_ids) + 1:
            raise RuntimeError("a kernel failed")

    handle = loaded.model.register_forward_pre_hook(fail)
    try:
        assert outcomes(overlapped, [(ids, GREEDY)]) == [answer]
        assert outcomes(overlapped, [(ids, GREEDY)]) == [answer]
    finally:
        handle.remove()
    assert "a step failed whose sequences had all ended" in caplog.text
    assert_idle(overlapped)


# When


@pytest.mark.parametrize(
    ("device", "ranks", "expected"), [("cpu", 1, False), ("cuda:0", 1, True), ("cuda:0", 2, False)]
)
def test_steps_overlap_on_one_gpu_only(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, expected: bool
) -> None:
    monkeypatch.setattr(tensor_parallel, "size", lambda: ranks)
    assert batching_manager._overlaps(SimpleNamespace(device=torch.device(device))) is expected
