"""The real batching manager on the demo model."""

import asyncio
from collections.abc import Iterator

import pytest

from demo import exam
from devtools.processes import ROOT
from predictor.engine.engine import Engine
from predictor.errors import EngineStopped
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.types import FinishReason, SamplingParams

GREEDY = SamplingParams(max_tokens=48, temperature=0.0, top_p=1.0, top_k=0)
SAMPLED = SamplingParams(max_tokens=48, temperature=8.0, top_p=1.0, top_k=0)


def load() -> LoadedModel:
    return loader.load(ROOT / "demo" / "model", device="cpu", dtype="float32", trust_remote_code=False)


def started(loaded: LoadedModel, kv_cache_tokens: int = 8192) -> Engine:
    engine = Engine.from_model(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=loaded.context_tokens,
        max_num_seqs=16,
        max_queued_requests=48,
        max_num_batched_tokens=128,
        kv_cache_tokens=kv_cache_tokens,
    )
    engine.start()
    return engine


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load()


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    running = started(loaded)
    yield running
    running.stop()


def prompt(loaded: LoadedModel, question: str) -> list[int]:
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return list(loaded.tokenizer.encode(text, add_special_tokens=False))


async def tokens(engine: Engine, ids: list[int], sampling: SamplingParams) -> tuple[list[int], FinishReason | None]:
    generated: list[int] = []
    reason = None
    [stream] = engine.submit([(ids, sampling)])
    async for step in stream:
        assert reason is None, "nothing comes after a finish reason"
        generated += step.token_ids
        reason = step.finish_reason
    return generated, reason


def test_answers_and_ends_with_eos(engine: Engine, loaded: LoadedModel) -> None:
    generated, reason = asyncio.run(tokens(engine, prompt(loaded, "What is 17 + 25?"), GREEDY))
    assert loaded.tokenizer.decode(generated, skip_special_tokens=True) == "7+5=12 1+2+1=4 42"
    assert generated[-1] in loaded.eos_token_ids
    assert reason is FinishReason.EOS_TOKEN


def test_ends_with_length_after_max_tokens(engine: Engine, loaded: LoadedModel) -> None:
    sampling = SamplingParams(max_tokens=3, temperature=0.0, top_p=1.0, top_k=0)
    generated, reason = asyncio.run(tokens(engine, prompt(loaded, "What is 17 + 25?"), sampling))
    assert len(generated) == 3
    assert reason is FinishReason.LENGTH


def test_greedy_tokens_are_the_same_alone_and_in_a_crowd(engine: Engine, loaded: LoadedModel) -> None:
    questions = [question for question, _ in exam.held_out_questions(24)]
    prompts = [prompt(loaded, question) for question in questions]

    async def alone() -> list[tuple[list[int], FinishReason | None]]:
        return [await tokens(engine, ids, GREEDY) for ids in prompts[:6]]

    async def crowd() -> list[tuple[list[int], FinishReason | None]]:
        greedy = [tokens(engine, ids, GREEDY) for ids in prompts]
        sampled = [tokens(engine, ids, SAMPLED) for ids in prompts]
        return (await asyncio.gather(*greedy, *sampled))[:6]

    assert asyncio.run(alone()) == asyncio.run(crowd())


def test_a_prompt_longer_than_a_step_is_computed_in_chunks(engine: Engine, loaded: LoadedModel) -> None:
    chat = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "1 " * 120}]
    text = loaded.tokenizer.apply_chat_template(
        [*chat, {"role": "user", "content": "Hello!"}], tokenize=False, add_generation_prompt=True
    )
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 128
    generated, _ = asyncio.run(tokens(engine, list(ids), GREEDY))
    assert generated


def test_sampling_above_zero_varies_and_top_k_of_one_does_not(engine: Engine, loaded: LoadedModel) -> None:
    ids = prompt(loaded, "Tell me something")

    async def several(sampling: SamplingParams) -> set[tuple[int, ...]]:
        answers = await asyncio.gather(*(tokens(engine, ids, sampling) for _ in range(6)))
        return {tuple(generated) for generated, _ in answers}

    assert len(asyncio.run(several(SAMPLED))) > 1
    assert len(asyncio.run(several(SamplingParams(max_tokens=48, temperature=8.0, top_p=1.0, top_k=1)))) == 1
    assert len(asyncio.run(several(SamplingParams(max_tokens=48, temperature=1e-30, top_p=1e-9, top_k=10**6)))) == 1


def test_closing_a_stream_frees_the_place(engine: Engine, loaded: LoadedModel) -> None:
    long = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)

    async def begin_and_leave() -> None:
        [stream] = engine.submit([(prompt(loaded, "What is 17 + 25?"), long)])
        await anext(stream)
        assert engine.running == 1
        assert engine.cache_usage > 0
        before = engine.steps
        stream.close()
        while engine.running:  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0.001)
        assert engine.steps - before <= 2

    asyncio.run(asyncio.wait_for(begin_and_leave(), timeout=30))
    assert (engine.running, engine.waiting, engine.cache_usage) == (0, 0, 0.0)
    assert not engine._executor._manager.output_router.result_handlers


def test_a_stream_that_is_closed_before_its_first_token_knows_whether_it_ran(
    engine: Engine, loaded: LoadedModel
) -> None:
    endless = SamplingParams(max_tokens=900, temperature=0.0, top_p=1.0, top_k=0, ignore_eos=True)

    async def close_all() -> list[bool]:
        streams = engine.submit([(prompt(loaded, "Hello!"), endless)] * 17)
        while engine.running < 16:  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0.01)
        # The one that waits first, lest it gets a place.
        for stream in reversed(streams):
            stream.close()
        assert [stream.first_token_seconds for stream in streams] == [None] * 17
        while engine.running:  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0.01)
        return [stream.queue_seconds is not None for stream in streams]

    assert asyncio.run(close_all()) == [True] * 16 + [False]


def test_a_small_cache_limits_the_context_and_is_shared_out(loaded: LoadedModel) -> None:
    small = started(load(), kv_cache_tokens=512)
    sampling = SamplingParams(max_tokens=112, temperature=0.0, top_p=1.0, top_k=0)

    async def both() -> list[tuple[list[int], FinishReason | None]]:
        return await asyncio.gather(*(tokens(small, [first, *[5] * 399], sampling) for first in (10, 20)))

    try:
        assert small.context_tokens == 512 < loaded.context_tokens
        alone = [asyncio.run(tokens(small, [first, *[5] * 399], sampling)) for first in (10, 20)]
        assert alone == asyncio.run(both()), "each would fill the cache, so one has to wait for the other"
    finally:
        small.stop()


def test_says_so_when_it_has_stopped() -> None:
    stopped = started(load())
    assert stopped.is_alive
    stopped.stop()
    assert not stopped.is_alive
    with pytest.raises(EngineStopped, match="shutting down"):
        asyncio.run(tokens(stopped, [1, 5], GREEDY))
    stopped.stop()
