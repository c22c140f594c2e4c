"""The pooling engine with a model that returns the first token of each input, and can be blocked or fail."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import pytest
import torch

from predictor.engine import warm_up
from predictor.engine.pooling_engine import PoolingEngine
from predictor.engine.pooling_model import PoolingInput
from predictor.errors import DeadlineExceeded, EngineStopped, GenerationFailed, OutOfMemory, Overloaded
from predictor.types import Caller

HANG_SECONDS = 60


class Panic(BaseException):
    """As of a Rust extension."""


class FirstTokens:
    """Rows of one value, and the batches in which they were computed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.fitting = 0
        """Inputs that fit into memory if one of them is 11."""
        self.opened = threading.Event()
        self.opened.set()
        self.blocked = threading.Event()

    def __call__(self, inputs: Sequence[PoolingInput]) -> Any:
        if not self.opened.is_set():
            self.blocked.set()
            assert self.opened.wait(HANG_SECONDS)
        firsts = [each.token_ids[0] for each in inputs]
        self.batches.append(firsts)
        if 13 in firsts:
            raise RuntimeError("no thirteen")
        if 17 in firsts:
            raise Panic
        if 11 in firsts and len(firsts) > self.fitting:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return numpy.array([[numpy.nan if first == 99 else first] for first in firsts], numpy.float32)


@pytest.fixture
def model() -> FirstTokens:
    return FirstTokens()


@pytest.fixture
def start(model: FirstTokens) -> Iterator[Callable[..., PoolingEngine]]:
    engines: list[PoolingEngine] = []

    def create(**limits: Any) -> PoolingEngine:
        defaults = {"context_tokens": 64, "max_batch_tokens": 16, "max_batch_inputs": 4, "capacity": 8}
        engine = PoolingEngine(model, **(defaults | {"step_timeout_seconds": HANG_SECONDS} | limits))
        engine.start()
        engines.append(engine)
        return engine

    yield create
    model.opened.set()
    for engine in engines:
        engine.stop()
        assert engine.has_ended


def inputs(*firsts: int, length: int = 1) -> list[PoolingInput]:
    return [PoolingInput([first] * length) for first in firsts]


async def compute(engine: PoolingEngine, items: list[PoolingInput], **options: Any) -> list[float]:
    rows, _ = await engine.compute(items, **options)
    values: list[float] = rows[:, 0].tolist()
    return values


async def block(engine: PoolingEngine, model: FirstTokens) -> "asyncio.Task[list[float]]":
    """Start a request that blocks the engine in its batch."""
    model.opened.clear()
    task = asyncio.create_task(compute(engine, inputs(1)))
    assert await asyncio.to_thread(model.blocked.wait, HANG_SECONDS)
    return task


async def until_not_alive(engine: PoolingEngine) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while engine.is_alive:  # noqa: ASYNC110, a property of the clock
            await asyncio.sleep(0.01)


def test_rows_are_in_the_order_of_the_inputs_whatever_their_batches(
    model: FirstTokens, start: Callable[..., PoolingEngine]
) -> None:
    items = [PoolingInput([number] * length) for number, length in ((1, 3), (2, 20), (3, 1), (4, 8), (5, 8), (6, 5))]
    assert asyncio.run(compute(start(), items)) == [1, 2, 3, 4, 5, 6]
    # The longest first; 16 tokens with padding at most, except for an input that is longer itself.
    assert model.batches == [[2], [5, 4], [6, 1, 3]]


def test_requests_take_turns(model: FirstTokens, start: Callable[..., PoolingEngine]) -> None:
    async def run() -> None:
        engine = start(max_batch_inputs=2)
        blocked = await block(engine, model)
        many = asyncio.create_task(compute(engine, inputs(*range(20, 26))))
        one = asyncio.create_task(compute(engine, inputs(7)))
        await asyncio.sleep(0)
        model.opened.set()
        assert [await blocked, await one] == [[1], [7]]
        await many

    asyncio.run(run())
    assert 7 in model.batches[1]


def test_failed_batch_fails_its_requests_only(start: Callable[..., PoolingEngine]) -> None:
    engine = start()
    with pytest.raises(GenerationFailed, match=r"The forward pass failed\. See the server log\."):
        asyncio.run(compute(engine, inputs(13)))
    assert asyncio.run(compute(engine, inputs(14))) == [14]
    assert (engine.steps, engine.failed_steps) == (1, 1)


def test_batch_out_of_memory_is_computed_in_smaller_ones(
    model: FirstTokens, start: Callable[..., PoolingEngine]
) -> None:
    model.fitting = 1

    async def run() -> None:
        engine = start()
        blocked = await block(engine, model)
        tasks = [asyncio.create_task(compute(engine, inputs(*firsts))) for firsts in ((11, 12), (14,), (15,))]
        await asyncio.sleep(0)
        model.opened.set()
        assert [await task for task in (blocked, *tasks)] == [[1], [11, 12], [14], [15]]
        assert (engine.failed_steps, engine.waiting) == (2, 0)

    asyncio.run(run())
    assert model.batches[1:] == [[12, 14, 15, 11], [14, 15], [12, 11], [12], [11]]


