from types import SimpleNamespace
from typing import Any

import pytest
import torch

from predictor import sampler

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


def test_leaves_greedy_rows_alone_and_turns_sampled_ones_into_their_choice() -> None:
    [processor] = sampler.processors().logits_processor
    parameters = [{"temperature": t, "top_k": 1, "top_p": 1.0} for t in (0.0, 3.0, 1e-30)]
    processor.prepare_tensor_args(
        [SimpleNamespace(state=SimpleNamespace(logit_processor_kwargs=p)) for p in parameters]
    )
    scores = torch.randn(3, VOCABULARY)
    before = scores.clone()
    after = processor(scores, torch.zeros(3, dtype=torch.int32))
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert after[1].argmax() == before[1].argmax()
    assert after[1].isfinite().sum() == 1
