"""FlashAttention over block tables: its reference, the tensors of a step, and the choice of the kernel."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from predictor.engine.kv_cache import PAGE_TOKENS
from predictor.kernels import attention, transformers_attention
from predictor.kernels.cuda import attention as cuda_attention
from predictor.kernels.cuda import reference
from tests.predictor.kernels.paged_layer import Allocator, attend_to

HEADS = (4, 2, 8)


def naive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window_size: tuple[int, int], scale: float
) -> torch.Tensor:
    """Compute one sequence, score by score."""
    output = torch.zeros_like(query)
    left, right = window_size
    group = query.shape[1] // key.shape[1]
    for row in range(len(query)):
        position = len(key) - len(query) + row
        keys = [
            index
            for index in range(len(key))
            if (left < 0 or index >= position - left) and (right < 0 or index <= position + right)
        ]
        for head in range(query.shape[1]):
            scores = (key[keys, head // group] @ query[row, head] * scale).exp()
            output[row, head] = scores @ value[keys, head // group] / scores.sum()
    return output


@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (2, 0), (0, 0), (3, 1)])
@pytest.mark.parametrize("page_tokens", [None, 4, 256])
def test_reference_equals_scores_computed_one_by_one(window_size: tuple[int, int], page_tokens: int | None) -> None:
    num_heads, num_kv_heads, head_dim = HEADS
    torch.manual_seed(1)
    q_lengths, k_lengths = [3, 1, 5], [7, 4, 5]
    query = torch.randn(sum(q_lengths), num_heads, head_dim)
    key, value = torch.randn(2, sum(k_lengths), num_kv_heads, head_dim)
    cu_seq_q, cu_seq_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (q_lengths, k_lengths)
    )
    parts = [states.split(k_lengths) for states in (key, value)]
    expected = [
        naive(queries, keys, values, window_size, scale=0.5)
        for queries, keys, values in zip(query.split(q_lengths), *parts, strict=True)
    ]
    options: dict[str, Any] = {"scale": 0.5, "window_size": window_size, "enable_gqa": True}
    states = key, value
    if page_tokens is not None:
        block_table = torch.tensor([[5, 1], [2, -1], [0, 4]], dtype=torch.int32)
        pages = torch.full((2, 6, page_tokens, num_kv_heads, head_dim), torch.nan)
        for seq, length in enumerate(k_lengths):
            for index in range(length):
                page = block_table[seq, index // page_tokens]
                pages[:, page, index % page_tokens] = torch.stack([part[seq][index] for part in parts])
        states = pages[0], pages[1]
        options |= {"block_table": block_table, "seqused_k": torch.tensor(k_lengths, dtype=torch.int32)}
    actual = reference.varlen_attn(query, *states, cu_seq_q, cu_seq_k, 5, 7, **options)
    torch.testing.assert_close(actual, torch.cat(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_q": 1}, "longer than max_q"),
        ({"max_k": 3}, "longer than max_q or max_k"),
        ({"seqused_k": None}, "belong together"),
        ({"enable_gqa": False}, "enable_gqa"),
        ({"block_table": torch.zeros(1, 2, dtype=torch.int64)}, "int32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_reference_refuses_what_the_kernel_would_compute_wrong(change: dict[str, Any], message: str) -> None:
    lengths = torch.tensor([0, 2], dtype=torch.int32)
    arguments = {
        "query": torch.zeros(2, 4, 8),
        "key": torch.zeros(3, 4, 2, 8),
        "value": torch.zeros(3, 4, 2, 8),
        "cu_seq_q": lengths,
        "cu_seq_k": lengths * 2,
        "max_q": 2,
        "max_k": 8,
        "enable_gqa": True,
        "seqused_k": torch.tensor([4], dtype=torch.int32),
        "block_table": torch.tensor([[1, 0]], dtype=torch.int32),
    }
    reference.varlen_attn(**arguments)
    with pytest.raises(ValueError, match=message):
        reference.varlen_attn(**arguments | change)


def test_decodes_follow_arguments_that_change_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a CUDA graph, whose replays have the tensors of its capture."""
    monkeypatch.setattr(cuda_attention, "varlen_attn", reference.varlen_attn)
    pages = Allocator.random(HEADS, page_tokens=4, pages=6)
    block_table = torch.tensor([[[5, 1], [2, -1]]], dtype=torch.int32)
    cu_seq_q, cu_seq_k = torch.tensor([[0, 1, 2], [0, 6, 9]], dtype=torch.int32)
    attend_to(pages, cu_seq_q, cu_seq_k, block_table)
    block_table.copy_(torch.tensor([[[3, 0], [4, 5]]]))
    cu_seq_k.copy_(torch.tensor([0, 8, 13]))
    again = attend_to(pages, cu_seq_q, cu_seq_k, block_table)
    fresh = attend_to(pages, cu_seq_q.clone(), cu_seq_k.clone(), block_table.clone())
    assert torch.equal(again, fresh)


