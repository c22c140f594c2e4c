"""Log probabilities of prompts, compared with a plain forward pass of the same model."""

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers

from devtools.architectures import CASES
from predictor.engine import prompt_scorer
from predictor.engine.engine import Engine
from predictor.engine.kv_cache import PAGE_TOKENS
from predictor.engine.prompt_scorer import PromptScorer
from predictor.engine.sampler import SequenceSampler, token_logprobs
from predictor.errors import GenerationFailed
from predictor.models.loader import LoadedModel
from predictor.types import MIN_LOGPROB, FinishReason, SamplingParams, TokenLogprob
from tests.predictor.engine.conftest import (
    GREEDY,
    SAMPLED,
    Generated,
    generate,
    generate_all,
    random_ids,
    read,
    started,
)
from tests.predictor.servers import HANG_SECONDS

SCORED = replace(GREEDY, max_tokens=3, ignore_eos=True, prompt_logprobs=4)


def assert_scores(reference: LoadedModel, ids: Sequence[int], scored: Generated, top: int = 4) -> None:
    """Compare with a single forward pass over the prompt, in float32."""
    with torch.no_grad():
        logits = reference.model(torch.tensor([list(ids)])).logits[0].float()
    expected = logits.log_softmax(dim=-1)[:-1]
    first, *others = scored.prompt_logprobs
    assert first == TokenLogprob(ids[0], None)
    assert [logprob.token_id for logprob in others] == list(ids[1:])
    assert [logprob.logprob for logprob in others] == pytest.approx(
        expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), abs=5e-5
    )
    for row, logprob in zip(expected, others, strict=True):
        assert [value for _, value in logprob.top] == pytest.approx(row.topk(top).values.tolist(), abs=5e-5)
        assert [row[token_id].item() for token_id, _ in logprob.top] == pytest.approx(
            [value for _, value in logprob.top], abs=5e-5
        )
        assert logprob.rank is not None
        larger = (row > row[logprob.token_id] + 5e-5).sum().item()
        assert larger < logprob.rank <= (row > row[logprob.token_id] - 5e-5).sum().item()


