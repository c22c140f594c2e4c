"""Chunks of a prompt while other sequences decode."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from predictor.engine.fair_scheduler import FairScheduler
from predictor.engine.step_budget import MIN_PROMPT_TOKENS, StepBudget
from predictor.models.loader import LoadedModel
from tests.predictor.engine.conftest import GREEDY, random_ids, read, started

pytestmark = pytest.mark.xdist_group("engine")


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


def test_prompt_is_computed_in_chunks_only_while_others_decode(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    record = FairScheduler.record_step

    def record_step(scheduler: Any) -> None:
        if scheduler.scheduled:
            steps.append((scheduler._decode_tokens, scheduler._step_tokens - scheduler._decode_tokens))
        record(scheduler)

    monkeypatch.setattr(FairScheduler, "record_step", record_step)
    long_prompt, sampling = random_ids(loaded, 100, 1), replace(GREEDY, max_tokens=5, ignore_eos=True)

    async def run(engine: Any) -> tuple[list[int], list[int], list[int]]:
        [alone] = engine.submit([(long_prompt, sampling)])
        await read(alone)
        assert steps[0] == (0, 100)
        [running] = engine.submit([(random_ids(loaded, 5, 2), replace(sampling, max_tokens=900))])
        await anext(aiter(running))
        [other] = engine.submit([(long_prompt[::-1], sampling)])
        tokens = await read(other)
        running.close()
        chunked = [prompt_tokens for decode_tokens, prompt_tokens in steps if decode_tokens and prompt_tokens]
        [again] = engine.submit([(long_prompt[::-1], sampling)])
        return tokens.token_ids, (await read(again)).token_ids, chunked

    with started(loaded, max_num_batched_tokens=128) as engine:
        monkeypatch.setattr(FairScheduler, "_max_prompt_tokens", lambda _: 30)
        steps.clear()
        tokens, expected, chunked = asyncio.run(run(engine))
    assert chunked == [30, 30, 30, 10]
    assert tokens == expected
