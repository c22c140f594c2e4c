"""Greedy steps in 8 bits, whose tokens the LM head chooses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from devtools.architectures import CASES, save_model
from devtools.paths import DEMO_MODEL
from predictor.engine.engine import Engine
from predictor.engine.step_sampler import StepSampler
from predictor.kernels.cpu import ops
from predictor.models import loader
from predictor.models.loader import LoadedModel
from tests.predictor.engine.conftest import GREEDY, SAMPLED, generate, generate_all, random_ids, started

TEN = replace(GREEDY, max_tokens=10, ignore_eos=True)


def load(directory: Path) -> LoadedModel:
    return loader.load(directory, device="cpu", dtype="bfloat16", quantization="8bit")


@pytest.fixture(scope="module")
def quantized() -> LoadedModel:
    return load(DEMO_MODEL)


@pytest.fixture(scope="module")
def engine(quantized: LoadedModel) -> Iterator[Engine]:
    with started(quantized) as running:
        generate(running, random_ids(quantized, 3, seed=0), TEN)
        yield running


@contextmanager
def logits_of_steps(loaded: LoadedModel) -> Iterator[list[bool]]:
    """Record of each step whether it has logits."""
    steps: list[bool] = []

    def record(_head: Any, _inputs: Any, outputs: torch.Tensor) -> None:
        steps.append(outputs.shape[-1] == loaded.model.config.vocab_size)

    hook = loaded.model.get_output_embeddings().register_forward_hook(record)
    yield steps
    hook.remove()


@pytest.mark.skipif(ops.cpu_isa is None, reason="C kernels are unavailable")
def test_greedy_steps_choose_the_tokens_of_the_logits(
    engine: Engine, quantized: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(random_ids(quantized, 5 + seed, seed), TEN) for seed in range(8)]
    with logits_of_steps(quantized) as steps:
        answers = generate_all(engine, requests)
        assert not any(steps)
        monkeypatch.setattr(StepSampler, "needs_logits", True)
        assert generate_all(engine, requests) == answers
        assert any(steps)


@pytest.mark.parametrize("sampling", [SAMPLED, replace(TEN, logprobs=2), replace(TEN, prompt_logprobs=0)])
def test_greedy_rows_beside_one_that_needs_logits_choose_the_same_tokens(
    engine: Engine, quantized: LoadedModel, sampling: Any
) -> None:
    sampling = replace(sampling, seed=1)
    requests = [(random_ids(quantized, 9, seed=1), TEN), (random_ids(quantized, 7, seed=2), sampling)]
    alone = [generate(engine, *request) for request in requests]
    with logits_of_steps(quantized) as steps:
        assert generate_all(engine, requests) == alone
    assert any(steps)


def test_model_that_scales_its_logits_keeps_them(tmp_path: Path) -> None:
    save_model(CASES["granite"], tmp_path)
    scaled = load(tmp_path)
    with started(scaled) as engine, logits_of_steps(scaled) as steps:
        generate(engine, [1, 2, 3], TEN)
    assert len(steps) == TEN.max_tokens
    assert all(steps)