@pytest.mark.parametrize("chunk_rows", [1, 7, 10_000])
def test_prompt_logprobs_equal_a_plain_forward_pass_whatever_the_chunks_and_neighbours(
    engine: Engine, reference: LoadedModel, monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    monkeypatch.setattr(prompt_scorer, "CHUNK_LOGITS", chunk_rows * reference.vocabulary_tokens)
    prompts = [random_ids(reference, length, seed=length) for length in (1, 2, 20, 127, 128, 129, 400)]
    neighbours = [(random_ids(reference, 30, seed), SAMPLED) for seed in range(3)]
    # Steps of 128 tokens: prompts are computed in chunks, and several in one step.
    *scored, _, _, without = generate_all(engine, [*((ids, SCORED) for ids in prompts), *neighbours])
    for ids, generated in zip(prompts, scored, strict=True):
        assert_scores(reference, ids, generated)
        assert generated.token_ids == generate(engine, ids, replace(SCORED, prompt_logprobs=None)).token_ids
    assert without.prompt_logprobs == []


def test_prompt_logprobs_are_computed_in_pieces(
    engine: Engine, reference: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def record(logprobs: torch.Tensor, *arguments: Any) -> list[TokenLogprob]:
        sizes.append(len(logprobs))
        return token_logprobs(logprobs, *arguments)

    monkeypatch.setattr(prompt_scorer, "token_logprobs", record)
    monkeypatch.setattr(prompt_scorer, "CHUNK_LOGITS", 50 * reference.vocabulary_tokens)
    generate(engine, random_ids(reference, 200, seed=1), SCORED)
    assert sizes == [50, 50, 28, 50, 21], "steps of 128 and 72 tokens; the last row is the first new token's"
    sizes.clear()
    generate(engine, random_ids(reference, 200, seed=1), GREEDY)
    assert sizes == []


def test_prompt_logprobs_do_not_use_a_shared_prefix(engine: Engine, reference: LoadedModel) -> None:
    prefix = random_ids(reference, PAGE_TOKENS + 40, seed=12)
    generate(engine, [*prefix, 6], GREEDY)
    before = engine.steps
    scored = generate(engine, [*prefix, 7], replace(SCORED, max_tokens=0))
    assert engine.steps - before == 3
    assert_scores(reference, [*prefix, 7], scored)
    before = engine.steps
    generate(engine, [*prefix, 8], replace(GREEDY, max_tokens=1))
    assert engine.steps - before == 1, "others share the prefix"


def test_prompt_logprobs_of_sequences_that_leave_a_full_cache_are_complete(
    small: Engine, reference: LoadedModel
) -> None:
    sampling = replace(SCORED, max_tokens=60)
    prompts = [random_ids(reference, length, seed=length) for length in (40, 200, PAGE_TOKENS + 1, 400, 401)]
    for ids, scored in zip(prompts, generate_all(small, [(ids, sampling) for ids in prompts]), strict=True):
        assert len(scored.token_ids) == 60
        assert_scores(reference, ids, scored)


def test_prompt_logprobs_without_new_tokens(engine: Engine, reference: LoadedModel) -> None:
    only = replace(SCORED, max_tokens=0, temperature=1.0)
    for ids in ([7], random_ids(reference, engine.context_tokens, seed=9)):
        scored = generate(engine, ids, only)
        assert (scored.token_ids, scored.reason) == ([], FinishReason.LENGTH)
        assert_scores(reference, ids, scored)
    assert (engine.running, engine.waiting) == (0, 0)


def test_prompt_logprobs_failure_fails_only_the_scored_sequences(
    engine: Engine, reference: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    async def run() -> list[Any]:
        ids = random_ids(reference, 200, seed=4)
        streams = engine.submit([(ids, SCORED), (ids, GREEDY)])
        return await asyncio.gather(*map(read, streams), return_exceptions=True)

    expected = generate(engine, random_ids(reference, 200, seed=4), GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(prompt_scorer, "token_logprobs", fail)
        failed, other = asyncio.run(run())
    assert isinstance(failed, GenerationFailed)
    assert other == expected
    assert_scores(reference, [5, 6, 7], generate(engine, [5, 6, 7], SCORED))


def test_prompt_logprobs_of_a_cancelled_sequence_are_dropped(loaded: LoadedModel, reference: LoadedModel) -> None:
    with started(loaded) as engine:

        async def cancel() -> None:
            [stream] = engine.submit([(random_ids(reference, 900, seed=3), SCORED)])
            await asyncio.sleep(0)
            stream.close()
            async with asyncio.timeout(HANG_SECONDS):
                # The step loop adds and drops it.
                while engine._executor.has_pending or scorer.samplers:  # noqa: ASYNC110, there is no event for it
                    await asyncio.sleep(0.001)

        scorer = engine._executor._step_sampler.scorer  # type: ignore[attr-defined]
        asyncio.run(cancel())
        assert scorer.samplers == {}
        assert_scores(reference, [5, 6], generate(engine, [5, 6], SCORED))


HEADS = [
    "gpt2",
    "opt",
    "falcon",
    "gemma2",
    "cohere",
    "granite",
    "mixtral",
    "gpt_oss",
    "nemotron",
    "llama, tied embeddings",
]
"""What follows the decoder differs: scaled or capped logits, experts' outputs, a projection before the head."""


@pytest.mark.parametrize("name", HEADS)
def test_prompt_scorer_uses_the_head_of_the_architecture(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CASES[name].config()).eval()
    ids = [5, 9, 300, 41, 7]
    scorer = PromptScorer(model, 512)
    sampler = SequenceSampler(SamplingParams(prompt_logprobs=1), len(ids), ())
    scorer.samplers["a"] = sampler

    def compute(tokens: int) -> torch.Tensor:
        """Compute the prompt's first tokens, and score them."""
        state = SimpleNamespace(request_id="a", initial_tokens=ids, position_offset=tokens)
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.tensor([ids[:tokens]]), use_cache=False).logits[0]
            scorer.score([cast(Any, SimpleNamespace(state=state, query_length=tokens))])
        return logits

    compute(3)
    assert [logprob.token_id for logprob in sampler.prompt_logprobs] == ids[:4]
    # The sequence left a full cache, and starts again.
    logits = compute(5)
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert [logprob.token_id for logprob in sampler.prompt_logprobs] == ids
    assert [logprob.logprob for logprob in sampler.prompt_logprobs[1:]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert scorer.samplers == {}
    assert torch.equal(compute(5), logits), "the model is as it was"


def test_prompt_scorer_restores_a_decoder_with_its_own_forward() -> None:
    model = transformers.AutoModelForCausalLM.from_config(CASES["llama"].config()).eval()
    decoder = model.get_decoder()
    # As accelerate does for modules that it places on devices.
    decoder.forward = functools.partial(type(decoder).forward, decoder)
    own = decoder.forward
    scorer = PromptScorer(model, 512)
    sampler = SequenceSampler(SamplingParams(prompt_logprobs=0), 2, ())
    scorer.samplers["a"] = sampler
    state = SimpleNamespace(request_id="a", initial_tokens=[5, 9], position_offset=2)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 9]]), use_cache=False)
        scorer.score([cast(Any, SimpleNamespace(state=state, query_length=2))])
    assert decoder.forward is own
    assert len(sampler.prompt_logprobs) == 2


def test_token_logprobs_have_ranks_and_tops_by_row() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -torch.inf], [-3.0, -4.0, -0.5, torch.nan]])
    assert token_logprobs(logprobs, [2, 0], [1, 2]) == [
        TokenLogprob(2, -3.0, ((0, -1.0),), 3),
        TokenLogprob(0, -3.0, ((2, -0.5), (0, -3.0)), 2),
    ]
    assert token_logprobs(logprobs[:1], [9], [0]) == [TokenLogprob(9, MIN_LOGPROB, (), 4)], "not in the LM head"
