"""Steps of the real batching manager that run out of memory: the newest sequence fails, and the others go on."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from predictor.engine import batching_manager, fair_scheduler
from predictor.engine.engine import Engine
from predictor.engine.penalties import Penalties
from predictor.errors import OutOfMemory
from predictor.generation.structured_output import GrammarCompiler
from predictor.models.loader import LoadedModel
from predictor.types import GrammarKind, SamplingParams, StructuredOutput
from tests.predictor.engine.conftest import (
    GREEDY,
    SAMPLED,
    Generated,
    generate_all,
    random_ids,
    read,
    started,
    until_idle,
)
from tests.predictor.servers import HANG_SECONDS

Requests = list[tuple[list[int], SamplingParams]]
Measure = Callable[[Any], int]

TEN = replace(GREEDY, max_tokens=10, ignore_eos=True)
CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
HOST_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes.")


def sequences(scheduler: Any) -> int:
    return len(scheduler.scheduled)


def tokens(scheduler: Any) -> int:
    return sum(len(state.tokens_to_process) for state in scheduler.scheduled)


def scheduler_of(engine: Engine) -> Any:
    return engine._executor._manager.batch_processor.scheduler  # type: ignore[attr-defined]


@contextmanager
def short_of_memory(
    engine: Engine, loaded: LoadedModel, size: Measure, limit: int, *, after: int = 0, error: Exception = CUDA_ERROR
) -> Iterator[list[set[str]]]:
    """Fail every step after the first `after` whose `size` exceeds `limit`, when it has written NaN into the cache.

    Yields the sequences of these steps.
    """
    first, *_, last = loaded.model.model.layers
    steps: list[set[str]] = []
    count = 0

    def exceeds() -> bool:
        return count > after and size(scheduler_of(engine)) > limit

    def spoil(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        nonlocal count
        count += 1
        return (args[0] * torch.nan, *args[1:]) if exceeds() else None

    def fail(*_: Any) -> None:
        if exceeds():
            steps.append({state.request_id for state in scheduler_of(engine).scheduled})
            raise error

    handles = [first.register_forward_pre_hook(spoil), last.register_forward_pre_hook(fail)]
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["single", "overlapped"]
)
def engine(request: pytest.FixtureRequest, loaded: LoadedModel) -> Iterator[Engine]:
    """Computes one step at a time, or prepares one while another runs, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(batching_manager, "_overlaps", lambda _: True)
        with started(loaded) as running:
            yield running


@pytest.fixture(autouse=True)
def without_prefixes_and_limits(engine: Engine) -> Iterator[None]:
    """Compute every prompt anew, and full steps in the tests that follow."""
    scheduler_of(engine).cache.evict_cached_blocks()
    yield
    scheduler_of(engine).limited_steps = 0


def outcomes(engine: Engine, requests: Requests) -> dict[str, Generated | BaseException]:
    """The result or error of each sequence by its id, in the order of the requests."""

    async def together() -> dict[str, Generated | BaseException]:
        streams = engine.submit(requests)
        async with asyncio.timeout(HANG_SECONDS):
            results = await asyncio.gather(*map(read, streams), return_exceptions=True)
            await until_idle(engine)
        return dict(zip((stream._id for stream in streams), results, strict=True))

    return asyncio.run(together())


def assert_only_newest_fail(
    engine: Engine, results: dict[str, Generated | BaseException], expected: list[Generated], steps: list[set[str]]
) -> None:
    order = list(results)
    newest = {max(step, key=order.index) for step in steps}
    assert steps
    assert len(newest) == len(steps), "each failure costs another sequence"
    for (request_id, result), correct in zip(results.items(), expected, strict=True):
        if request_id in newest:
            assert isinstance(result, OutOfMemory)
            assert "Out of memory" in str(result)
        else:
            assert_equal(result, correct)
    assert (engine.is_alive, engine.running, engine.waiting, engine.cache_usage) == (True, 0, 0, 0.0)


def assert_equal(result: Generated | BaseException, expected: Generated) -> None:
    """The same tokens, and as many log probabilities, which depend a little on the size of the batch."""
    assert isinstance(result, Generated)
    assert (result.token_ids, result.reason) == (expected.token_ids, expected.reason)
    for mine, correct in ((result.logprobs, expected.logprobs), (result.prompt_logprobs, expected.prompt_logprobs)):
        assert [each.token_id for each in mine] == [each.token_id for each in correct]
        values = [each.logprob for each in correct]
        assert [each.logprob for each in mine] == [value and pytest.approx(value, abs=1e-3) for value in values]


def greedy(loaded: LoadedModel) -> Requests:
    sampling = replace(TEN, logprobs=2)
    return [(random_ids(loaded, 20 + seed, seed), sampling) for seed in range(5)]


def long_prompts(loaded: LoadedModel) -> Requests:
    return [(random_ids(loaded, count, count), TEN) for count in (300, 20, 270, 290)]


def shared_prefixes(loaded: LoadedModel) -> Requests:
    prefix = random_ids(loaded, 256, 1)
    return [(prefix + random_ids(loaded, 20, seed), TEN) for seed in range(5)]


