"""Errors inside steps of the real batching manager: the sequences of the step fail, and everything else goes on."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from predictor.engine import causal_lm
from predictor.engine.engine import Engine
from predictor.engine.stream import Stream
from predictor.errors import EngineStopped, GenerationFailed
from predictor.models.loader import LoadedModel
from predictor.types import SamplingParams
from tests.predictor.engine.conftest import GREEDY, Generated, generate_all, random_ids, read, started, until_idle
from tests.predictor.servers import HANG_SECONDS

TEN = replace(GREEDY, max_tokens=10, ignore_eos=True)
PANIC = type("PanicException", (BaseException,), {})("a Rust extension failed")
Requests = list[tuple[list[int], SamplingParams]]


@pytest.fixture(scope="module")
def requests(loaded: LoadedModel) -> Requests:
    """More sequences than the batch has places; two have the same prompt of more than a page."""
    long = random_ids(loaded, 300, seed=1)
    short = [random_ids(loaded, 20 + seed, seed) for seed in range(2, 10)]
    return [(ids, TEN) for ids in (*short[:3], long, *short[3:], long, random_ids(loaded, 280, seed=11))]


@pytest.fixture(scope="module")
def expected(engine: Engine, requests: Requests) -> list[Generated]:
    return generate_all(engine, requests)


@pytest.fixture(autouse=True)
def forget_prefixes(engine: Engine) -> None:
    """Compute every prompt anew."""
    internals(engine).cache.evict_cached_blocks()


def internals(engine: Engine) -> Any:
    """The manager's batch processor."""
    return engine._executor._manager.batch_processor  # type: ignore[attr-defined]


class Failure:
    """A hook that raises `error` at its call `at`, counted from 1, and records the sequences of that step."""

    def __init__(self, engine: Engine, at: int, error: BaseException) -> None:
        self.step: set[str] = set()
        self._engine, self._at, self._error = engine, at, error
        self._calls = 0

    def is_now(self) -> bool:
        self._calls += 1
        return self._calls == self._at

    def __call__(self, *_: Any) -> None:
        if self.is_now():
            self.step = {state.request_id for state in internals(self._engine).scheduler.scheduled}
            raise self._error


