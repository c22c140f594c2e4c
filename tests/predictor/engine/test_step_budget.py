"""Chunks of prompts while other sequences decode."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from predictor.engine.engine import Engine
from predictor.engine.fair_scheduler import FairScheduler
from predictor.engine.step_budget import MIN_PROMPT_TOKENS, StepBudget
from predictor.models.loader import LoadedModel
from tests.predictor.engine.conftest import GREEDY, random_ids, read, started
from tests.predictor.servers import HANG_SECONDS, Hold

FIVE = replace(GREEDY, max_tokens=5, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=900, ignore_eos=True)


@pytest.fixture(autouse=True)
def chunks_independent_of_time() -> None:
    """Nothing is replaced: the tests of the budget itself need it, and those of the engine set their own."""


def test_prompt_tokens_take_as_long_as_a_decode_step() -> None:
    budget = StepBudget()
    assert budget.prompt_tokens() is None
    budget.record(8, 0, 0.04)
    assert budget.prompt_tokens() is None
    budget.record(0, 100, 0.05)
    assert budget.prompt_tokens() == 80
    budget.record(8, 60, 0.04 + 60 * 0.0005)
    assert budget.prompt_tokens() == 80


def test_budget_follows_the_cost_of_mixed_steps() -> None:
    budget = StepBudget()
    budget.record(8, 0, 0.04)
    budget.record(0, 10, 0.02)  # mostly the weights, which a decode step has read anyway
    assert budget.prompt_tokens() == 20
    for _ in range(30):
        tokens = budget.prompt_tokens()
        assert tokens is not None
        budget.record(8, tokens, 0.04 + tokens * 0.0005)
    assert tokens == pytest.approx(80, rel=0.02)


def test_budget_has_a_floor_and_forgets_a_pause() -> None:
    budget = StepBudget()
    budget.record(1, 0, 0.01)
    budget.record(1, 10, 9.0)
    assert budget.prompt_tokens() == MIN_PROMPT_TOKENS
    budget = StepBudget()
    budget.record(1, 0, 0.01)
    budget.record(0, 100, 0.01)
    budget.record(1, 0, 60.0)
    assert budget.prompt_tokens() == 120


def test_step_faster_than_the_decodes_before_does_not_divide_by_zero() -> None:
    budget = StepBudget()
    budget.record(1, 0, 0.01)
    budget.record(1, 5, 0.009)
    assert budget.prompt_tokens() is None


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens of decoding sequences and of prompts, of each step, where each prompt has 30 tokens of a mixed one."""
    counted: list[tuple[int, int]] = []
    record = FairScheduler.record_step

    def record_step(scheduler: Any) -> None:
        if scheduler.scheduled:
            counted.append((scheduler._decode_tokens, scheduler._step_tokens - scheduler._decode_tokens))
        record(scheduler)

    monkeypatch.setattr(FairScheduler, "record_step", record_step)
    monkeypatch.setattr(StepBudget, "prompt_tokens", lambda _: 30)
    return counted


def mixed(steps: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of prompts of the mixed steps."""
    return [prompt_tokens for decode_tokens, prompt_tokens in steps if decode_tokens and prompt_tokens]


def test_prompt_is_computed_in_chunks_only_while_others_decode(
    loaded: LoadedModel, steps: list[tuple[int, int]]
) -> None:
    long_prompt = random_ids(loaded, 100, 1)

    async def run(engine: Engine) -> tuple[list[int], list[int], list[int]]:
        [alone] = engine.submit([(long_prompt, FIVE)])
        await read(alone)
        assert steps[0] == (0, 100)
        [running] = engine.submit([(random_ids(loaded, 5, 2), LONG)])
        await anext(aiter(running))
        [other] = engine.submit([(long_prompt[::-1], FIVE)])
        tokens = await read(other)
        running.close()
        chunks = mixed(steps)
        [again] = engine.submit([(long_prompt[::-1], FIVE)])
        return tokens.token_ids, (await read(again)).token_ids, chunks

    with started(loaded, max_num_batched_tokens=128) as engine:
        steps.clear()
        tokens, expected, chunks = asyncio.run(run(engine))
    assert chunks == [30, 30, 30, 10]
    assert tokens == expected


def test_each_prompt_that_waits_has_a_share_of_a_mixed_step(
    loaded: LoadedModel, steps: list[tuple[int, int]], hold: Hold
) -> None:
    async def run(engine: Engine) -> None:
        [running] = engine.submit([(random_ids(loaded, 5, 2), LONG)])
        await anext(aiter(running))
        hold.close()
        assert await asyncio.to_thread(hold.blocked.wait, HANG_SECONDS)
        steps.clear()
        others = engine.submit([(random_ids(loaded, 100, seed), FIVE) for seed in range(3)])
        hold.open()
        await asyncio.gather(*map(read, others))
        running.close()

    with started(loaded, max_num_batched_tokens=512) as engine:
        asyncio.run(run(engine))
    # Three prompts share three shares of a step until the first one is complete, and so on.
    assert mixed(steps) == [90, 90, 60, 30, 30]


@pytest.mark.parametrize(("limit", "expected"), [(64, [62, 38]), (512, [100])])
def test_unknown_budget_divides_a_prompt_by_the_limit_of_a_step(
    loaded: LoadedModel,
    steps: list[tuple[int, int]],
    hold: Hold,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    expected: list[int],
) -> None:
    monkeypatch.setattr(StepBudget, "prompt_tokens", lambda _: None)

    async def run(engine: Engine) -> None:
        running = engine.submit([(random_ids(loaded, 5, seed), LONG) for seed in range(2)])
        for stream in running:
            await anext(aiter(stream))
        hold.close()
        assert await asyncio.to_thread(hold.blocked.wait, HANG_SECONDS)
        steps.clear()
        [other] = engine.submit([(random_ids(loaded, 100, 3), FIVE)])
        hold.open()
        await read(other)
        for stream in running:
            stream.close()

    with started(loaded, max_num_batched_tokens=limit) as engine:
        asyncio.run(run(engine))
    assert mixed(steps) == expected
