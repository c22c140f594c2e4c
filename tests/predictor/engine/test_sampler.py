"""Sampling from rows of logits, without a model."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from predictor.engine import batch_sampler
from predictor.engine.sampler import Row, SequenceSampler
from predictor.errors import InvalidRequest
from predictor.types import MIN_LOGPROB, SamplingParams
from tests.predictor.engine.sampling import Sequence, sample_step

VOCABULARY = 2000
PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])
TOKENS = range(7, VOCABULARY, VOCABULARY // len(PROBABILITIES))


def logits_of(probabilities: torch.Tensor) -> torch.Tensor:
    """Logits spread over the vocabulary, so that the order of tokens differs from their ids."""
    logits = torch.full((VOCABULARY,), -torch.inf)
    logits[list(TOKENS)] = probabilities.log()
    return logits


def samples(logits: torch.Tensor, count: int, **sampling: Any) -> torch.Tensor:
    """Tokens that follow one another if the model's logits do not depend on the text."""
    sampler = SequenceSampler(SamplingParams(**{"seed": 3, "temperature": 1.0, **sampling}), 0, ())
    rows = [Row(index, index, Sequence("a"), sampler) for index in range(count)]
    plan = {name: torch.from_numpy(array) for name, array in batch_sampler._plan_sampling(rows).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_sampler, "_is_batched", lambda _: True)
        return batch_sampler._sample_rows(logits.expand(count, -1), rows, plan)


def frequencies(count: int = 2000, **sampling: Any) -> list[float]:
    """Share of samples of each of the four possible tokens."""
    sampled = samples(logits_of(PROBABILITIES), count, **sampling)
    shares = [(sampled == token).float().mean().item() for token in TOKENS]
    assert sum(shares) == pytest.approx(1.0)
    return shares


def close_to(probabilities: torch.Tensor, tolerance: float = 0.04) -> Any:
    return pytest.approx((probabilities / probabilities.sum()).tolist(), abs=tolerance)


def test_sample_temperature_one_follows_the_softmax() -> None:
    assert frequencies() == close_to(PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sample_temperature_sharpens_or_flattens(temperature: float) -> None:
    assert frequencies(temperature=temperature) == close_to(PROBABILITIES ** (1 / temperature))


def test_sample_top_k_keeps_most_probable_tokens() -> None:
    assert frequencies(top_k=2) == close_to(PROBABILITIES * torch.tensor([1, 1, 0, 0]))
    assert frequencies(top_k=10**6) == close_to(PROBABILITIES)


@pytest.mark.parametrize(("top_p", "kept"), [(1e-8, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)])
def test_sample_top_p_keeps_fewest_sufficient_tokens(top_p: float, kept: int) -> None:
    probabilities = PROBABILITIES * (torch.arange(4) < kept)
    assert frequencies(1000, top_p=top_p) == close_to(probabilities, 0.06)


def test_sample_top_p_applies_within_top_k() -> None:
    # Of the first two, the first has 0.5 / 0.8 = 0.625.
    assert frequencies(1000, top_k=2, top_p=0.6) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("min_p", "kept"), [(1.0, 1), (0.61, 1), (0.59, 2), (0.31, 2), (0.29, 3), (0.09, 4)])
@pytest.mark.parametrize("top_k", [0, VOCABULARY], ids=["unsorted", "sorted"])
def test_sample_min_p_keeps_tokens_by_ratio_to_the_most_probable(min_p: float, kept: int, top_k: int) -> None:
    probabilities = PROBABILITIES * (torch.arange(4) < kept)
    assert frequencies(1000, top_k=top_k, min_p=min_p) == close_to(probabilities, 0.06)


def test_sample_min_p_applies_after_temperature() -> None:
    # At temperature 2 the second token has 0.77 of the first one's probability, the third 0.55.
    expected = PROBABILITIES.sqrt() * torch.tensor([1, 1, 0, 0])
    assert frequencies(1000, temperature=2.0, min_p=0.7) == close_to(expected, 0.06)


