"""Attention over the paged KV cache on any device, for transformers' `AttentionInterface`.

transformers' batching manager computes one dense attention for the whole batch, at a cost quadratic in the batch size.
Here each sequence attends to its own keys only: on a CPU in C (`cpu.paged_attention`), and where that does not support
the heads, with SDPA:

    padded decode  one query per sequence, keys gathered and padded to one length
    single         a prompt, or a chunk of one; with a sliding window any sequence
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from predictor.kernels import transformers_attention
from predictor.kernels.cpu import paged_attention
from predictor.kernels.transformers_attention import PagedKVCache, PagedLayer

PADDED_TOKENS = 32
"""Key lengths are padded to multiples of this, so that sums over keys have the same order in any batch."""
_MAX_LENGTH_RATIO = 2
"""Sequences up to this many times as long as the shortest are padded to one length."""


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
class Single:
    """A sequence that is computed by itself."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None
    """Keys visible to each query, (queries, keys)."""
    is_causal: bool
    """Without a mask: whether queries and keys are the same tokens, and a query attends to earlier ones only."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Index tensors of one step, the same in every layer of a type."""

    read_index: torch.Tensor
    """Cache slots to gather for `padded_decodes` and `singles`."""
    padded_decodes: list[PaddedDecode]
    singles: list[Single]


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
        read_index: cache slots of the keys of all sequences, by layer type; empty if the cache has none of them.
        write_index: cache slots of the new keys, by layer type.
        kwargs: those of `cpu.paged_attention.attend`, and arguments of other attention implementations.

    Returns:
        (1, tokens, num_heads, head_dim), and no attention weights.

    Raises:
        NotImplementedError: for soft-capped scores or attention sinks, which SDPA does not support.
    """
    del attention_mask
    layer = PagedLayer(cache, module.layer_idx)
    indices: dict[str, Any] = {
        "cu_seq_lens_q": cu_seq_lens_q,
        "cu_seq_lens_k": cu_seq_lens_k,
        "read_index": read_index,
        "write_index": write_index,
    }
    if paged_attention.supports(layer, query, key, kwargs.get("position_ids")):
        return paged_attention.attend(layer, query, key, value, scaling=scaling, **indices, **kwargs), None
    transformers_attention.check_scores(kwargs)
    return _attend_with_sdpa(layer, query, key, value, scaling=scaling, **indices), None


def _attend_with_sdpa(
    layer: PagedLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: dict[str, torch.Tensor],
    read_index: list[torch.Tensor],
    write_index: list[torch.Tensor],
) -> torch.Tensor:
    _, num_heads, tokens, head_dim = query.shape
    # Kept on the step's tensor, which all layers share: it is freed with the step.
    by_type: dict[str, AttentionMetadata] = vars(cu_seq_lens_q).setdefault("attention_metadata", {})
    metadata = by_type.get(layer.type)
    if metadata is None:
        lengths = cu_seq_lens_q, cu_seq_lens_k[layer.type], read_index[layer.index]
        if layer.window is None:
            metadata = _build_metadata(*lengths, query.dtype)
        else:
            metadata = _build_windowed_metadata(*lengths, layer.window)
        by_type[layer.type] = metadata
    keys, values = layer.update(key, value, metadata.read_index, write_index[layer.index])
    query, key, value = query[0], keys.transpose(0, 1), values.transpose(0, 1)
    padded_decodes = metadata.padded_decodes
    # A batch of one group needs no copy into an output.
    if padded_decodes and padded_decodes[0].query_indices is None:
        return _padded_decode(query, key, value, padded_decodes[0], scaling)[None]
    output = query.new_empty(tokens, num_heads, head_dim)
    for group in padded_decodes:
        output[group.query_indices] = _padded_decode(query, key, value, group, scaling)
    for single in metadata.singles:
        output[single.queries] = _single(query, key, value, single, scaling)
    return output[None]


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


def _single(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, single: Single, scale: float) -> torch.Tensor:
    keys, values = key[None, :, single.keys], value[None, :, single.keys]
    if query.device.type == "cuda" and len(key) != len(query):
        # Of SDPA's kernels for float32, masks and old devices, only the one that makes all scores shares KV heads.
        keys, values = (states.repeat_interleave(len(query) // len(key), 1) for states in (keys, values))
    attn_output = scaled_dot_product_attention(
        query[None, :, single.queries],
        keys,
        values,
        attn_mask=single.mask,
        is_causal=single.is_causal,
        scale=scale,
        enable_gqa=keys.shape[1] != len(query),
    )
    return attn_output[0].transpose(0, 1)


def _build_metadata(
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    read_index: torch.Tensor,
    dtype: torch.dtype,
) -> AttentionMetadata:
    """Assign each sequence to a strategy, and gather cache slots in the order in which they are computed."""
    device = cu_seq_lens_q.device
    q_ranges, kv_ranges = _ranges(cu_seq_lens_q), _ranges(cu_seq_lens_k)
    # Without slots to read, keys and values are those of the prompts, in their order.
    reads_cache = read_index.numel() > 0
    decodes = [seq for seq, q_range in enumerate(q_ranges) if reads_cache and _length(q_range) == 1]
    padded_decodes, singles = [], []
    read_indices: list[torch.Tensor] = []
    offset = 0
    for group in _group_by_length(decodes, kv_ranges):
        starts = torch.tensor([[kv_ranges[seq].start] for seq in group], device=device)
        lengths = torch.tensor([[_length(kv_ranges[seq])] for seq in group], device=device)
        padded_length = -(-max(_length(kv_ranges[seq]) for seq in group) // PADDED_TOKENS) * PADDED_TOKENS
        positions = torch.arange(padded_length, device=device)
        # Padding repeats the last key: unwritten cache may hold NaN, which a mask does not remove.
        read_indices.append(read_index[starts + positions.minimum(lengths - 1)].flatten())
        mask = torch.zeros(len(group), 1, 1, padded_length, dtype=dtype, device=device)
        mask.masked_fill_((positions >= lengths)[:, None, None], -torch.inf)
        is_whole_batch = len(group) == len(q_ranges)
        indices = [q_ranges[seq].start for seq in group]
        query_indices = None if is_whole_batch else torch.tensor(indices, device=device)
        keys = slice(offset, offset := offset + read_indices[-1].numel())
        padded_decodes.append(PaddedDecode(query_indices, keys, padded_length, mask))
    for q_range, kv_range in zip(q_ranges, kv_ranges, strict=True):
        if _length(q_range) == 1 and reads_cache:
            continue
        keys = kv_range
        if reads_cache:
            read_indices.append(read_index[kv_range])
            keys = slice(offset, offset := offset + _length(kv_range))
        singles.append(_make_single(q_range, keys, None, device))
    gathered = torch.cat(read_indices) if read_indices else read_index[:0]
    return AttentionMetadata(gathered, padded_decodes, singles)


def _build_windowed_metadata(
    cu_seq_lens_q: torch.Tensor, cu_seq_lens_k: torch.Tensor, read_index: torch.Tensor, window: int
) -> AttentionMetadata:
    """Compute each sequence by itself, with the keys in the batching manager's order.

    The cache of a sequence is a ring of `window` slots. Its keys are gathered before new ones replace some of them, and
    `read_index` names the places of the new ones, so that it cannot be rearranged.
    """
    ranges = zip(_ranges(cu_seq_lens_q), _ranges(cu_seq_lens_k), strict=True)
    singles = [_make_single(q_range, kv_range, window, cu_seq_lens_q.device) for q_range, kv_range in ranges]
    return AttentionMetadata(read_index, [], singles)


def _make_single(queries: slice, keys: slice, window: int | None, device: torch.device) -> Single:
    q_length, kv_length = _length(queries), _length(keys)
    # A decode's keys are all in its window.
    if q_length == 1:
        return Single(queries, keys, None, is_causal=False)
    if q_length == kv_length and (window is None or kv_length <= window):
        return Single(queries, keys, None, is_causal=True)
    diagonal = kv_length - q_length
    visible = torch.ones(q_length, kv_length, dtype=torch.bool, device=device).tril_(diagonal)
    if window is not None:
        visible.triu_(diagonal - window + 1)
    return Single(queries, keys, visible, is_causal=False)


def _ranges(cumulative_lengths: torch.Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(cumulative_lengths.tolist())]


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