def grammars(loaded: LoadedModel) -> Requests:
    compiler = GrammarCompiler(loaded.tokenizer, loaded.vocabulary_tokens, loaded.eos_token_ids)
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    grammar = compiler.compile(StructuredOutput(GrammarKind.JSON_SCHEMA, json.dumps(schema)))
    sampling = replace(GREEDY, max_tokens=24, token_masks=(grammar.token_mask,))
    return [(random_ids(loaded, 10 + seed, seed), sampling) for seed in range(5)]


def seeded(loaded: LoadedModel) -> Requests:
    """As of a request with `n`: one prompt, a seed for each completion."""
    ids = random_ids(loaded, 40, 3)
    return [(ids, replace(SAMPLED, seed=seed, logprobs=1)) for seed in range(5)]


def scored_prompts(loaded: LoadedModel) -> Requests:
    sampling = replace(TEN, prompt_logprobs=1)
    return [(random_ids(loaded, count, count), sampling) for count in (200, 30, 40, 50, 60)]


KINDS = [greedy, long_prompts, shared_prefixes, grammars, seeded, scored_prompts]
"""Sequences that decode, prompts in chunks, and so on."""


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("after", [0, 4], ids=["first-steps", "later"])
def test_out_of_memory_costs_the_newest_sequence(
    engine: Engine, loaded: LoadedModel, make: Callable[[LoadedModel], Requests], after: int
) -> None:
    requests = make(loaded)
    expected = generate_all(engine, requests)
    scheduler_of(engine).cache.evict_cached_blocks()
    before = engine.failed_steps
    with short_of_memory(engine, loaded, sequences, 2, after=after) as steps:
        results = outcomes(engine, requests)
    assert engine.failed_steps == before + len(steps)
    assert_only_newest_fail(engine, results, expected, steps)
    for result, correct in zip(generate_all(engine, requests), expected, strict=True):
        assert_equal(result, correct)


def test_out_of_memory_makes_the_following_steps_smaller(engine: Engine, loaded: LoadedModel) -> None:
    requests = long_prompts(loaded)
    expected = generate_all(engine, requests)
    scheduler_of(engine).cache.evict_cached_blocks()
    with short_of_memory(engine, loaded, tokens, 70, error=HOST_ERROR) as steps:
        results = outcomes(engine, requests)
    assert len(steps) == 1, "half as many tokens fit, and the sequences that wait are not lost"
    assert_only_newest_fail(engine, results, expected, steps)


def test_out_of_memory_limits_a_number_of_steps_only(
    engine: Engine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_scheduler, "LIMITED_STEPS", 5)
    largest: list[int] = []
    with short_of_memory(engine, loaded, sequences, 2) as steps:
        outcomes(engine, greedy(loaded))
    assert steps
    handle = loaded.model.register_forward_pre_hook(lambda *_: largest.append(sequences(scheduler_of(engine))))
    try:
        generate_all(engine, greedy(loaded))
    finally:
        handle.remove()
    assert max(largest) == 5


def test_out_of_memory_of_one_sequence_fails_it(engine: Engine, loaded: LoadedModel) -> None:
    [request, *_] = greedy(loaded)
    with short_of_memory(engine, loaded, sequences, 0) as steps:
        [result] = outcomes(engine, [request]).values()
    assert isinstance(result, OutOfMemory)
    assert len(steps) == 1


@pytest.mark.parametrize("make", [greedy, seeded], ids=lambda make: make.__name__)
def test_out_of_memory_after_sampling_repeats_tokens_and_log_probabilities(
    engine: Engine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, make: Callable[[LoadedModel], Requests]
) -> None:
    requests = make(loaded)
    expected = generate_all(engine, requests)
    scheduler_of(engine).cache.evict_cached_blocks()
    outputs = engine._executor._manager.batch_processor.inputs_and_outputs  # type: ignore[attr-defined]
    retrieve, steps = outputs.retrieve_device_outputs, list[set[str]]()

    def fail() -> None:
        if sequences(scheduler_of(engine)) > 3:
            steps.append({state.request_id for state in scheduler_of(engine).scheduled})
            raise MemoryError
        retrieve()

    monkeypatch.setattr(outputs, "retrieve_device_outputs", fail)
    assert_only_newest_fail(engine, outcomes(engine, requests), expected, steps)


def test_out_of_memory_before_tokens_of_penalties_are_copied_does_not_change_them(
    engine: Engine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = replace(TEN, repetition_penalty=0.2)  # tokens of the prompt are repeated
    requests, others = (
        [(random_ids(loaded, 25, seed), sampling) for seed in seeds] for seeds in (range(3), range(3, 6))
    )
    expected = generate_all(engine, requests)
    generate_all(engine, others)  # whose tokens are then where those of the requests will be
    apply, steps = Penalties.apply, list[set[str]]()

    def fail(penalties: Penalties, *arguments: Any) -> None:
        if not steps:
            steps.append({state.request_id for state in scheduler_of(engine).scheduled})
            raise CUDA_ERROR
        apply(penalties, *arguments)

    monkeypatch.setattr(Penalties, "apply", fail)
    assert_only_newest_fail(engine, outcomes(engine, requests), expected, steps)
