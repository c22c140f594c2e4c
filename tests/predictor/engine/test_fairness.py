"""Callers that share the batch of a real engine; time is counted in steps."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from predictor.engine.engine import Engine
from predictor.engine.fair_scheduler import FairScheduler
from predictor.engine.stream import Stream
from predictor.errors import Overloaded, RateLimited
from predictor.models.loader import LoadedModel
from predictor.types import Caller, SamplingParams
from tests.predictor.engine.conftest import GREEDY, LONG, generate_all, random_ids, read, started, until_idle
from tests.predictor.servers import HANG_SECONDS, Hold

ALICE, BOB, CAROL = (Caller(name, share=1 / 3) for name in ("alice", "bob", "carol"))
TEN = replace(GREEDY, max_tokens=10, ignore_eos=True)
PLACES = 8


@pytest.fixture(scope="module")
def wide(loaded: LoadedModel) -> Iterator[Engine]:
    """An engine with more places in the queue than the session's."""
    with started(loaded, max_queued_requests=72) as running:
        yield running


async def blocked(hold: Hold) -> None:
    assert await asyncio.to_thread(hold.blocked.wait, HANG_SECONDS)
    await asyncio.sleep(0)  # outputs of the last step were scheduled before


async def step(hold: Hold, passes: int) -> None:
    """Make this number of forward passes, and block before the next."""
    hold.step(passes)
    await blocked(hold)


def first_tokens(streams: Sequence[Stream]) -> list[int]:
    """Indices of the streams of which a token has arrived."""
    return [index for index, stream in enumerate(streams) if not stream._outputs.empty()]


def submit(engine: Engine, caller: Caller | None, count: int, ids: list[int], sampling: SamplingParams) -> list[Stream]:
    return engine.submit([(ids, sampling)] * count, caller=caller)


async def submit_blocked(
    engine: Engine, hold: Hold, caller: Caller | None, count: int, ids: list[int], sampling: SamplingParams
) -> list[Stream]:
    """Submit sequences all at once, and make two passes: as many as fit are in the batch, and the rest waits."""
    hold.close()
    streams = submit(engine, caller, count, ids, sampling)
    await blocked(hold)
    await step(hold, 2)
    return streams


@contextmanager
def closing(hold: Hold, *groups: list[Stream]) -> Iterator[None]:
    try:
        yield
    finally:
        hold.open()
        for stream in (stream for group in groups for stream in group):
            stream.close()


@pytest.mark.parametrize("prompt_tokens", [9, 300])
def test_fairness_one_request_next_to_64_of_another_key_starts_within_two_steps(
    wide: Engine, loaded: LoadedModel, hold: Hold, prompt_tokens: int
) -> None:
    """Also while the others compute prompts that are longer than a step, and fill the batch."""

    async def run() -> None:
        greedy = await submit_blocked(wide, hold, ALICE, 64, random_ids(loaded, prompt_tokens, seed=1), LONG)
        [other] = submit(wide, BOB, 1, random_ids(loaded, 9, seed=2), LONG)
        with closing(hold, greedy, [other]):
            before = wide.steps
            # The step that is blocked was scheduled before.
            await step(hold, 2)
            assert wide.steps - before == 2
            assert first_tokens([other]) == [0]
            assert wide.running <= PLACES
        await until_idle(wide)

    asyncio.run(run())


def test_fairness_several_newcomers_start_at_once(wide: Engine, loaded: LoadedModel, hold: Hold) -> None:
    async def run() -> None:
        greedy = await submit_blocked(wide, hold, ALICE, 64, random_ids(loaded, 9, seed=1), LONG)
        others = [submit(wide, caller, 1, random_ids(loaded, 9, seed=2), LONG)[0] for caller in (BOB, CAROL, None)]
        with closing(hold, greedy, others):
            await step(hold, 2)
            assert first_tokens(others) == [0, 1, 2]
        await until_idle(wide)

    asyncio.run(run())


