import json
import subprocess
import sys

import pytest
import torch
import transformers

from devtools.paths import DEMO_MODEL, ROOT
from predictor.engine import kv_cache
from predictor.engine.kv_cache import CacheableModel

MIB = 2**20


@pytest.fixture(scope="module")
def model() -> CacheableModel:
    """The demo model without weights."""
    config = transformers.AutoConfig.from_pretrained(DEMO_MODEL)
    with torch.device("meta"):
        model: CacheableModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def tokens(
    model: CacheableModel,
    budget_bytes: int,
    *,
    max_num_batched_tokens: int = 512,
    max_num_seqs: int = 32,
    context_tokens: int | None = None,
) -> int:
    return kv_cache.tokens_within(
        model,
        budget_bytes=budget_bytes,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        context_tokens=context_tokens,
    )


def test_tokens_within_larger_budget_is_larger(model: CacheableModel) -> None:
    capacities = [tokens(model, budget) for budget in range(16 * MIB, 512 * MIB, 16 * MIB)]
    assert capacities == sorted(set(capacities))
    assert capacities[0] > 0


def test_tokens_within_leaves_room_for_activations_and_logits(model: CacheableModel) -> None:
    assert tokens(model, 0) < 0
    assert tokens(model, 256 * MIB, max_num_batched_tokens=2048) < tokens(model, 256 * MIB)
    assert tokens(model, 256 * MIB, max_num_seqs=2000) < tokens(model, 256 * MIB)


def test_tokens_within_masks_per_sequence_leave_room_for_more(model: CacheableModel) -> None:
    dense, short, long = (tokens(model, 64 * MIB, context_tokens=context) for context in (None, 1024, 4096))
    assert dense < long < short
    # If not even one context fits, its length has no effect.
    assert tokens(model, 64 * MIB, context_tokens=1 << 20) == tokens(model, 64 * MIB, context_tokens=1 << 21)


@pytest.mark.slow
def test_kv_cache_allocates_at_most_its_budget() -> None:
    budget = 48 * MIB
    command = [sys.executable, "-m", "tests.programs.kv_cache_memory", str(DEMO_MODEL), str(budget)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    used = json.loads(process.stdout)
    assert budget / 2 < used["allocated"] <= budget
    # Includes weights that are loaded again, and memory that torch keeps.
    assert used["growth"] <= budget + 32 * MIB
