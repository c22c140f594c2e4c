"""Attention over the paged KV cache by torch's FlashAttention on CUDA, for transformers' `AttentionInterface`.

The kernel reads the pages of each sequence in place, by a block table: sequences that decode, whole prompts and chunks
of prompts in one call. Layers with a sliding window gather their keys instead, at most one window per sequence, since
their cache is a ring that a chunk overwrites.

Nothing here waits for the device, and all shapes follow from those of the arguments, so that a step of decodes can be
captured in a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from predictor.kernels import transformers_attention
from predictor.kernels.cuda import reference
from predictor.kernels.transformers_attention import PagedKVCache, PagedLayer

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # it came with torch 2.10
    varlen_attn = None

KERNEL_PAGE_TOKENS = 256
"""The kernel reads pages of multiples of this."""
_TOLERANCE = 0.05
"""Of differences to the reference. Rounding to bfloat16 causes less than 0.01."""


@dataclass(frozen=True, slots=True)
class PagedSequences:
    """Where the keys of a step's sequences are, the same in every layer with full attention."""

    block_table: torch.Tensor
    """(sequences, pages), int32; entries behind the last key are arbitrary."""
    lengths: torch.Tensor
    """Number of keys, (sequences,), int32; 0 for padding."""
    write_index: torch.Tensor
    """Slots of the new keys, (tokens,), int64."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cache: PagedKVCache,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: dict[str, torch.Tensor],
    max_length_q: int,
    max_length_k: dict[str, int],
    read_index: list[torch.Tensor],
    write_index: list[torch.Tensor],
    block_table: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention of one layer, and write the new keys and values into the cache.

    Args, in addition to those of `sequence_attention.attend`:
        max_length_q: the longest query length, at least.
        max_length_k: the longest key length, at least, by layer type; 1 with `block_table`, as the manager passes it.
        read_index: pages of all sequences, of `transformers_attention.read_pages`; slots for layers with a window.
        block_table: in steps of decodes, pages by layer type and sequence, (types, sequences, pages), int32;
            `read_index` and `write_index` are not used then.
    """
    del attention_mask
    transformers_attention.check_scores(kwargs)
    layer = PagedLayer(cache, module.layer_idx)
    cu_seq_k, max_k = cu_seq_lens_k[layer.type], max_length_k[layer.type]
    reads, writes = read_index[layer.index], write_index[layer.index]
    query = query[0].transpose(0, 1)
    if layer.window is not None or (block_table is None and not reads.numel()):
        keys, values = layer.update(key, value, reads, writes)
        output = varlen_attn(
            query,
            keys,
            values,
            cu_seq_lens_q,
            cu_seq_k,
            max_length_q,
            max_k,
            scale=scaling,
            window_size=_window_size(max_length_q, layer.window),
            enable_gqa=True,
        )
        return output[None], None
    key_pages, value_pages = layer.pages()
    page_tokens = key_pages.shape[1]
    if block_table is not None:
        max_k = max(max_k, block_table.shape[-1] * page_tokens)
    # Kept on the step's tensor, which all layers share. The first layer always makes it, so that a CUDA graph makes it
    # from the arguments of each replay.
    sequences: PagedSequences | None = getattr(cu_seq_lens_q, "paged_sequences", None)
    if sequences is None or layer.is_first:
        if block_table is not None:
            sequences = _decodes(block_table[layer.index], cu_seq_k, page_tokens, layer.unused_slot)
        else:
            sequences = _any_sequences(reads, writes, cu_seq_k, max_k, page_tokens)
        cu_seq_lens_q.paged_sequences = sequences  # type: ignore[attr-defined, unused-ignore]
    layer.update(key, value, reads[:0], sequences.write_index)
    lengths = cu_seq_lens_q, cu_seq_k, max_length_q, max_k
    return _attend_to_pages(varlen_attn, query, key_pages, value_pages, lengths, sequences, scaling)[None], None


def _attend_to_pages(
    kernel: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    lengths: tuple[torch.Tensor, torch.Tensor, int, int],
    sequences: PagedSequences,
    scale: float,
) -> torch.Tensor:
    """Call `varlen_attn` or its reference; `lengths` are cumulative query and key lengths, and the longest of each."""
    max_q = lengths[2]
    decodes_only, shares_kv_heads = max_q == 1, query.shape[1] > key_pages.shape[2]
    return kernel(
        query,
        key_pages,
        value_pages,
        *lengths,
        scale=scale,
        window_size=_window_size(max_q, None),
        enable_gqa=True,
        seqused_k=sequences.lengths,
        block_table=sequences.block_table,
        # Splits of the keys are for those decodes. Elsewhere torch 2.13 writes wrong results with them (issue 194167).
        num_splits=None if decodes_only and shares_kv_heads else 1,
    )