def test_sample_flat_top_p_exceeds_sorted_prefix() -> None:
    # Each probability differs, from the last token down.
    flat = torch.arange(VOCABULARY) * 1e-4
    kept = VOCABULARY - int(samples(flat, 3000, top_p=0.9).min())
    assert VOCABULARY * 0.85 < kept <= VOCABULARY * 0.9 + 1
    assert kept > 1.5 * batch_sampler.NUCLEUS_TOKENS


def test_sample_tokens_with_equal_logits_are_kept_together() -> None:
    logits = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for limit in ({"top_k": 2}, {"top_p": 0.4}, {"min_p": 1.0}):
        assert set(samples(logits, 200, **limit).tolist()) == {0, 1, 2}


def apply(logits: torch.Tensor, sequence: SequenceSampler, output_ids: tuple[int, ...] = ()) -> list[float]:
    """Logits after the sampler, for a prompt of token 1."""
    row = logits[None].clone()
    sample_step(row, [(sequence, [1], output_ids)])
    values: list[float] = row[0].tolist()
    return values


def sequence_sampler(end_token_ids: tuple[int, ...] = (0,), **sampling: Any) -> SequenceSampler:
    return SequenceSampler(SamplingParams(**sampling), prompt_tokens=1, end_token_ids=end_token_ids)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 0.0}], ids=str
)
def test_sampler_greedy_row_stays_unchanged(sampling: dict[str, Any]) -> None:
    logits = torch.randn(VOCABULARY)
    assert apply(logits, sequence_sampler(**{"temperature": 9.0, **sampling})) == logits.tolist()


def test_sampler_sampled_logit_is_the_largest() -> None:
    logits = torch.randn(VOCABULARY)
    row = torch.tensor(apply(logits, sequence_sampler(temperature=3.0, top_k=2)))
    [changed] = (row != logits).nonzero().flatten().tolist()
    assert changed in logits.topk(2).indices
    assert row[changed] == torch.inf


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"presence_penalty": 1.0}, [3.0, 2.0, 0.0, -2.0, 0.5]),
        ({"frequency_penalty": 0.5}, [3.0, 2.0, 0.0, -1.5, 0.5]),
        # The prompt's token 1 counts for the repetition penalty, and only for that one.
        ({"repetition_penalty": 2.0}, [3.0, 1.0, 0.5, -2.0, 0.5]),
    ],
    ids=["presence", "frequency", "repetition"],
)
def test_penalties_lower_tokens_of_prompt_and_output(sampling: dict[str, Any], expected: list[float]) -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, -1.0, 0.5])
    assert apply(logits, sequence_sampler(**sampling), (2, 2, 3)) == expected


def test_min_tokens_excludes_end_tokens_until_reached() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    sequence = sequence_sampler(end_token_ids=(0, 2), min_tokens=2)
    assert apply(logits, sequence, (1,)) == [-torch.inf, 2.0, -torch.inf]
    assert apply(logits, sequence, (1, 1)) == logits.tolist()


def test_logit_bias_is_added_before_penalties() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    sequence = sequence_sampler(logit_bias=((1, -100.0), (2, 0.5)), repetition_penalty=2.0)
    assert apply(logits, sequence, (2,)) == [3.0, -196.0, 0.75]


def test_allowed_tokens_are_the_only_ones() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert apply(logits, sequence_sampler(allowed_token_ids=(2, 1))) == [-torch.inf, 2.0, 1.0]
    contradictory = sequence_sampler(allowed_token_ids=(0,), min_tokens=2)
    assert apply(logits, contradictory) == logits.tolist()
    assert isinstance(contradictory.failure, InvalidRequest)
    assert str(contradictory.failure).startswith("No token may follow")


def test_rules_ignore_tokens_without_a_logit() -> None:
    # An embedding may have more rows than the LM head; on CUDA an index beyond the logits is fatal.
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    sampling = SamplingParams(min_tokens=9, repetition_penalty=2.0)
    sample_step(logits, [(SequenceSampler(sampling, prompt_tokens=2, end_token_ids=(0, 3)), [1, 7], [2])])
    assert logits.tolist() == [[-torch.inf, 1.0, 0.5]]


