"""Prompt lookup over HTTP: its metrics are consistent with the answers and the steps."""

import pytest
import torch

from predictor.kernels.cpu import ops
from tests.predictor import servers
from tests.predictor.servers import OPENAI, Call

pytestmark = pytest.mark.skipif(
    not ops.supports_paged_attention(torch.bfloat16, 4, 2, 64), reason="no C attention on this CPU, so no guesses"
)

COUNTERS = (
    "generation_tokens_total",
    "engine_steps_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
)


def test_speculation_metrics_count_guesses_and_the_steps_that_they_save() -> None:
    flags = ["--dtype", "bfloat16", "--quantization", "8bit", "--speculation", "prompt_lookup"]
    with servers.in_process(*flags, model_name="guesses") as server:
        before = [server.metric(name) for name in COUNTERS]
        response = Call(server, OPENAI, 60, prompt="1+1=2\n" * 8).post()
        assert response.json()["usage"]["completion_tokens"] == 60
        server.wait_until_idle()
        tokens, steps, drafts, guessed, accepted = (
            server.metric(name) - count for name, count in zip(COUNTERS, before, strict=True)
        )
    assert tokens == 60
    assert steps == 60 - accepted
    assert 0 < drafts <= steps - 1, "the step of the prompt has no guesses"
    assert drafts <= guessed
    assert 0 < accepted <= guessed