def _window_size(max_q: int, window: int | None) -> tuple[int, int]:
    """Return how many keys on both sides a query attends to; -1: all."""
    # All keys of a single query are visible to it. Only if the kernel is not given that limit, it computes the query
    # heads that share a KV head together.
    if max_q == 1:
        return -1, -1
    return -1 if window is None else window - 1, 0


def _decodes(block_table: torch.Tensor, cu_seq_k: torch.Tensor, page_tokens: int, unused_slot: int) -> PagedSequences:
    """Locate the keys of sequences with one query each, or of padding with none."""
    lengths = cu_seq_k.diff()
    positions = (lengths - 1).long()
    pages = block_table.gather(1, (positions // page_tokens).clamp_min(0)[:, None])[:, 0]
    slots = pages * page_tokens + positions % page_tokens
    return PagedSequences(block_table, lengths, torch.where(lengths > 0, slots, unused_slot))


def _any_sequences(
    pages: torch.Tensor, write_index: torch.Tensor, cu_seq_k: torch.Tensor, max_k: int, page_tokens: int
) -> PagedSequences:
    """Locate the keys of any sequences.

    Args:
        pages: of all sequences, concatenated.
        write_index: slots of the new keys.
        cu_seq_k: cumulative key lengths.
        max_k: the longest key length.
        page_tokens: tokens per page.
    """
    lengths = cu_seq_k.diff()
    page_counts = (lengths + page_tokens - 1) // page_tokens
    first = page_counts.cumsum(0) - page_counts
    columns = torch.arange(-(-max_k // page_tokens), device=pages.device)
    entries = (first[:, None] + columns).clamp_max(len(pages) - 1)
    return PagedSequences(pages[entries].int(), lengths, write_index)


def unavailable_reason(model: Any) -> str | None:
    """Return why `attend` cannot compute the attention of `model`; None if it can."""
    if model.device.type != "cuda":
        return f"the device is {model.device.type}"
    return kernel_failure(model.device, model.dtype, *transformers_attention.heads(model))


def kernel_failure(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> str | None:
    """Try the kernel on a device with these heads, and return what is wrong with it; None: nothing.

    A step with a chunk of a prompt, and one of decodes only, are compared with the reference: some versions of torch
    compute wrong results without an error.
    """
    if varlen_attn is None:
        return f"torch {torch.__version__} does not have it"
    try:
        difference = _largest_difference(device, dtype, num_heads, num_kv_heads, head_dim)
    except (RuntimeError, TypeError) as error:  # of old devices and other dtypes; of older signatures
        return str(error).partition("\n")[0]
    return None if difference <= _TOLERANCE else f"its results are wrong by {difference:.2g}"


def _largest_difference(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> float:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    key_pages, value_pages = torch.randn(2, 4, KERNEL_PAGE_TOKENS, num_kv_heads, head_dim, **options)
    # Two pages, enough for several splits, and a few keys of one.
    lengths = torch.tensor([2 * KERNEL_PAGE_TOKENS - 3, 9], dtype=torch.int32, device=device)
    block_table = torch.tensor([[2, 1], [3, 0]], dtype=torch.int32, device=device)
    sequences = PagedSequences(block_table, lengths, lengths[:0])
    cu_seq_k = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    differences = []
    for query_lengths in ((5, 1), (1, 1)):
        query = torch.randn(sum(query_lengths), num_heads, head_dim, **options)
        cu_seq_q = torch.tensor([0, query_lengths[0], len(query)], dtype=torch.int32, device=device)
        batch = cu_seq_q, cu_seq_k, max(query_lengths), 2 * KERNEL_PAGE_TOKENS
        actual, expected = (
            _attend_to_pages(
                kernel, query.to(kind), key_pages.to(kind), value_pages.to(kind), batch, sequences, head_dim**-0.5
            )
            for kernel, kind in ((varlen_attn, dtype), (reference.varlen_attn, torch.float32))
        )
        differences.append((actual - expected).abs().amax().nan_to_num(torch.inf))
    return float(torch.stack(differences).amax())