def test_fairness_newcomer_starts_though_the_cache_is_full(loaded: LoadedModel, hold: Hold) -> None:
    async def run(engine: Engine) -> None:
        hold.close()
        greedy = engine.submit([(random_ids(loaded, 250 + seed, seed), LONG) for seed in range(4)], caller=ALICE)
        await blocked(hold)
        await step(hold, 12)
        assert engine.running < 4, "the cache, not the batch, is full"
        [other] = submit(engine, BOB, 1, random_ids(loaded, 9, seed=9), LONG)
        with closing(hold, greedy, [other]):
            await step(hold, 2)
            assert first_tokens([other]) == [0]
        await until_idle(engine)

    with started(loaded, kv_cache_tokens=1024) as engine:
        asyncio.run(run(engine))


def test_fairness_sequence_that_left_for_nothing_does_not_start_and_leave_again(
    loaded: LoadedModel, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newcomer's prompt does not fit next to the other's last sequence."""
    preempt, preempted = FairScheduler._preempt, []

    def count(scheduler: Any, request_id: str) -> None:
        preempted.append(request_id)
        preempt(scheduler, request_id)

    async def run(engine: Engine) -> None:
        monkeypatch.setattr(FairScheduler, "_preempt", count)
        hold.close()
        long, short = replace(TEN, max_tokens=40), replace(TEN, max_tokens=60)
        first = engine.submit([(random_ids(loaded, 700, 1), long), (random_ids(loaded, 9, 2), short)], caller=ALICE)
        await blocked(hold)
        await step(hold, 4)
        assert engine.running == 2
        [other] = submit(engine, BOB, 1, random_ids(loaded, 600, seed=3), TEN)
        with closing(hold, first, [other]):
            await step(hold, 20)
            assert (len(preempted), engine.running, engine.waiting) == (1, 1, 2)
            hold.open()
            lengths = [len((await read(stream)).token_ids) for stream in (*first, other)]
        assert lengths == [40, 60, 10]

    with started(loaded, kv_cache_tokens=1024, max_num_batched_tokens=512) as engine:
        asyncio.run(run(engine))


def test_fairness_preempted_sequences_keep_their_tokens(wide: Engine, loaded: LoadedModel, ids: list[int]) -> None:
    sampled = [replace(LONG, max_tokens=60, temperature=2.0, seed=seed, logprobs=1) for seed in range(PLACES + 2)]
    undisturbed = generate_all(wide, [(ids, sampling) for sampling in sampled])

    async def run() -> None:
        streams = [wide.submit([(ids, sampling)], caller=ALICE)[0] for sampling in sampled]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        others = []
        for seed in range(12):
            [other] = submit(wide, BOB, 1, random_ids(loaded, 9, seed), TEN)
            others.append(await read(other))
        preempted = await asyncio.gather(*readers)
        assert [generated.token_ids for generated in preempted] == [generated.token_ids for generated in undisturbed]
        assert [len(generated.logprobs) for generated in preempted] == [60] * len(sampled)
        assert [len(other.token_ids) for other in others] == [10] * 12

    async def limited() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            await run()

    asyncio.run(limited())


def test_fairness_tokens_follow_the_weights(wide: Engine, loaded: LoadedModel, hold: Hold) -> None:
    """Although the other caller was first, and its completions are longer than the test."""
    heavy = replace(BOB, weight=3)

    async def run() -> float:
        hold.close()
        alices = submit(wide, ALICE, 20, random_ids(loaded, 9, seed=1), LONG)
        await blocked(hold)
        bobs = submit(wide, heavy, 50, random_ids(loaded, 9, seed=2), replace(TEN, max_tokens=60))
        with closing(hold, alices, bobs):
            await step(hold, 200)
            generated = [sum(map(newest_tokens, group)) for group in (alices, bobs)]
        await until_idle(wide)
        return generated[1] / generated[0]

    assert asyncio.run(run()) == pytest.approx(3, rel=0.1)


def newest_tokens(stream: Stream) -> int:
    """Number of tokens of a stream that was not read."""
    output = None
    while not stream._outputs.empty():
        output = stream._outputs.get_nowait()
    return len(output.token_ids) if output else 0


async def starts(
    engine: Engine, hold: Hold, sequences: Sequence[tuple[list[int], SamplingParams, Caller | None]]
) -> list[int]:
    """Order in which the sequences start behind a batch of one caller that is full."""
    first = await submit_blocked(engine, hold, sequences[0][2], PLACES, sequences[0][0], LONG)
    waiting = [engine.submit([(ids, sampling)], caller=caller)[0] for ids, sampling, caller in sequences]
    order: list[int] = []
    with closing(hold, first, waiting):
        for leaving in list(first):
            leaving.close()
            await step(hold, 2)
            order += [index for index in first_tokens(waiting) if index not in order]
    await until_idle(engine)
    return order


@pytest.mark.parametrize("caller", [None, ALICE])
def test_fairness_sequences_of_one_caller_start_in_their_order(
    wide: Engine, ids: list[int], hold: Hold, caller: Caller | None
) -> None:
    assert asyncio.run(starts(wide, hold, [(ids, LONG, caller)] * 6)) == list(range(6))


@pytest.mark.parametrize("caller", [None, ALICE])
def test_fairness_lower_priority_of_a_caller_starts_earlier(
    wide: Engine, ids: list[int], hold: Hold, caller: Caller | None
) -> None:
    sequences = [(ids, replace(LONG, priority=priority), caller) for priority in (0, 5, -1, 0, 5, -2)]
    assert asyncio.run(starts(wide, hold, sequences)) == [5, 2, 0, 3, 1, 4]


def test_fairness_priority_does_not_pass_another_caller(wide: Engine, ids: list[int], hold: Hold) -> None:
    sequences = [(ids, replace(LONG, priority=-100), ALICE)] * 3 + [(ids, LONG, BOB)] * 3
    order = asyncio.run(starts(wide, hold, sequences))
    assert order[0] == 3
    assert sorted(order) == list(range(6))


def test_fairness_cancelled_waiting_sequence_frees_its_place(wide: Engine, ids: list[int], hold: Hold) -> None:
    async def run() -> None:
        streams = await submit_blocked(wide, hold, ALICE, wide.capacity, ids, LONG)
        with closing(hold, streams):
            with pytest.raises(Overloaded):
                submit(wide, ALICE, 1, ids, LONG)
            streams.pop().close()
            streams += submit(wide, ALICE, 1, ids, LONG)
        await until_idle(wide)
        async with asyncio.timeout(HANG_SECONDS):
            # The step loop forgets them.
            while scheduler.fair_queue._tickets:  # noqa: ASYNC110, there is no event for it
                await asyncio.sleep(0.001)

    scheduler = wide._executor._manager.batch_processor.scheduler  # type: ignore[attr-defined]
    asyncio.run(run())


def test_fairness_cancelled_sequences_leave_in_the_order_of_their_ids() -> None:
    """Ranks free blocks in the same order, though the order of a set of strings differs between processes."""
    freed: list[str] = []
    scheduler = FairScheduler(SimpleNamespace(free_blocks=freed.append), safety_margin=0.0, max_requests_per_batch=1)
    request_ids = [f"sequence {number}" for number in range(30)]
    for request_id in request_ids:
        scheduler.set_request_cancellation(request_id)
    scheduler.clear_cancelled_requests()
    scheduler.clear_cancelled_requests()
    assert freed == sorted(request_ids)


def test_fairness_full_queue_of_one_caller_leaves_the_others_their_share(
    wide: Engine, ids: list[int], hold: Hold
) -> None:
    async def run() -> None:
        streams = await submit_blocked(wide, hold, ALICE, wide.capacity, ids, LONG)
        with closing(hold, streams):
            share = wide.capacity // 3
            streams += submit(wide, BOB, share, ids, LONG)
            with pytest.raises(Overloaded, match=f"{wide.capacity + share} of {wide.capacity} sequence slots"):
                submit(wide, BOB, 1, ids, LONG)
            streams += submit(wide, CAROL, share, ids, LONG)
        await until_idle(wide)

    asyncio.run(run())


def test_fairness_concurrent_sequences_of_a_key_are_limited(wide: Engine, ids: list[int], hold: Hold) -> None:
    limited = replace(ALICE, concurrent_sequences=2)

    async def run() -> None:
        hold.close()
        streams = submit(wide, limited, 2, ids, LONG)
        with closing(hold, streams):
            with pytest.raises(RateLimited, match="API key alice has 2 of its 2 concurrent sequences") as raised:
                submit(wide, limited, 1, ids, LONG)
            assert (raised.value.limit, raised.value.retry_after_seconds) == ("concurrent_sequences", 1)
            streams += submit(wide, BOB, 1, ids, LONG)
            streams[0].close()
            streams += submit(wide, limited, 1, ids, LONG)
        await until_idle(wide)

    asyncio.run(run())