def test_input_out_of_memory_fails_its_request_only(start: Callable[..., PoolingEngine]) -> None:
    engine = start()
    with pytest.raises(OutOfMemory, match=r"an input of the request does not fit\. Shorten it"):
        asyncio.run(compute(engine, inputs(11)))
    assert asyncio.run(compute(engine, inputs(14))) == [14]


def test_row_that_is_not_a_number_fails_its_request_only(
    model: FirstTokens, start: Callable[..., PoolingEngine]
) -> None:
    async def run() -> None:
        engine = start()
        blocked = await block(engine, model)
        bad, good = (asyncio.create_task(compute(engine, inputs(first))) for first in (99, 5))
        await asyncio.sleep(0)
        model.opened.set()
        with pytest.raises(GenerationFailed, match="not a number"):
            await bad
        assert [await blocked, await good] == [[1], [5]]

    asyncio.run(run())
    assert sorted(model.batches[1]) == [5, 99]


def test_request_beyond_its_deadline_or_cancelled_leaves_the_queue(
    model: FirstTokens, start: Callable[..., PoolingEngine]
) -> None:
    async def run() -> None:
        engine = start()
        blocked = await block(engine, model)
        with pytest.raises(DeadlineExceeded):
            await compute(engine, inputs(20), deadline=time.monotonic() + 0.01)
        task = asyncio.create_task(compute(engine, inputs(21)))
        await asyncio.sleep(0)
        assert engine.waiting == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.waiting == 0
        model.opened.set()
        assert await blocked == [1]
        assert await compute(engine, inputs(2)) == [2]

    asyncio.run(run())
    assert model.batches == [[1], [2]]


def test_request_without_a_place_is_rejected_unless_its_caller_has_a_share(
    model: FirstTokens, start: Callable[..., PoolingEngine]
) -> None:
    async def run() -> None:
        engine = start(capacity=2)
        blocked = await block(engine, model)
        waiting = asyncio.create_task(compute(engine, inputs(2)))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await compute(engine, inputs(3))
        of_caller = asyncio.create_task(compute(engine, inputs(4), caller=Caller("alice", share=0.5)))
        await asyncio.sleep(0)
        model.opened.set()
        assert [await blocked, await waiting, await of_caller] == [[1], [2], [4]]

    asyncio.run(run())


def test_stop_fails_waiting_requests_and_later_ones(model: FirstTokens, start: Callable[..., PoolingEngine]) -> None:
    async def run() -> None:
        engine = start()
        blocked = await block(engine, model)
        waiting = asyncio.create_task(compute(engine, inputs(2)))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
        await until_not_alive(engine)
        model.opened.set()
        await stopping
        assert await blocked == [1]
        with pytest.raises(EngineStopped):
            await waiting
        with pytest.raises(EngineStopped):
            await compute(engine, inputs(3))
        assert engine.has_ended

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_panic_ends_the_engine_and_fails_all_requests(model: FirstTokens, start: Callable[..., PoolingEngine]) -> None:
    async def run() -> None:
        engine = start(max_batch_inputs=1)
        blocked = await block(engine, model)
        tasks = [asyncio.create_task(compute(engine, inputs(first))) for first in (17, 1)]
        await asyncio.sleep(0)
        model.opened.set()
        assert await blocked == [1]
        async with asyncio.timeout(HANG_SECONDS):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert list(map(type, outcomes)) == [EngineStopped, EngineStopped]
        assert not engine.is_alive
        with pytest.raises(EngineStopped):
            await compute(engine, inputs(1))

    asyncio.run(run())


def test_engine_that_hangs_in_a_batch_is_not_alive(model: FirstTokens, start: Callable[..., PoolingEngine]) -> None:
    async def run() -> None:
        engine = start(step_timeout_seconds=0.05)
        assert engine.is_alive
        blocked = await block(engine, model)
        await until_not_alive(engine)
        model.opened.set()
        assert await blocked == [1]
        assert engine.is_alive

    asyncio.run(run())


def test_self_check_and_warm_up_compute_and_report_failures(
    model: FirstTokens, start: Callable[..., PoolingEngine]
) -> None:
    engine = start()
    asyncio.run(engine.check(HANG_SECONDS))
    assert model.batches == [[0]]
    asyncio.run(engine.warm_up(200, HANG_SECONDS))
    assert engine.num_outputs == 1
    model.opened.clear()
    with pytest.raises(DeadlineExceeded):
        asyncio.run(engine.check(0.01))
    model.opened.set()
    with pytest.raises(GenerationFailed, match="forward pass failed"):
        asyncio.run(engine.warm_up(52, HANG_SECONDS))


def test_rows_that_depend_on_their_batch_fail_the_warm_up() -> None:
    alone = torch.tensor([[1.0, 0.5], [0.2, 0.1]])
    warm_up.check_rows(alone, alone + 1e-3)
    with pytest.raises(GenerationFailed, match=r"depends on the rest of its batch.*difference 30%"):
        warm_up.check_rows(alone, alone + 0.3)
    with pytest.raises(GenerationFailed):
        warm_up.check_rows(alone, alone * torch.nan)
