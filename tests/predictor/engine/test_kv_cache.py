"""Size of the KV cache: the estimate, and the memory that an engine really takes."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from devtools.paths import DEMO_MODEL, ROOT
from predictor.engine import kv_cache
from predictor.engine.kv_cache import PAGE_TOKENS, SEQUENCE_TOKENS
from predictor.errors import StartupError
from predictor.kernels import tensor_parallel
from predictor.models.loader import LoadedModel
from predictor.resources import memory
from predictor.settings import Settings

MIB = 2**20


def tokens(
    loaded: LoadedModel,
    budget_bytes: int,
    max_num_batched_tokens: int = 512,
    max_num_seqs: int = 32,
    context_tokens: int | None = None,
) -> int:
    return kv_cache.tokens_within(
        loaded.model,
        Settings(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs),
        budget_bytes,
        context_tokens,
    )


def test_tokens_within_larger_budget_holds_more(loaded: LoadedModel) -> None:
    capacities = [tokens(loaded, budget) for budget in range(16 * MIB, 512 * MIB, 16 * MIB)]
    assert capacities == sorted(set(capacities))
    assert capacities[0] > 0


def test_tokens_within_excludes_working_space_of_steps(loaded: LoadedModel) -> None:
    assert tokens(loaded, 0) < 0
    assert tokens(loaded, 256 * MIB, max_num_batched_tokens=2048) < tokens(loaded, 256 * MIB)
    assert tokens(loaded, 256 * MIB, max_num_seqs=2000) < tokens(loaded, 256 * MIB)


def test_tokens_within_masks_per_sequence_leave_room_for_more(loaded: LoadedModel) -> None:
    dense, short, long = (tokens(loaded, 64 * MIB, context_tokens=context) for context in (None, 1024, 4096))
    assert dense < long < short
    longest = [tokens(loaded, 64 * MIB, context_tokens=context) for context in (1 << 20, 1 << 21)]
    assert longest[0] == longest[1], "a context that does not fit is not longer than the cache"


def budget(loaded: LoadedModel, free_bytes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(memory, "available_bytes", lambda _: free_bytes)
    return kv_cache.token_budget(
        loaded.model,
        Settings(max_num_seqs=4, max_num_batched_tokens=128, kv_cache_memory_fraction=0.5),
        context_tokens=1024,
        dense_mask=False,
    )


def test_token_budget_is_limited_by_memory_then_by_use(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    little, much = budget(loaded, 12 * MIB, monkeypatch), budget(loaded, 2**40, monkeypatch)
    assert 0 < little < much == 4 * min(1024, SEQUENCE_TOKENS)
    assert little % PAGE_TOKENS == 0


def test_token_budget_without_memory_fails(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match=r"Not enough memory for a KV cache: 0\.0 GiB"):
        budget(loaded, MIB, monkeypatch)


def test_ranks_have_some_kv_heads_each_and_share_the_memory_of_a_host(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    least, most = 64 * MIB, 192 * MIB
    alone = tokens(loaded, most, context_tokens=1024) - tokens(loaded, least, context_tokens=1024)
    padding = 2 * PAGE_TOKENS
    within_half = budget(loaded, 16 * MIB, monkeypatch) + padding
    monkeypatch.setattr(tensor_parallel, "size", lambda: 2)
    shared = tokens(loaded, most, context_tokens=1024) - tokens(loaded, least, context_tokens=1024)
    assert shared == pytest.approx(2 * alone, rel=0.02)  # index entries are not divided
    assert budget(loaded, 32 * MIB, monkeypatch) + padding == pytest.approx(2 * within_half, abs=2 * PAGE_TOKENS)


MISTRAL = SimpleNamespace(
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=32000,
)
"""The shape of a model of 7 B parameters, 128 KiB of keys and values per token in 16 bits."""


def cuda_tokens(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, fraction: float = 0.8, *, in_place: bool = False
) -> int:
    calls: list[str] = []

    def mem_get_info(_: torch.device) -> tuple[int, int]:
        calls.append("mem_get_info")
        return free_bytes, 141 * 2**30

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    config = SimpleNamespace(get_text_config=lambda: MISTRAL)
    model: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, config=config)
    settings = Settings(max_num_seqs=64, max_num_batched_tokens=2048, kv_cache_memory_fraction=fraction)
    capacity = kv_cache.token_budget(model, settings, context_tokens=4096, dense_mask=False, in_place=in_place)
    assert calls == ["empty_cache", "mem_get_info"], "torch's free blocks are given back before"
    return capacity


def test_token_budget_on_cuda_is_what_other_processes_and_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes = 120 * 2**30
    capacity = cuda_tokens(monkeypatch, free_bytes)
    logits = 3 * (64 * 32000 + 131 * 32000) * 4
    activations = 2048 * (4 * 4096 + 3 * 14336) * 2
    masks = 4096 * 2048 * 3
    room = 0.8 * free_bytes - 2**29 - logits - activations - masks
    per_token = 131072 + 8 + 2 * 32 * 128 * 2
    assert capacity % PAGE_TOKENS == 0
    assert 0 <= room / per_token - capacity < 4 * PAGE_TOKENS
    assert capacity > 64 * 4096, "not limited to what sequences use: the rest keeps prefixes"
    assert cuda_tokens(monkeypatch, free_bytes // 2) < capacity / 1.9
    assert cuda_tokens(monkeypatch, free_bytes, fraction=0.4) < capacity / 1.9


def test_token_budget_needs_no_room_for_keys_that_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes = 120 * 2**30
    capacity = cuda_tokens(monkeypatch, free_bytes, in_place=True)
    logits = 3 * (64 * 32000 + 131 * 32000) * 4
    activations = 2048 * (4 * 4096 + 3 * 14336) * 2
    room = 0.8 * free_bytes - 2**29 - logits - activations
    assert 0 <= room / (131072 + 8) - capacity < 4 * PAGE_TOKENS
    assert capacity > 1.1 * cuda_tokens(monkeypatch, free_bytes)


def test_token_budget_on_cuda_without_room_names_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (
        r"0\.9 GiB free on cuda:0 .* allows 80%\. .*end other processes, use --quantization, or lower --max_num_b"
    )
    with pytest.raises(StartupError, match=expected):
        cuda_tokens(monkeypatch, 900 * 2**20)


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_token_budget_is_kept_by_a_full_engine(kv_cache_dtype: str) -> None:
    budget_bytes = 48 * MIB
    program = [sys.executable, "-m", "tests.programs.kv_cache_memory"]
    command = [*program, str(DEMO_MODEL), str(budget_bytes), kv_cache_dtype]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    used = json.loads(ended.stdout)
    assert budget_bytes / 2 < used["allocated"] <= budget_bytes, "neither more than allowed, nor much less"
    assert used["growth"] <= budget_bytes + 32 * MIB, "with weights that are loaded again, and torch's own memory"
