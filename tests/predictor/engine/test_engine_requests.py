"""What a single sequence may ask of the engine, and what its neighbours may do to it: real manager, demo model."""

import asyncio
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from devtools.processes import ROOT
from predictor.engine.engine import Engine
from predictor.engine.kv_cache import PAGE_TOKENS
from predictor.engine.sampler import SequenceSampler
from predictor.engine.stream import Stream
from predictor.errors import DeadlineExceeded, GenerationFailed, InvalidRequest, Overloaded
from predictor.generation import output_processor
from predictor.generation.prompts import Prompts
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.types import FinishReason, GenerationRequest, SamplingParams, TokenLogprob

GREEDY = SamplingParams(max_tokens=48, temperature=0.0, top_p=1.0, top_k=0)
SAMPLED = SamplingParams(max_tokens=24, temperature=3.0, top_p=1.0, top_k=0, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=900, ignore_eos=True)


@dataclass
class Made:
    """What became of a sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None


def load() -> LoadedModel:
    return loader.load(ROOT / "demo" / "model", device="cpu", dtype="float32", trust_remote_code=False)


def engine_of(loaded: LoadedModel, **different: Any) -> Engine:
    settings: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_queued_requests": 24,
        "max_num_batched_tokens": 128,
        "kv_cache_tokens": 8192,
        "context_tokens": loaded.context_tokens,
    }
    engine = Engine.from_model(loaded.model, eos_token_ids=loaded.eos_token_ids, **{**settings, **different})
    engine.start()
    return engine


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load()


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    running = engine_of(loaded)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def small() -> Iterator[Engine]:
    """An engine whose cache is full with one sequence of the whole context."""
    running = engine_of(load(), kv_cache_tokens=1024)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def ids(loaded: LoadedModel) -> list[int]:
    return prompt(loaded, "What is 17 + 25?")


def prompt(loaded: LoadedModel, question: str) -> list[int]:
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return list(loaded.tokenizer.encode(text, add_special_tokens=False))


def noise(loaded: LoadedModel, count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(5, loaded.vocabulary_tokens), k=count)


async def read(stream: Stream) -> Made:
    made = Made()
    async for step in stream:
        made.token_ids += step.token_ids
        made.logprobs += step.logprobs
        made.reason = step.finish_reason
    return made


async def make(engine: Engine, ids: Sequence[int], sampling: SamplingParams) -> Made:
    [stream] = engine.submit([(ids, sampling)])
    return await read(stream)


def made(engine: Engine, ids: Sequence[int], sampling: SamplingParams) -> Made:
    return asyncio.run(asyncio.wait_for(make(engine, ids, sampling), timeout=60))


def made_together(engine: Engine, asked: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[Made]:
    async def together() -> list[Made]:
        return await asyncio.gather(*(make(engine, ids, sampling) for ids, sampling in asked))

    return asyncio.run(asyncio.wait_for(together(), timeout=120))


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(30):
        while engine.running or engine.waiting:  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0.001)


# Sampling


def test_a_seed_repeats_alone_and_in_a_crowd(engine: Engine, ids: list[int]) -> None:
    seeded = replace(SAMPLED, seed=7)
    alone = made(engine, ids, seeded)
    neighbours = [(ids, replace(SAMPLED, seed=other)) for other in range(100, 106)]
    crowd = made_together(engine, [(ids, GREEDY), (ids, SAMPLED), *neighbours, (ids, seeded)])
    assert made(engine, ids, seeded).token_ids == alone.token_ids
    assert crowd[-1].token_ids == alone.token_ids
    assert len({tuple(answer.token_ids) for answer in crowd[1:]}) == len(crowd) - 1


def test_several_completions_with_a_seed_differ_and_repeat(engine: Engine, loaded: LoadedModel) -> None:
    prompts = Prompts(loaded.tokenizer, engine.context_tokens, loaded.vocabulary_tokens, loaded.defaults, 256)

    async def texts(seed: int, n: int) -> list[str]:
        request = GenerationRequest("1+1=", replace(SAMPLED, seed=seed), n)
        completions = await output_processor.submit(
            [request],
            prompts=prompts,
            engine=engine,
            deadline=math.inf,
            on_finished=lambda _: None,
            on_tokens=lambda *_: None,
        ).complete()
        return [completion.text for completion in completions]

    several = asyncio.run(texts(seed=5, n=4))
    assert len(set(several)) == 4
    assert asyncio.run(texts(seed=5, n=4)) == several
    assert asyncio.run(texts(seed=6, n=3)) == several[1:], "a seed counts up"


def test_extreme_sampling_harms_nobody(engine: Engine, ids: list[int]) -> None:
    extremes = [
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
    asked: list[tuple[Sequence[int], SamplingParams]] = [(ids, replace(SAMPLED, **extreme)) for extreme in extremes]
    answers = made_together(engine, [*asked, (ids, GREEDY)])
    assert all(len(answer.token_ids) == 24 for answer in answers[:-1])
    assert answers[-1].token_ids == made(engine, ids, GREEDY).token_ids
    assert engine.is_alive


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.8}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
)
def test_penalties_change_what_is_said(engine: Engine, ids: list[int], penalty: dict[str, float]) -> None:
    plain = replace(SAMPLED, seed=1, temperature=1.0, max_tokens=100)
    assert made(engine, ids, replace(plain, **penalty)).token_ids != made(engine, ids, plain).token_ids


# Ends


def test_eos_ends_a_sequence_unless_ignored(engine: Engine, loaded: LoadedModel, ids: list[int]) -> None:
    ended = made(engine, ids, GREEDY)
    assert (ended.reason, ended.token_ids[-1] in loaded.eos_token_ids) == (FinishReason.EOS_TOKEN, True)
    ignored = made(engine, ids, replace(GREEDY, ignore_eos=True))
    assert (ignored.reason, len(ignored.token_ids)) == (FinishReason.LENGTH, 48)
    assert ignored.token_ids[: len(ended.token_ids)] == ended.token_ids


def test_min_tokens_holds_every_end_back(engine: Engine, loaded: LoadedModel, ids: list[int]) -> None:
    ended = made(engine, ids, GREEDY)
    stop = ended.token_ids[3]
    held = made(engine, ids, replace(GREEDY, min_tokens=40, stop_token_ids=(stop,)))
    assert len(held.token_ids) >= 40
    assert not {stop, *loaded.eos_token_ids} & set(held.token_ids[:39])


def test_a_stop_token_ends_a_sequence(engine: Engine, loaded: LoadedModel, ids: list[int]) -> None:
    ended = made(engine, ids, GREEDY)
    stop = ended.token_ids[3]
    stopped = made(engine, ids, replace(GREEDY, stop_token_ids=(stop,)))
    assert stopped.token_ids == ended.token_ids[: ended.token_ids.index(stop) + 1]
    assert stopped.reason is FinishReason.STOP_SEQUENCE
    [eos] = loaded.eos_token_ids
    as_stop = made(engine, ids, replace(GREEDY, stop_token_ids=(eos,), ignore_eos=True))
    assert (as_stop.token_ids, as_stop.reason) == (ended.token_ids, FinishReason.STOP_SEQUENCE)


def test_max_tokens_ends_a_sequence_with_length(engine: Engine, ids: list[int]) -> None:
    for count in (1, 2):
        answer = made(engine, ids, replace(GREEDY, max_tokens=count))
        assert (len(answer.token_ids), answer.reason) == (count, FinishReason.LENGTH)


# Log probabilities


@pytest.fixture(scope="module")
def plain() -> LoadedModel:
    """The model as transformers runs it, never touched by an engine."""
    return load()


def expected_logprobs(plain: LoadedModel, ids: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """(tokens, vocabulary), by a single forward over prompt and completion."""
    with torch.no_grad():
        logits = plain.model(torch.tensor([[*ids, *completion]])).logits[0]
    return torch.as_tensor(logits[len(ids) - 1 : -1].float().log_softmax(dim=-1))


def assert_logprobs(plain: LoadedModel, ids: Sequence[int], answer: Made, top: int) -> None:
    expected = expected_logprobs(plain, ids, answer.token_ids)
    assert [chosen.token_id for chosen in answer.logprobs] == answer.token_ids
    for row, chosen in zip(expected, answer.logprobs, strict=True):
        assert chosen.logprob == pytest.approx(row[chosen.token_id].item(), abs=1e-3)
        assert [value for _, value in chosen.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-3)
        assert [row[token_id].item() for token_id, _ in chosen.top] == pytest.approx(
            row.topk(top).values.tolist(), abs=1e-3
        )


@pytest.mark.parametrize("top", [0, 1, 5])
def test_logprobs_are_the_models_whatever_is_sampled(
    engine: Engine, plain: LoadedModel, ids: list[int], top: int
) -> None:
    asked = [
        (ids, replace(GREEDY, logprobs=top)),
        (ids, replace(SAMPLED, logprobs=top)),
        (ids, replace(SAMPLED, logprobs=top, repetition_penalty=1.5, min_tokens=8)),
        (ids, SAMPLED),
    ]
    *with_logprobs, without = made_together(engine, asked)
    for answer in with_logprobs:
        assert_logprobs(plain, ids, answer, top)
    assert without.logprobs == []


# Admission


def test_as_many_as_run_and_wait_are_taken_and_one_more_is_refused_at_once(engine: Engine, ids: list[int]) -> None:
    async def crowd() -> None:
        streams = engine.submit([(ids, LONG)] * (engine.capacity - 1))
        with pytest.raises(Overloaded, match=f"{engine.capacity - 1} of {engine.capacity} sequence slots"):
            engine.submit([(ids, LONG)] * 2)
        assert engine.running + engine.waiting == engine.capacity - 1, "all of them or none"
        [last] = engine.submit([(ids, LONG)])
        with pytest.raises(Overloaded):
            engine.submit([(ids, LONG)])
        streams.pop().close()
        streams += engine.submit([(ids, LONG)])
        for stream in [*streams, last]:
            stream.close()
        await until_idle(engine)

    asyncio.run(crowd())


def test_more_than_ever_fit_is_the_clients_mistake(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="Request at most"):
        asyncio.run(asyncio.to_thread(engine.submit, [(ids, GREEDY)] * (engine.capacity + 1)))


def test_those_that_wait_come_to_run(engine: Engine, ids: list[int]) -> None:
    answers = made_together(engine, [(ids, GREEDY)] * engine.capacity)
    assert {tuple(answer.token_ids) for answer in answers} == {tuple(made(engine, ids, GREEDY).token_ids)}


# Leaving


@pytest.mark.parametrize("seconds", [-1.0, 0.05])
def test_a_sequence_whose_time_is_over_fails_and_leaves(engine: Engine, ids: list[int], seconds: float) -> None:
    async def hurry() -> None:
        [stream] = engine.submit([(ids, LONG)], time.monotonic() + seconds)
        with pytest.raises(DeadlineExceeded, match="raise the timeout"):
            await read(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await until_idle(engine)

    asyncio.run(hurry())
    assert (engine.running, engine.waiting, engine.cache_usage) == (0, 0, 0.0)


def test_a_sequence_that_waits_can_be_closed_before_its_first_step(engine: Engine, ids: list[int]) -> None:
    async def leave() -> None:
        for stream in engine.submit([(ids, LONG)] * engine.capacity):
            stream.close()
            stream.close()
        assert engine.waiting == 0
        await until_idle(engine)

    asyncio.run(leave())
    assert not engine._executor._manager.output_router.result_handlers


def test_a_sequence_that_cannot_choose_fails_alone(
    engine: Engine, ids: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose = SequenceSampler.__call__

    def fail(sampler: SequenceSampler, logits: torch.Tensor, token_ids: Sequence[int]) -> None:
        if sampler._sampling.seed == 666 and sampler._generator is not None:
            raise ZeroDivisionError("no such token")
        choose(sampler, logits, token_ids)

    alone = made(engine, ids, GREEDY)
    monkeypatch.setattr(SequenceSampler, "__call__", fail)

    async def crowd() -> list[Made | BaseException]:
        bad = make(engine, ids, replace(SAMPLED, seed=666))
        return await asyncio.gather(*(make(engine, ids, GREEDY) for _ in range(5)), bad, return_exceptions=True)

    *good, bad = asyncio.run(asyncio.wait_for(crowd(), timeout=60))
    assert all(isinstance(answer, Made) and answer.token_ids == alone.token_ids for answer in good)
    assert isinstance(bad, GenerationFailed)
    assert "ZeroDivisionError: no such token" in caplog.text
    assert engine.is_alive
    assert made(engine, ids, GREEDY).token_ids == alone.token_ids
    asyncio.run(until_idle(engine))


# The KV cache


def test_a_common_prefix_is_computed_once(engine: Engine, loaded: LoadedModel) -> None:
    prefix = noise(loaded, 2 * PAGE_TOKENS + 100, seed=1)
    one = replace(GREEDY, max_tokens=4, ignore_eos=True, logprobs=0)

    def steps(ids: Sequence[int]) -> tuple[int, Made]:
        before = engine.steps
        answer = made(engine, ids, one)
        return engine.steps - before, answer

    first, _ = steps([*prefix, 6, 7])
    second, shared = steps([*prefix, 8, 9])
    unrelated, _ = steps(noise(loaded, len(prefix) + 2, seed=2))
    assert first == unrelated
    assert second == first - 2 * PAGE_TOKENS // 128
    assert engine.cache_usage == 0.0, "what is kept for prefixes is free"
    other = engine_of(load())
    try:
        assert made(other, [*prefix, 8, 9], one).token_ids == shared.token_ids
    finally:
        other.stop()


def test_a_full_cache_makes_sequences_wait_or_begin_again_and_all_end_right(
    small: Engine, engine: Engine, plain: LoadedModel
) -> None:
    sampling = replace(GREEDY, max_tokens=120, ignore_eos=True, logprobs=1)
    lengths = [40, 130, 200, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 300, 400]
    prompts = [noise(plain, length, seed=length) for length in lengths]
    resets = 0
    finish_request = small._executor._manager.batch_processor.scheduler.finish_request

    def count(request_id: str) -> None:
        nonlocal resets
        resets += 1
        finish_request(request_id)

    small._executor._manager.batch_processor.scheduler.finish_request = count
    answers = made_together(small, [(ids, sampling) for ids in prompts])
    assert resets > len(prompts), "some sequence was taken out of the full cache and began again"
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == made(engine, ids, replace(sampling, logprobs=None)).token_ids
        assert answer.reason is FinishReason.LENGTH
        assert_logprobs(plain, ids, answer, top=1)
    assert (small.running, small.waiting, small.cache_usage) == (0, 0, 0.0)


def test_a_seed_repeats_through_a_full_cache(small: Engine, engine: Engine, loaded: LoadedModel) -> None:
    asked = [(noise(loaded, 230 + seed, seed), replace(SAMPLED, seed=seed, max_tokens=60)) for seed in range(6)]
    crowd = made_together(small, asked)
    assert [answer.token_ids for answer in crowd] == [made(engine, *one).token_ids for one in asked]


def test_those_that_wait_for_the_cache_go_on_when_those_in_it_leave(small: Engine, loaded: LoadedModel) -> None:
    """The manager lets nobody in while a sequence was taken out, until one finishes: here all of them leave."""
    long = replace(LONG, max_tokens=500)

    async def leave() -> None:
        streams = small.submit([(noise(loaded, 500, seed), long) for seed in range(3)])
        readers = {stream: asyncio.create_task(read(stream)) for stream in streams}
        scheduler = small._executor._manager.batch_processor.scheduler
        while not scheduler.block_new_requests:  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0)
        inside = set(scheduler.active_requests)
        for stream, reader in readers.items():
            if stream._id in inside:
                reader.cancel()
                stream.close()
        left = [reader for stream, reader in readers.items() if stream._id not in inside]
        assert left
        for reader in left:
            assert len((await reader).token_ids) == 500

    asyncio.run(asyncio.wait_for(leave(), timeout=60))
    assert (small.running, small.waiting) == (0, 0)


def test_sequences_as_long_as_the_whole_cache_take_turns(small: Engine, loaded: LoadedModel) -> None:
    whole = small.context_tokens
    assert whole == small.cache_tokens == 1024
    asked = [(noise(loaded, whole - 30, seed), replace(GREEDY, max_tokens=30, ignore_eos=True)) for seed in range(3)]
    assert [len(answer.token_ids) for answer in made_together(small, asked)] == [30, 30, 30]


@pytest.mark.slow
def test_a_full_cache_survives_whatever_comes_and_goes(small: Engine, loaded: LoadedModel) -> None:
    rng = random.Random(5)
    shared = noise(loaded, 300, seed=300)

    async def one(seed: int) -> None:
        prefix = shared[: rng.choice([0, 0, 256, 300])]
        ids = [*prefix, *noise(loaded, rng.randint(1, 400), seed)]
        sampling = replace(rng.choice([GREEDY, SAMPLED]), max_tokens=rng.randint(1, 300), ignore_eos=True)
        leave_after = rng.choice([None, None, 1, 20])
        [stream] = small.submit([(ids, sampling)])
        count = 0
        async for step in stream:
            count += len(step.token_ids)
            if leave_after is not None and count >= leave_after:
                stream.close()
                return
        assert count == sampling.max_tokens

    async def storm() -> None:
        for wave in range(6):
            await asyncio.gather(*(one(wave * 100 + index) for index in range(20)))
        await until_idle(small)

    asyncio.run(asyncio.wait_for(storm(), timeout=240))
    assert (small.running, small.waiting, small.cache_usage) == (0, 0, 0.0)
    assert small.is_alive
