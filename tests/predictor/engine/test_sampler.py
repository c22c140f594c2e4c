from types import SimpleNamespace
from typing import Any

import pytest
import torch

from predictor.engine import sampler
from predictor.engine.sampler import SequenceSampler
from predictor.types import MIN_LOGPROB, SamplingParams

VOCABULARY = 5000
PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])


def logits_of(probabilities: torch.Tensor) -> torch.Tensor:
    """Logits over the whole vocabulary, spread over it so that order and identity of tokens differ."""
    logits = torch.full((VOCABULARY,), -torch.inf)
    logits[7 :: VOCABULARY // len(probabilities)] = probabilities.log()
    return logits


def shares(count: int = 4000, **parameters: Any) -> list[float]:
    """How often each of the four possible tokens is drawn."""
    torch.manual_seed(0)
    logits = logits_of(PROBABILITIES)
    drawn = torch.stack([sampler.draw(logits, **parameters) for _ in range(count)])
    return [(drawn == token).float().mean().item() for token in range(7, VOCABULARY, VOCABULARY // 4)]


def expected(probabilities: torch.Tensor) -> Any:
    return pytest.approx((probabilities / probabilities.sum()).tolist(), abs=0.03)


def test_draws_by_the_models_probabilities() -> None:
    assert shares(temperature=1.0, top_k=0, top_p=1.0) == expected(PROBABILITIES)


def test_a_temperature_sharpens_or_flattens() -> None:
    assert shares(temperature=0.5, top_k=0, top_p=1.0) == expected(PROBABILITIES**2)
    assert shares(temperature=2.0, top_k=0, top_p=1.0) == expected(PROBABILITIES**0.5)


def test_top_k_keeps_the_most_probable() -> None:
    assert shares(temperature=1.0, top_k=2, top_p=1.0) == expected(PROBABILITIES * torch.tensor([1, 1, 0, 0]))
    assert shares(temperature=1.0, top_k=10**6, top_p=1.0) == expected(PROBABILITIES)


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)])
def test_top_p_keeps_the_fewest_that_are_probable_enough(top_p: float, kept: int) -> None:
    mask = torch.arange(4) < kept
    assert shares(1000, temperature=1.0, top_k=0, top_p=top_p) == pytest.approx(
        (PROBABILITIES * mask / (PROBABILITIES * mask).sum()).tolist(), abs=0.06
    )


def test_top_p_counts_within_top_k() -> None:
    # Of the first two, the first has 0.5 / 0.8 = 0.625.
    assert shares(1000, temperature=1.0, top_k=2, top_p=0.6) == [1.0, 0.0, 0.0, 0.0]


def test_top_p_looks_beyond_the_first_thousand_where_it_must() -> None:
    torch.manual_seed(0)
    flat = torch.zeros(VOCABULARY)
    drawn = {int(sampler.draw(flat, temperature=1.0, top_k=0, top_p=0.9)) for _ in range(3000)}
    assert sampler.NUCLEUS_TOKENS * 1.5 < len(drawn) <= round(VOCABULARY * 0.9) + 1


def chosen(rows: torch.Tensor, *choosers: SequenceSampler, completion: tuple[int, ...] = ()) -> torch.Tensor:
    """Rows of logits after the sampler has seen them, each with its chooser, after a prompt of token 1."""
    [processor] = sampler.processors().logits_processor
    states = [
        SimpleNamespace(
            logit_processor_kwargs={"chooser": chooser}, initial_tokens=[1], generated_tokens=list(completion)
        )
        for chooser in choosers
    ]
    processor.prepare_tensor_args([SimpleNamespace(state=state) for state in states])
    return processor(rows.clone(), torch.zeros(len(rows), dtype=torch.int32))


def chooser(end_token_ids: tuple[int, ...] = (0,), **sampling: Any) -> SequenceSampler:
    return SequenceSampler(SamplingParams(**sampling), prompt_tokens=1, end_token_ids=end_token_ids)


def test_leaves_greedy_rows_alone_and_turns_sampled_ones_into_their_choice() -> None:
    scores = torch.randn(3, VOCABULARY)
    after = chosen(scores, *(chooser(temperature=t, top_k=1) for t in (0.0, 3.0, 1e-30)))
    assert torch.equal(after[[0, 2]], scores[[0, 2]])
    assert after[1].argmax() == scores[1].argmax()
    assert after[1].isfinite().sum() == 1


def test_a_seed_repeats_whatever_the_neighbours_do() -> None:
    scores = torch.randn(1, VOCABULARY)

    def drawn(seed: int, neighbours: int) -> list[int]:
        mine = chooser(temperature=5.0, seed=seed)
        others = [chooser(temperature=5.0) for _ in range(neighbours)]
        rows = scores.expand(neighbours + 1, -1)
        return [int(chosen(rows, *others, mine)[-1].argmax()) for _ in range(8)]

    assert drawn(7, neighbours=0) == drawn(7, neighbours=3)
    assert drawn(7, neighbours=0) != drawn(8, neighbours=0)


def test_penalties_count_what_was_said() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, -1.0, 0.5]])
    said = {"completion": (2, 2, 3)}
    presence = chosen(scores, chooser(presence_penalty=1.0), **said)
    assert presence.tolist() == [[3.0, 2.0, 0.0, -2.0, 0.5]]
    frequency = chosen(scores, chooser(frequency_penalty=0.5), **said)
    assert frequency.tolist() == [[3.0, 2.0, 0.0, -1.5, 0.5]]
    repetition = chosen(scores, chooser(repetition_penalty=2.0), **said)
    assert repetition.tolist() == [[3.0, 1.0, 0.5, -2.0, 0.5]], "the prompt's token 1 counts here, and only here"


def test_no_end_before_min_tokens() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    eager = {"end_token_ids": (0, 2), "min_tokens": 2}
    assert chosen(scores, chooser(**eager), completion=(1,)).tolist() == [[-torch.inf, 2.0, -torch.inf]]
    assert chosen(scores, chooser(**eager), completion=(1, 1)).tolist() == scores.tolist()


def test_reports_the_models_own_log_probabilities() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    expected = scores[0].log_softmax(dim=-1)
    sampled = chooser(temperature=1e-30, presence_penalty=2.0, logprobs=2)
    chosen(scores, sampled, completion=(0,))
    [reported] = sampled.logprobs
    assert reported.token_id == 1, "after the penalty"
    assert reported.logprob == pytest.approx(float(expected[1])), "before the penalty"
    assert [token_id for token_id, _ in reported.top] == [0, 1]


def test_reports_what_cannot_be_as_unlikely_since_json_knows_no_infinity() -> None:
    sure = chooser(logprobs=2)
    chosen(torch.tensor([[3.0, -torch.inf]]), sure)
    [reported] = sure.logprobs
    assert (reported.logprob, reported.top) == (0.0, ((0, 0.0), (1, MIN_LOGPROB)))
