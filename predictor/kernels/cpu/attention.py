"""Attention over the paged KV cache on a CPU, for transformers' `AttentionInterface`.

transformers' batching manager computes one dense attention for the whole batch, at a cost quadratic in the batch size.
Here each sequence attends to its own keys only:

    paged decode   one query per sequence, in C, keys read in place
    padded decode  one query per sequence, keys gathered and padded to one length, where C does not support the heads
    prefill        a prompt, or a chunk of one, by itself
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from predictor.kernels.cpu import ops, transformers_attention
from predictor.kernels.cpu.transformers_attention import PagedKVCache, paged_kv

PADDED_TOKENS = 32
"""Key lengths are padded to multiples of this, so that sums over keys have the same order in any batch."""
_MAX_LENGTH_RATIO = 2
"""Sequences up to this many times as long as the shortest are padded to one length."""


def install(model: Any) -> bool:
    """Make `model` use this attention, and return whether it is supported."""
    return transformers_attention.enable(model)


@dataclass(frozen=True, slots=True)
class PagedDecode:
    """Sequences with one query each, in the form of `ops.paged_attention`."""

    query_indices: torch.Tensor
    slot_mapping: torch.Tensor
    kv_ranges: torch.Tensor


@dataclass(frozen=True, slots=True)
class PaddedDecode:
    """Sequences with one query each, and keys padded to one length."""

    query_indices: torch.Tensor | None
    """(sequences,); None if they are the whole batch."""
    keys: slice
    """Their keys among those gathered, sequences x length."""
    length: int
    mask: torch.Tensor
    """Added to the scores: 0 for a key, -inf for padding, (sequences, 1, 1, length)."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt, or the next chunk of one."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None
    """Keys visible to each query, (queries, keys); None for a whole prompt, which is causal."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Index tensors of one step, the same in every layer."""

    uses_paged_kernel: bool
    read_index: torch.Tensor
    """Cache slots to gather for `padded_decodes` and `prefills`."""
    paged_decode: PagedDecode | None
    padded_decodes: list[PaddedDecode]
    prefills: list[Prefill]


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
    max_length_k: dict[str, int],
    read_index: list[torch.Tensor],
    write_index: list[torch.Tensor],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention of one layer, and write the new keys and values into the cache.

    Args:
        module: the layer.
        query: (1, num_heads, tokens, head_dim), the tokens of all sequences concatenated.
        key: (1, num_kv_heads, tokens, head_dim).
        value: as `key`.
        attention_mask: None.
        scaling: factor of the scores.
        cache: the batching manager's.
        cu_seq_lens_q: cumulative query lengths, (sequences + 1,).
        cu_seq_lens_k: cumulative key lengths, by layer type.
        max_length_k: by layer type.
        read_index: cache slots of the keys of all sequences; empty if the cache has none of them.
        write_index: cache slots of the new keys.
        kwargs: arguments of other attention implementations.

    Returns:
        (1, tokens, num_heads, head_dim), and no attention weights.

    Raises:
        NotImplementedError: for soft-capped scores or attention sinks.
    """
    del attention_mask
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("Soft-capped scores and attention sinks are not supported on a CPU.")
    _, num_heads, tokens, head_dim = query.shape
    uses_paged_kernel = ops.supports_paged_attention(query.dtype, num_heads, key.shape[1], head_dim)
    # Kept on the step's tensor, which all layers share: it is freed with the step.
    metadata: AttentionMetadata | None = getattr(cu_seq_lens_q, "attention_metadata", None)
    if metadata is None or metadata.uses_paged_kernel is not uses_paged_kernel:
        [cu_seq_lens] = cu_seq_lens_k.values()
        metadata = _build_metadata(cu_seq_lens_q, cu_seq_lens, read_index[0], query.dtype, uses_paged_kernel)
        cu_seq_lens_q.attention_metadata = metadata  # type: ignore[attr-defined, unused-ignore]
    lengths = {"cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_length_k}
    update_kwargs = {**lengths, "read_index": [metadata.read_index], "write_index": write_index}
    key, value = cache.update(key, value, module.layer_idx, update_kwargs)
    query, key, value = query[0], key[0], value[0]
    paged_decode, padded_decodes = metadata.paged_decode, metadata.padded_decodes
    # A batch of one group needs no copy into an output.
    if paged_decode is not None and len(paged_decode.query_indices) == tokens:
        return _paged_decode(query, *paged_kv(cache, module.layer_idx), paged_decode, scaling)[None], None
    if padded_decodes and padded_decodes[0].query_indices is None:
        return _padded_decode(query, key, value, padded_decodes[0], scaling)[None], None
    output = query.new_empty(tokens, num_heads, head_dim)
    if paged_decode is not None:
        key_value_cache = paged_kv(cache, module.layer_idx)
        output[paged_decode.query_indices] = _paged_decode(query, *key_value_cache, paged_decode, scaling)
    for group in padded_decodes:
        output[group.query_indices] = _padded_decode(query, key, value, group, scaling)
    for prefill in metadata.prefills:
        output[prefill.queries] = _prefill(query, key, value, prefill, scaling)
    return output[None], None


def _paged_decode(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, group: PagedDecode, scale: float
) -> torch.Tensor:
    indices = {"query_indices": group.query_indices, "slot_mapping": group.slot_mapping, "kv_ranges": group.kv_ranges}
    attn_output = ops.paged_attention(query.transpose(0, 1), key_cache, value_cache, scale=scale, **indices)
    return attn_output.to(query.dtype)


def _padded_decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: PaddedDecode, scale: float
) -> torch.Tensor:
    # Query heads that share a KV head become its queries, so that keys are not repeated.
    num_kv_heads = len(key)
    queries = query if group.query_indices is None else query[:, group.query_indices]
    query_group = queries.transpose(0, 1).unflatten(1, (num_kv_heads, len(query) // num_kv_heads))
    keys = key[:, group.keys].unflatten(1, (-1, group.length)).transpose(0, 1)
    values = value[:, group.keys].unflatten(1, (-1, group.length)).transpose(0, 1)
    return scaled_dot_product_attention(query_group, keys, values, attn_mask=group.mask, scale=scale).flatten(1, 2)


def _prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Prefill, scale: float) -> torch.Tensor:
    attn_output = scaled_dot_product_attention(
        query[None, :, group.queries],
        key[None, :, group.keys],
        value[None, :, group.keys],
        attn_mask=group.mask,
        is_causal=group.mask is None,
        scale=scale,
        enable_gqa=len(key) != len(query),
    )
    return attn_output[0].transpose(0, 1)


def _build_metadata(
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    read_index: torch.Tensor,
    dtype: torch.dtype,
    uses_paged_kernel: bool,
) -> AttentionMetadata:
    """Assign each sequence to a strategy, and gather cache slots in the order in which they are computed."""
    q_ranges = [slice(start, end) for start, end in pairwise(cu_seq_lens_q.tolist())]
    kv_ranges = [slice(start, end) for start, end in pairwise(cu_seq_lens_k.tolist())]
    # Without slots to read, keys and values are those of the prompts, in their order.
    reads_cache = read_index.numel() > 0
    decodes = [seq for seq, q_range in enumerate(q_ranges) if reads_cache and _length(q_range) == 1]
    paged_decode = None
    padded_decodes, prefills = [], []
    read_indices: list[torch.Tensor] = []
    offset = 0
    if decodes and uses_paged_kernel:
        paged_decode = PagedDecode(
            torch.tensor([q_ranges[seq].start for seq in decodes]),
            read_index,
            torch.tensor([[kv_ranges[seq].start, kv_ranges[seq].stop] for seq in decodes]),
        )
    else:
        for group in _group_by_length(decodes, kv_ranges):
            starts = torch.tensor([[kv_ranges[seq].start] for seq in group])
            lengths = torch.tensor([[_length(kv_ranges[seq])] for seq in group])
            padded_length = -(-int(lengths.max()) // PADDED_TOKENS) * PADDED_TOKENS
            positions = torch.arange(padded_length)
            # Padding repeats the last key: unwritten cache may hold NaN, which a mask does not remove.
            read_indices.append(read_index[starts + positions.minimum(lengths - 1)].flatten())
            mask = torch.zeros(len(group), 1, 1, padded_length, dtype=dtype)
            mask.masked_fill_((positions >= lengths)[:, None, None], -torch.inf)
            is_whole_batch = len(group) == len(q_ranges)
            query_indices = None if is_whole_batch else torch.tensor([q_ranges[seq].start for seq in group])
            keys = slice(offset, offset := offset + read_indices[-1].numel())
            padded_decodes.append(PaddedDecode(query_indices, keys, padded_length, mask))
    for q_range, kv_range in zip(q_ranges, kv_ranges, strict=True):
        q_length, kv_length = _length(q_range), _length(kv_range)
        if q_length == 1 and reads_cache:
            continue
        is_whole_prompt = q_length == kv_length
        causal = None if is_whole_prompt else torch.ones(q_length, kv_length, dtype=torch.bool)
        keys = kv_range
        if reads_cache:
            read_indices.append(read_index[kv_range])
            keys = slice(offset, offset := offset + kv_length)
        prefills.append(Prefill(q_range, keys, None if causal is None else causal.tril(kv_length - q_length)))
    gathered = torch.cat(read_indices) if read_indices else read_index[:0]
    return AttentionMetadata(uses_paged_kernel, gathered, paged_decode, padded_decodes, prefills)


def _group_by_length(seqs: list[int], kv_ranges: list[slice]) -> Iterator[list[int]]:
    """Yield groups of sequences of similar key length, each in batch order."""
    remaining = sorted(seqs, key=lambda seq: _length(kv_ranges[seq]))
    while remaining:
        limit = _MAX_LENGTH_RATIO * max(_length(kv_ranges[remaining[0]]), PADDED_TOKENS)
        group = [seq for seq in remaining if _length(kv_ranges[seq]) <= limit]
        remaining = remaining[len(group) :]
        yield sorted(group)


def _length(interval: slice) -> int:
    return int(interval.stop - interval.start)


transformers_attention.register(attend)
