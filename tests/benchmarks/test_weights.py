from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import weights


def test_weights_counts_bytes_per_step(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    read = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    assert weights.weight_bytes(tiny_model) == read


@pytest.mark.slow
def test_weights_step_is_slower_than_the_lower_bound(tiny_model: Path) -> None:
    seconds, rate = weights.step_seconds(tiny_model)
    assert weights.weight_bytes(tiny_model) / rate < seconds
    before, after, peak = weights.memory_bytes(tiny_model)
    assert 0 < before < after <= peak
