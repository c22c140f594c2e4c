"""The demo model, loaded once, engines on it, and functions that generate with them."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from devtools.paths import DEMO_MODEL
from predictor.engine.engine import Engine
from predictor.engine.step_budget import StepBudget
from predictor.engine.stream import Stream
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.settings import Settings
from predictor.types import FinishReason, SamplingParams, TokenLogprob
from tests.predictor.servers import HANG_SECONDS, Hold

GREEDY = SamplingParams(max_tokens=48, temperature=0.0, top_p=1.0, top_k=0)
SAMPLED = SamplingParams(max_tokens=24, temperature=3.0, top_p=1.0, top_k=0, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=900, ignore_eos=True)


@dataclass
class Generated:
    """Everything that one sequence generated."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None


def load() -> LoadedModel:
    return loader.load(DEMO_MODEL, device="cpu", dtype="float32", trust_remote_code=False)


@pytest.fixture(autouse=True)
def chunks_independent_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are divided as `max_num_batched_tokens` says, whatever a step takes."""
    monkeypatch.setattr(StepBudget, "prompt_tokens", lambda _: None)


@contextmanager
def started(loaded: LoadedModel, **changes: Any) -> Iterator[Engine]:
    """A running engine of 8 sequences; engines that share a model must not run steps at the same time."""
    settings: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_queued_requests": 24,
        "max_num_batched_tokens": 128,
        "kv_cache_tokens": 8192,
    }
    engine = Engine.from_model(
        loaded.model,
        Settings(**{**settings, **changes}),
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=loaded.context_tokens,
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return load()


@pytest.fixture(scope="session")
def reference() -> LoadedModel:
    """The model as transformers runs it, never used by an engine."""
    return load()


@pytest.fixture(scope="session")
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    with started(loaded) as running:
        yield running


@pytest.fixture(scope="session")
def small(loaded: LoadedModel) -> Iterator[Engine]:
    """An engine whose cache is full with one sequence of the whole context."""
    with started(loaded, kv_cache_tokens=1024) as running:
        yield running


@pytest.fixture
def hold(loaded: LoadedModel) -> Iterator[Hold]:
    hook = Hold()
    handle = loaded.model.register_forward_pre_hook(hook)
    yield hook
    hook.open()
    handle.remove()


@pytest.fixture(scope="session")
def ids(loaded: LoadedModel) -> list[int]:
    return chat_ids(loaded, "What is 17 + 25?")


def chat_ids(loaded: LoadedModel, question: str) -> list[int]:
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return list(loaded.tokenizer.encode(text, add_special_tokens=False))


def random_ids(loaded: LoadedModel, count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(5, loaded.vocabulary_tokens), k=count)


async def read(stream: Stream) -> Generated:
    generated = Generated()
    async for step in stream:
        assert generated.reason is None, "the finish reason comes last"
        generated.token_ids += step.token_ids
        generated.logprobs += step.logprobs
        generated.prompt_logprobs += step.prompt_logprobs
        generated.reason = step.finish_reason
    return generated


def generate_all(engine: Engine, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[Generated]:
    """Generate several sequences in one batch."""

    async def together() -> list[Generated]:
        async with asyncio.timeout(HANG_SECONDS):
            return await asyncio.gather(*(read(stream) for stream in engine.submit(requests)))

    return asyncio.run(together())


def generate(engine: Engine, ids: Sequence[int], sampling: SamplingParams) -> Generated:
    [generated] = generate_all(engine, [(ids, sampling)])
    return generated


def assert_logprobs(
    reference: LoadedModel, ids: Sequence[int], answer: Generated, top: int, tolerance: float = 1e-3
) -> None:
    """Compare with a single forward pass over prompt and completion."""
    with torch.no_grad():
        logits = reference.model(torch.tensor([[*ids, *answer.token_ids]])).logits[0]
    expected = logits[len(ids) - 1 : -1].float().log_softmax(dim=-1)
    assert [sampled.token_id for sampled in answer.logprobs] == answer.token_ids
    for row, sampled in zip(expected, answer.logprobs, strict=True):
        best = pytest.approx(row.topk(top).values.tolist(), abs=tolerance)
        assert sampled.logprob == pytest.approx(row[sampled.token_id].item(), abs=tolerance)
        assert [value for _, value in sampled.top] == best
        assert [row[token_id].item() for token_id, _ in sampled.top] == best


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while engine.running or engine.waiting:  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0.001)