def test_padding_of_decodes_writes_to_no_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "varlen_attn", reference.varlen_attn)
    pages = Allocator.random(HEADS, page_tokens=4, pages=6)
    before = pages.key_pages.clone()
    block_table = torch.tensor([[[5, 1], [-1, -1], [-1, -1]]], dtype=torch.int32)
    cu_seq_q, cu_seq_k = torch.tensor([[0, 1, 1, 1], [0, 6, 6, 6]], dtype=torch.int32)
    output = attend_to(pages, cu_seq_q, cu_seq_k, block_table, tokens=3)
    changed = (pages.key_pages != before).flatten(2).any(2).nonzero().tolist()
    assert changed == [[0, 0], [1, 1]], "the unused slot, and the sixth of the sequence"
    assert output[0, 1:].eq(0).all()


def test_page_size_suits_the_kernel() -> None:
    assert PAGE_TOKENS % cuda_attention.KERNEL_PAGE_TOKENS == 0


def broken(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nException raised from ...")


def without_later_rows(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    output = reference.varlen_attn(query, *arguments, **options)
    output[1:] = torch.nan
    return output


def old_signature(query: torch.Tensor, *_: Any, is_causal: bool = False) -> torch.Tensor:
    del is_causal
    return query


@pytest.mark.parametrize(
    ("kernel", "failure"),
    [
        (reference.varlen_attn, None),
        (broken, "FlashAttention only supports Ampere GPUs or newer."),
        (without_later_rows, "its results are wrong by inf"),
        (old_signature, "unexpected keyword argument"),
        (None, "does not have it"),
    ],
)
def test_kernel_failure_names_what_is_wrong(kernel: Any, failure: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "varlen_attn", kernel)
    found = cuda_attention.kernel_failure(torch.device("cpu"), torch.bfloat16, *HEADS)
    assert found is None if failure is None else failure in str(found)


class Model(SimpleNamespace):
    """A model's configuration and device."""

    def __init__(self, device: str, implementation: str = "sdpa") -> None:
        config = SimpleNamespace(_attn_implementation=implementation, get_text_config=lambda: self.config)
        super().__init__(device=torch.device(device), dtype=torch.bfloat16, config=config)


@pytest.mark.parametrize(
    ("device", "failure", "selected"),
    [
        ("cpu", None, transformers_attention.SEQUENCE),
        ("mps", None, transformers_attention.SEQUENCE),
        ("cuda", "too old", transformers_attention.SEQUENCE),
        ("cuda", None, transformers_attention.VARLEN),
    ],
)
def test_install_selects_by_device(
    device: str,
    failure: str | None,
    selected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cuda_attention, "kernel_failure", lambda *_: failure)
    monkeypatch.setattr(transformers_attention, "heads", lambda _: HEADS)
    model = Model(device)
    with caplog.at_level(logging.WARNING):
        assert attention.install(model)
    assert model.config._attn_implementation == selected
    assert [record.args for record in caplog.records] == ([(failure,)] if failure else [])


def test_only_layers_without_a_window_are_read_in_place() -> None:
    model = Model("cuda", transformers_attention.VARLEN)
    assert attention.reads_in_place(model)
    model.config.sliding_window = 4096
    assert not attention.reads_in_place(model)
    assert not attention.reads_in_place(Model("cuda", transformers_attention.SEQUENCE))


def test_install_leaves_architectures_that_need_eager_attention() -> None:
    model = Model("cuda", "eager")
    assert not attention.install(model)
    assert model.config._attn_implementation == "eager"
