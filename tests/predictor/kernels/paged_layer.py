"""A layer's part of a paged KV cache, without the batching manager."""

from types import SimpleNamespace
from typing import Any

import torch

from predictor.kernels.cuda import attention


class Allocator:
    """Pages of one layer with full attention; the first page belongs to no sequence."""

    index, layer_type, layer_indices, write_trash_index = 0, "full_attention", (0,), 0

    def __init__(self, key_pages: torch.Tensor, value_pages: torch.Tensor, num_heads: int) -> None:
        self.key_pages, self.value_pages, self.num_heads = key_pages, value_pages, num_heads

    @classmethod
    def random(cls, heads: tuple[int, int, int], *, page_tokens: int, pages: int, **options: Any) -> "Allocator":
        num_heads, num_kv_heads, head_dim = heads
        key_pages, value_pages = torch.randn(2, pages, page_tokens, num_kv_heads, head_dim, **options)
        return cls(key_pages, value_pages, num_heads)

    def get_cache_for_block_table(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert layer_idx == 0
        return self.key_pages, self.value_pages

    def update(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        read_index: torch.Tensor,
        write_index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert (layer_idx, read_index.numel()) == (0, 0)
        self.key_pages.flatten(0, 1).index_copy_(0, write_index, key)
        self.value_pages.flatten(0, 1).index_copy_(0, write_index, value)
        return key, value


def attend_to(
    allocator: Allocator, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, block_table: torch.Tensor, tokens: int = 2
) -> torch.Tensor:
    """Compute a step of decodes with the same query, key and value in all of its tokens."""
    num_kv_heads, head_dim = allocator.key_pages.shape[2:]
    like = {"dtype": allocator.key_pages.dtype, "device": allocator.key_pages.device}
    values = torch.linspace(-1, 1, tokens * head_dim, **like).view(1, 1, tokens, head_dim)
    query, key = (values.expand(1, heads, tokens, head_dim) for heads in (allocator.num_heads, num_kv_heads))
    none = torch.zeros(0, dtype=torch.int64, device=key.device)
    output, _ = attention.attend(
        SimpleNamespace(layer_idx=0),
        query,
        key,
        -key,
        None,
        scaling=0.5,
        cache=SimpleNamespace(layer_to_allocator={0: allocator}),
        cu_seq_lens_q=cu_seq_q,
        cu_seq_lens_k={"full_attention": cu_seq_k},
        max_length_q=1,
        max_length_k={"full_attention": 1},
        read_index=[none],
        write_index=[none],
        block_table=block_table,
    )
    return output