@contextmanager
def spoiled_step(loaded: LoadedModel, failure: Failure, at: int) -> Iterator[None]:
    """Write NaN into the KV cache in step `at`, until the step fails in its last layer."""
    first, *_, last = loaded.model.model.layers
    count = 0

    def spoil(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        nonlocal count
        count += 1
        return (args[0] * torch.nan, *args[1:]) if count == at else None

    handles = [first.register_forward_pre_hook(spoil), last.register_forward_pre_hook(failure)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outcomes(engine: Engine, requests: Requests) -> tuple[list[Stream], list[Generated | BaseException]]:
    """Generate all sequences, and return the result or error of each."""

    async def together() -> tuple[list[Stream], list[Generated | BaseException]]:
        streams = engine.submit(requests)
        async with asyncio.timeout(HANG_SECONDS):
            results = await asyncio.gather(*map(read, streams), return_exceptions=True)
            await until_idle(engine)
        return streams, results

    return asyncio.run(together())


def assert_others_unchanged(
    engine: Engine, requests: Requests, expected: Sequence[Generated], results: Sequence[Generated | BaseException]
) -> None:
    """No trace of the failed sequences is left, and the others are token-exact, as are all of them afterwards."""
    for result, correct in zip(results, expected, strict=True):
        assert isinstance(result, GenerationFailed) or result == correct
    assert (engine.is_alive, engine.running, engine.waiting, engine.cache_usage) == (True, 0, 0, 0.0)
    manager = engine._executor._manager  # type: ignore[attr-defined]
    assert (manager.output_router.result_handlers, engine._executor._step_sampler.samplers) == ({}, {})  # type: ignore[attr-defined]
    assert generate_all(engine, requests) == expected


@pytest.mark.parametrize("error", [PANIC, ZeroDivisionError()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 2, 7, 15])
def test_step_failure_in_forward_fails_its_sequences_only(
    engine: Engine, loaded: LoadedModel, requests: Requests, expected: list[Generated], at: int, error: Exception
) -> None:
    failure = Failure(engine, at, error)
    before = engine.failed_steps
    with spoiled_step(loaded, failure, at):
        streams, results = outcomes(engine, requests)
    failed = {stream._id for stream, result in zip(streams, results, strict=True) if isinstance(result, Exception)}
    assert failed == failure.step
    assert 0 < len(failed) < len(requests)
    assert engine.failed_steps == before + 1
    assert_others_unchanged(engine, requests, expected, results)


def test_step_failure_of_a_prompt_chunk_is_not_shared_as_prefix(engine: Engine, loaded: LoadedModel) -> None:
    # The second chunk of 128 tokens completes the page that the waiting sequence would share.
    ids = random_ids(loaded, 300, seed=21)
    [correct] = generate_all(engine, [(ids, TEN)])
    internals(engine).cache.evict_cached_blocks()
    with spoiled_step(loaded, Failure(engine, 2, PANIC), 2):
        _, [first, second] = outcomes(engine, [(ids, TEN), (ids, TEN)])
    assert isinstance(first, GenerationFailed)
    assert second == correct
    assert generate_all(engine, [(ids, TEN)]) == [correct]


@pytest.mark.parametrize(
    ("method", "at"),
    [("can_store_request_tokens", 3), ("can_store_request_tokens", 20), ("mark_complete_blocks", 4)],
    ids=["first-schedule", "later-schedule", "update"],
)
def test_step_failure_outside_forward_leaves_waiting_sequences(
    engine: Engine,
    requests: Requests,
    expected: list[Generated],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    at: int,
) -> None:
    cache = internals(engine).cache
    call, failure = getattr(cache, method), Failure(engine, at, KeyError("request"))

    def fail_once(*args: Any, **options: Any) -> Any:
        failure()
        return call(*args, **options)

    monkeypatch.setattr(cache, method, fail_once)
    _, results = outcomes(engine, requests)
    assert 0 < sum(isinstance(result, GenerationFailed) for result in results) < len(requests)
    monkeypatch.undo()
    assert_others_unchanged(engine, requests, expected, results)


def test_step_failure_on_every_schedule_fails_waiting_sequences_too(
    engine: Engine, requests: Requests, expected: list[Generated], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("request")

    monkeypatch.setattr(internals(engine).cache, "can_store_request_tokens", fail)
    _, results = outcomes(engine, requests)
    assert {type(result) for result in results} == {GenerationFailed}
    monkeypatch.undo()
    assert_others_unchanged(engine, requests, expected, results)


def test_step_failure_without_a_client_event_loop_goes_on(
    engine: Engine, requests: Requests, expected: list[Generated], caplog: pytest.LogCaptureFixture
) -> None:
    async def leave() -> list[Stream]:
        return engine.submit(requests)

    abandoned = asyncio.run(leave())
    router = internals(engine).output_router
    asyncio.run(wait_for(lambda: not router.result_handlers))
    assert "cannot be delivered" in caplog.text
    for stream in abandoned:
        stream.close()
    assert_others_unchanged(engine, requests, expected, expected)


def test_step_failure_of_no_sequence_ends_the_loop(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("queue")

    with started(loaded) as ending:
        monkeypatch.setattr(internals(ending), "prepare_next_batch", fail)
        asyncio.run(wait_for(lambda: ending.has_ended))
        assert not ending.is_alive


def test_step_failure_that_loses_the_device_ends_the_loop(
    loaded: LoadedModel, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "is_device_lost", lambda _: True)
    with started(loaded) as ending:
        assertion = torch.AcceleratorError("CUDA error: device-side assert triggered")
        with spoiled_step(loaded, Failure(ending, 3, assertion), 3):
            results = asyncio.run(asyncio.wait_for(gather(ending, requests), HANG_SECONDS))
        assert {type(result) for result in results} == {EngineStopped}
        assert not ending.is_alive


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("raises", [False, True])
def test_device_is_lost_if_a_cuda_device_cannot_synchronize(
    monkeypatch: pytest.MonkeyPatch, device: str, raises: bool
) -> None:
    class Parameter:
        def __init__(self) -> None:
            self.device = torch.device(device)

    class Model:
        def parameters(self) -> Iterator[Parameter]:
            yield Parameter()

    synchronized = []

    def synchronize(on: torch.device) -> None:
        synchronized.append(str(on))
        if raises:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert causal_lm.is_device_lost(Model()) is (raises and device == "cuda:1")  # type: ignore[arg-type]
    assert synchronized == (["cuda:1"] if device == "cuda:1" else [])


async def gather(engine: Engine, requests: Requests) -> list[Generated | BaseException]:
    return await asyncio.gather(*map(read, engine.submit(requests)), return_exceptions=True)


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not condition():  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0.001)
