"""Sampling on a GPU."""

from typing import Any

import pytest
import torch

from predictor.engine.batch_sampler import BatchSampler
from tests.predictor.engine.sampling import CROWD, PARAMETERS, PROMPT, VOCABULARY, generate, rows_of, sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


def test_sampled_tokens_on_a_gpu_are_those_of_a_cpu() -> None:
    assert generate(range(CROWD), device="cuda") == generate(range(CROWD))


def reads(parameters: dict[str, Any]) -> bool:
    """Whether one value is read from the device for all rows."""
    return "logprobs" in parameters or (parameters.get("top_p", 1) < 1 and not parameters.get("top_k"))


def test_sampling_does_not_wait_for_the_gpu() -> None:
    indices = [index for index in range(CROWD) if not reads(PARAMETERS[index % len(PARAMETERS)])]
    samplers = [sampler(index) for index in indices]
    batch = BatchSampler()
    for outputs in ([], [5]):
        logits = torch.randn(len(indices), VOCABULARY, device="cuda")
        rows = rows_of([(one, PROMPT, outputs) for one in samplers])
        running = {row.state.request_id for row in rows}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if outputs else "default")  # constants are copied in the first pass
        try:
            batch(logits, rows, VOCABULARY, running)
        finally:
            torch.cuda.set_sync_debug_mode("default")
