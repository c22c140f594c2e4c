"""One pass over the rows of several sequences, without a model."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from predictor.engine import batch_sampler, penalties
from predictor.engine.batch_sampler import BatchSampler
from predictor.engine.sampler import SequenceSampler
from predictor.errors import InvalidRequest
from predictor.types import SamplingParams
from tests.predictor.engine.sampling import (
    CROWD,
    EVEN,
    PARAMETERS,
    PROMPT,
    VOCABULARY,
    generate,
    model,
    rows_of,
    sample_step,
    sampler,
)


@pytest.fixture(scope="module")
def together() -> dict[int, list[int]]:
    return generate(range(CROWD))


def test_batch_tokens_are_those_of_each_sequence_alone(together: dict[int, list[int]]) -> None:
    for index in range(len(PARAMETERS)):
        assert generate([index]) == {index: together[index]}


def test_batch_tokens_do_not_depend_on_the_order_of_rows(together: dict[int, list[int]]) -> None:
    order = random.Random(1).sample(range(CROWD), CROWD)
    assert generate(order) == together


def test_batch_pass_over_all_rows_gives_the_tokens_of_single_rows(
    together: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_sampler, "_is_batched", lambda _: True)
    assert generate(range(CROWD)) == together
    monkeypatch.setattr(batch_sampler, "BATCH_ROWS", 7)
    assert generate(range(CROWD)) == together


class OnMps:
    """Logits on a device that has no float64."""

    device = torch.device("mps")

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.cpu = values.clone
        self.copy_ = values.copy_


def test_batch_logits_of_mps_are_sampled_on_the_host() -> None:
    logits: Any = OnMps(model(PROMPT)[None].clone())
    rows = rows_of([(sampler(1), PROMPT, [])])
    BatchSampler()(logits, rows, VOCABULARY, {rows[0].state.request_id})
    assert logits.values.argmax(dim=1).tolist() == sample_step(model(PROMPT)[None].clone(), [(sampler(1), PROMPT, [])])
    assert logits.values.amax() == torch.inf


def test_batch_samplers_with_other_seeds_give_other_tokens(together: dict[int, list[int]]) -> None:
    same = [together[index] for index in range(1, CROWD, len(PARAMETERS))]
    assert len(set(map(tuple, same))) == len(same) > 2


def test_batch_sampler_without_a_seed_is_random() -> None:
    samplers = [SequenceSampler(SamplingParams(temperature=9.0), 1, ()) for _ in range(3)]
    assert len({one.seed for one in samplers}) == 3
    before = torch.get_rng_state()
    sample_step(torch.zeros(3, 99), [(one, [1], []) for one in samplers])
    assert torch.equal(torch.get_rng_state(), before), "torch's generator is not used"


def test_batch_penalties_of_kept_tokens_are_those_of_the_text(together: dict[int, list[int]]) -> None:
    penalized = [index for index in range(CROWD) if sampler(index).has_penalties]
    assert generate(penalized, forget=True) == {index: together[index] for index in penalized}


def test_batch_penalties_of_a_sequence_in_the_place_of_another() -> None:
    long = [*range(penalties.MIN_CAPACITY - 3), *PROMPT]
    batch = BatchSampler()
    for indices, prompt in (([7, 8, 9], PROMPT), ([24], long), ([25, 7, 26, 41], long), ([8], PROMPT)):
        expected = generate(indices, prompt=prompt, forget=True)
        assert generate(indices, prompt=prompt, batch=batch) == expected


def waits(parameters: Sequence[dict[str, Any]]) -> bool:
    """Whether a pass reads values from the device; on this one, tensors have none."""
    samplers = [SequenceSampler(SamplingParams(**one), len(PROMPT), (0, 8)) for one in parameters]
    logits = torch.empty(len(samplers), VOCABULARY, device="meta")
    rows = rows_of([(one, PROMPT, [5, 9]) for one in samplers])
    try:
        BatchSampler()(logits, rows, VOCABULARY, {row.state.request_id for row in rows})
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        return True
    return False


def test_batch_pass_does_not_wait_for_the_device() -> None:
    def reads(parameters: dict[str, Any]) -> bool:
        is_nucleus = parameters.get("top_p", 1) < 1 and not parameters.get("top_k")
        return is_nucleus or "logprobs" in parameters

    assert not waits([parameters for parameters in PARAMETERS if not reads(parameters)])
    # The check works: these wait once for all rows.
    assert waits([{"temperature": 1.0, "logprobs": 0}])
    assert waits([{"temperature": 1.0, "top_p": 0.9}])


def test_batch_failure_of_one_row_leaves_the_others() -> None:
    contradictory = SamplingParams(allowed_token_ids=(0,), min_tokens=9, temperature=1.0, logprobs=1)
    bad = SequenceSampler(contradictory, len(PROMPT), (0,))
    good = sampler(1)
    alone = sample_step(model(PROMPT)[None], [(sampler(1), PROMPT, [])])
    assert sample_step(model(PROMPT).repeat(2, 1), [(bad, PROMPT, []), (good, PROMPT, [])])[1:] == alone
    assert isinstance(bad.failure, InvalidRequest)
    assert (good.failure, bad.logprobs) == (None, [])
    assert not bad.is_used


@pytest.mark.parametrize("width", [VOCABULARY - 12, VOCABULARY + 12])
def test_batch_mask_of_another_length_than_the_logits(width: int) -> None:
    sampling = SamplingParams(temperature=9.0, seed=1, token_masks=(lambda: lambda *_: EVEN,))
    logits = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    logits[0, VOCABULARY:] = 1e4
    sample_step(logits, [(SequenceSampler(sampling, 1, ()), [1], [])])
    kept = (logits[0] > -torch.inf).nonzero().flatten().tolist()
    assert kept == list(range(0, min(width, VOCABULARY), 2))


def test_batch_logprobs_of_several_rows_are_before_all_changes() -> None:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))
    expected = logits.log_softmax(dim=-1)
    changes: list[dict[str, Any]] = [{"logprobs": 2}, {}, {"logprobs": 0, "allowed_token_ids": (9,)}]
    samplers = [SequenceSampler(SamplingParams(temperature=2.0, **one), 1, ()) for one in changes]
    token_ids = sample_step(logits.clone(), [(one, [1], []) for one in samplers])
    assert [len(one.logprobs) for one in samplers] == [1, 0, 1]
    for row in (0, 2):
        [reported] = samplers[row].logprobs
        assert reported.token_id == token_ids[row]
        assert reported.logprob == pytest.approx(float(expected[row, token_ids[row]]), abs=1e-5)
    assert [token_id for token_id, _ in samplers[0].logprobs[0].top] == expected[0].topk(2).indices.tolist()
    assert token_ids[2] == 9