@pytest.mark.parametrize(
    ("sampling", "reference"),
    [
        ({"suppress_tokens": (1, 4)}, SuppressTokensLogitsProcessor([1, 4])),
        ({"begin_suppress_tokens": (1, 4)}, SuppressTokensAtBeginLogitsProcessor([1, 4], begin_index=3)),
        ({"no_repeat_ngram_size": 1}, NoRepeatNGramLogitsProcessor(1)),
        ({"no_repeat_ngram_size": 3}, NoRepeatNGramLogitsProcessor(3)),
        ({"bad_words_ids": ((0,), (1, 2), (3, 1, 4))}, NoBadWordsLogitsProcessor([[0], [1, 2], [3, 1, 4]])),
    ],
    ids=["suppress", "begin-suppress", "unigrams", "trigrams", "bad-words"],
)
@given(output=st.lists(st.integers(0, 5), max_size=12))
@example(output=[])
@example(output=[4, 3, 1])
@example(output=[2, 0, 3, 1, 4, 0, 3, 1])
def test_rules_are_those_of_transformers(
    sampling: dict[str, Any], reference: LogitsProcessor, output: list[int]
) -> None:
    prompt, logits = [3, 1, 3], torch.tensor([3.0, 2.0, 1.0, -1.0, 0.5, 0.0])
    expected = reference(torch.tensor([prompt + output]), logits[None].clone())[0]
    row = logits[None].clone()
    sampler = SequenceSampler(SamplingParams(**sampling), prompt_tokens=len(prompt), end_token_ids=())
    sample_step(row, [(sampler, prompt, output)])
    assert row[0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        {"suppress_tokens": (9,)},
        {"begin_suppress_tokens": (9,)},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": ((9,),)},
        {"logit_bias": ((9, 1.0),)},
        {"allowed_token_ids": (0, 1, 9)},
    ],
)
def test_rules_skip_tokens_without_a_logit(sampling: dict[str, Any]) -> None:
    row = torch.tensor([[3.0, 2.0]])
    sample_step(row, [(SequenceSampler(SamplingParams(**sampling), prompt_tokens=1, end_token_ids=()), [9], [])])
    assert row.tolist() == [[3.0, 2.0]]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"top_p": 0.9, "repetition_penalty": 1.0}, (False, False)),
        ({"temperature": 1.0}, (True, False)),
        ({"logprobs": 0}, (True, False)),
        ({"presence_penalty": 1.0, "logit_bias": ((0, 1.0),), "allowed_token_ids": (1,)}, (True, False)),
        ({"min_tokens": 1, "suppress_tokens": (1,), "begin_suppress_tokens": (1,)}, (True, False)),
        ({"no_repeat_ngram_size": 2}, (True, True)),
        ({"bad_words_ids": ((1, 2),)}, (True, True)),
        ({"token_masks": (lambda: lambda *_: None,)}, (True, True)),
        ({"temperature": 1.0, "max_tokens": 0}, (False, False)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_sampler_is_used_and_needs_host_tokens_by_its_parameters(
    sampling: dict[str, Any], expected: tuple[bool, bool]
) -> None:
    sampler = sequence_sampler(**sampling)
    assert (sampler.is_used, sampler.needs_host_tokens) == expected


def test_logprobs_are_before_penalties_and_temperature() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    sequence = sequence_sampler(temperature=1e-30, presence_penalty=2.0, logprobs=2)
    apply(logits, sequence, (0,))
    [reported] = sequence.logprobs
    assert reported.token_id == 1, "after the penalty"
    assert reported.logprob == pytest.approx(float(logits.log_softmax(dim=-1)[1])), "before the penalty"
    assert [token_id for token_id, _ in reported.top] == [0, 1]


def test_logprobs_of_impossible_token_are_finite() -> None:
    sequence = sequence_sampler(logprobs=2)
    apply(torch.tensor([3.0, -torch.inf]), sequence)
    [reported] = sequence.logprobs
    assert (reported.logprob, reported.top) == (0.0, ((0, 0.0), (1, MIN_LOGPROB)))
