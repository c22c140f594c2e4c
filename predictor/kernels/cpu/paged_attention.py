"""Attention over the paged KV cache in C on a CPU: decodes, chunks of prompts and whole ones, with or without a window.

Keys of earlier steps are read in the cache, and those of the step where they are. So a layer with a sliding window,
whose cache is a ring that new keys overwrite, is written after it has been read, and needs no copies and no masks.
"""

from dataclasses import dataclass
from typing import Any

import torch

from predictor.kernels.cpu import ops
from predictor.kernels.transformers_attention import PagedLayer


@dataclass(frozen=True, slots=True)
class StepIndices:
    """Index tensors of one step in the form of `ops.paged_attention`, the same in every layer of a type."""

    slot_mapping: torch.Tensor
    sequences: torch.Tensor
    tiles: torch.Tensor


def supports(layer: PagedLayer, query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor | None) -> bool:
    """Return whether `attend` computes a layer with these states, whose shapes are those of its arguments."""
    is_located = layer.window is None or position_ids is not None
    _, num_heads, _, head_dim = query.shape
    return (
        query.device.type == "cpu"
        and is_located
        and ops.supports_paged_attention(query.dtype, num_heads, key.shape[1], head_dim)
    )


def attend(
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
    position_ids: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Compute attention of one layer, and write the new keys and values into the cache.

    Args, in addition to those of `sequence_attention.attend`:
        layer: in the cache.
        position_ids: of the tokens, (1, tokens); may be None if the layer has no window.
        softcap: of `ops.paged_attention`.
        s_aux: attention sinks, (num_heads,).

    Returns:
        (1, tokens, num_heads, head_dim)
    """
    del kwargs
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    # Kept on the step's tensor, which all layers share: it is freed with the step.
    by_type: dict[tuple[str, int], StepIndices] = vars(cu_seq_lens_q).setdefault("paged_attention_indices", {})
    tile_queries = ops.ATTENTION_ROWS // (num_heads // num_kv_heads)
    indices = by_type.get((layer.type, tile_queries))
    if indices is None:
        sequences = _locate_sequences(
            cu_seq_lens_q, cu_seq_lens_k[layer.type], None if layer.window is None else position_ids
        )
        tiles = _make_tiles(sequences, cu_seq_lens_q.diff().tolist(), tile_queries)
        indices = StepIndices(read_index[layer.index], torch.tensor(sequences), torch.tensor(tiles))
        by_type[layer.type, tile_queries] = indices
    key_cache, value_cache = layer.slots()
    new_key, new_value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if key_cache.dtype == torch.int8:
        # Also what this step reads: a token has the same key in the step that computes it and in later ones.
        new_key, new_value = ops.quantize_kv(new_key, new_value)
    output = ops.paged_attention(
        query[0].transpose(0, 1),
        new_key,
        new_value,
        key_cache,
        value_cache,
        slot_mapping=indices.slot_mapping,
        sequences=indices.sequences,
        tiles=indices.tiles,
        scale=scaling,
        window=layer.window,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
    )
    layer.write(new_key, new_value, write_index[layer.index])
    return output.to(query.dtype)[None]


def _locate_sequences(
    cu_seq_lens_q: torch.Tensor, cu_seq_lens_k: torch.Tensor, position_ids: torch.Tensor | None
) -> list[list[int]]:
    """Return `sequences` of `ops.paged_attention`; without positions all keys before the step are read."""
    first_tokens, first_slots = cu_seq_lens_q[:-1].tolist(), cu_seq_lens_k[:-1].tolist()
    cached = (cu_seq_lens_k.diff() - cu_seq_lens_q.diff()).tolist()
    past_lengths = cached if position_ids is None else position_ids[0, cu_seq_lens_q[:-1]].tolist()
    return [
        [first_token, past, past - keys, first_slot]
        for first_token, past, keys, first_slot in zip(first_tokens, past_lengths, cached, first_slots, strict=True)
    ]


def _make_tiles(sequences: list[list[int]], q_lengths: list[int], tile_queries: int) -> list[list[int]]:
    """Split each sequence's queries; the tiles with the most keys come first, since threads take them in this order."""
    tiles = [
        (past + first, [seq, first, min(tile_queries, length - first)])
        for seq, ((_, past, _, _), length) in enumerate(zip(sequences, q_lengths, strict=True))
        for first in range(0, length, tile_queries)
    ]
    return [tile for _, tile in sorted(tiles, reverse=True)]
