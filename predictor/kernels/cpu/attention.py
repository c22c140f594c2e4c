"""Attention over the paged cache on a CPU: each sequence sees its own keys, and no mask over all of them is built.

transformers' batching manager computes one dense attention for a whole batch, all queries by all keys, whose cost grows
with the square of the batch. Here sequences that decode, one query each, are computed where their keys lie, in C; where
that cannot be, they are padded to one length and computed at once. A prompt, or a chunk of one, is computed by itself.

A function for transformers' `AttentionInterface`. Its name has `flash` in it: the manager builds no mask for those.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from predictor.kernels.cpu import ops

NAME = "cpu_flash_paged"

PADDED_TOKENS = 32
"""Lengths are padded to multiples of this, so that sums over keys have the same order whoever the neighbours are."""
_SPREAD = 2
"""Sequences up to so many times as long as the shortest are padded to one length."""


def use(model: Any) -> bool:
    """Have `model` attend by this module, if it is on a CPU and its layers allow; says whether they do.

    Layers with a sliding window keep their own cache in another order, so their models stay with the manager's way.
    """
    config = model.config.get_text_config()
    kinds = set(
        getattr(config, "layer_types", None)
        or ["sliding" if getattr(config, "sliding_window", None) else "full_attention"]
    )
    if (
        model.device.type != "cpu"
        or model.config._attn_implementation not in ("sdpa", NAME)
        or kinds != {"full_attention"}
    ):
        return False
    # Not by `set_attn_implementation`, which takes every unknown name with `flash` in it for a kernel to download.
    model.config._attn_implementation = NAME
    return True


@dataclass(frozen=True, slots=True)
class _InPlace:
    """Sequences with one query each, as `native.attention` takes them."""

    tokens: torch.Tensor
    spans: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one query each, and keys padded to one length."""

    queries: torch.Tensor | None
    """Their places in the batch, (sequences,); None where they are the whole batch."""
    keys: slice
    """Their places among the keys read, sequences x length of them."""
    length: int
    padding: torch.Tensor
    """Added to the scores: 0 for a key, -inf for padding, (sequences, 1, 1, length)."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt, or the next chunk of one."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None
    """Which keys each query sees, (queries, keys); None where both are the whole prompt so far."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one step reads and computes; the same in every layer."""

    of: torch.Tensor
    """The step's `cu_seq_lens_q`, by which it is known again."""
    native: bool
    """Whether sequences that decode are computed in C."""
    read_index: torch.Tensor
    in_place: _InPlace | None
    decodes: list[_Decodes]
    prompts: list[_Prompt]


_last: _Plan | None = None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cache: Any,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: dict[str, torch.Tensor],
    max_length_k: dict[str, int],
    read_index: list[torch.Tensor],
    write_index: list[torch.Tensor],
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer; writes the new keys and values into the cache.

    Args:
        module: the layer.
        query: (1, heads, tokens, head size), the tokens of all sequences one after the other.
        key: (1, key-value heads, tokens, head size).
        value: as `key`.
        attention_mask: None.
        scaling: of the scores.
        cache: the manager's.
        cu_seq_lens_q: where each sequence's queries begin, (sequences + 1,).
        cu_seq_lens_k: where each sequence's keys begin, by layer type.
        max_length_k: by layer type.
        read_index: where in the cache the keys of all sequences lie; empty where none has any there.
        write_index: where in the cache the new keys belong.
        other: what other attention functions take.

    Returns:
        (1, tokens, heads, head size), and no weights.
    """
    global _last
    del attention_mask
    if other.get("softcap") is not None or other.get("s_aux") is not None:
        raise NotImplementedError("Soft-capped scores and attention sinks are not computed here.")
    _, heads, tokens, size = query.shape
    shared = key.shape[1]
    plan, in_c = _last, ops.attends(query.dtype, heads, shared, size)
    if plan is None or plan.of is not cu_seq_lens_q or plan.native is not in_c:
        [starts_k] = cu_seq_lens_k.values()
        plan = _last = _plan(cu_seq_lens_q, starts_k, read_index[0], query.dtype, in_c)
    moved = {
        "cu_seq_lens_k": cu_seq_lens_k,
        "max_length_k": max_length_k,
        "read_index": [plan.read_index],
        "write_index": write_index,
    }
    key, value = cache.update(key, value, module.layer_idx, moved)
    query, key, value = query[0], key[0], value[0]
    output = query.new_empty(tokens, heads, size)
    if plan.in_place is not None:
        keys, values = (
            them.flatten(0, 1)
            for them in cache.layer_to_allocator[module.layer_idx].get_cache_for_block_table(module.layer_idx)
        )
        found = ops.attention(
            query.transpose(0, 1),
            keys,
            values,
            tokens=plan.in_place.tokens,
            places=read_index[0],
            spans=plan.in_place.spans,
            scaling=scaling,
        )
        if len(found) == tokens:
            return found.to(query.dtype)[None], None
        output[plan.in_place.tokens] = found.to(query.dtype)
    for group in plan.decodes:
        # Query heads that share a key head become its queries: nothing has to be repeated.
        asked = query if group.queries is None else query[:, group.queries]
        asked = asked.transpose(0, 1).unflatten(1, (shared, heads // shared))
        keys, values = (them[:, group.keys].unflatten(1, (-1, group.length)).transpose(0, 1) for them in (key, value))
        found = torch.nn.functional.scaled_dot_product_attention(
            asked, keys, values, attn_mask=group.padding, scale=scaling
        )
        if group.queries is None:
            return found.flatten(1, 2)[None], None
        output[group.queries] = found.flatten(1, 2)
    for prompt in plan.prompts:
        found = torch.nn.functional.scaled_dot_product_attention(
            query[None, :, prompt.queries],
            key[None, :, prompt.keys],
            value[None, :, prompt.keys],
            attn_mask=prompt.mask,
            is_causal=prompt.mask is None,
            scale=scaling,
            enable_gqa=shared != heads,
        )
        output[prompt.queries] = found[0].transpose(0, 1)
    return output[None], None


def _plan(
    starts_q: torch.Tensor, starts_k: torch.Tensor, read_index: torch.Tensor, dtype: torch.dtype, in_c: bool
) -> _Plan:
    """What a step reads, in the order in which it is computed: first the sequences that decode, then prompts."""
    q, k = starts_q.tolist(), starts_k.tolist()
    queries = [slice(start, end) for start, end in pairwise(q)]
    keys = [slice(start, end) for start, end in pairwise(k)]
    reads = read_index.numel() > 0
    # Without anything to read, keys and values are those of the prompts, as they come.
    decoding = [row for row, one in enumerate(queries) if reads and one.stop - one.start == 1]
    in_place = None
    if decoding and in_c:
        spans = torch.tensor([[keys[row].start, keys[row].stop] for row in decoding])
        in_place, decoding = _InPlace(torch.tensor([queries[row].start for row in decoding]), spans), []
    decoding.sort(key=lambda row: keys[row].stop - keys[row].start)
    places: list[torch.Tensor] = []
    read = 0
    decodes, prompts = [], []
    while decoding:
        shortest = keys[decoding[0]].stop - keys[decoding[0]].start
        rows = [row for row in decoding if keys[row].stop - keys[row].start <= _SPREAD * max(shortest, PADDED_TOKENS)]
        decoding = decoding[len(rows) :]
        rows.sort()
        begins = torch.tensor([[keys[row].start] for row in rows])
        lengths = torch.tensor([[keys[row].stop - keys[row].start] for row in rows])
        length = -(-int(lengths.max()) // PADDED_TOKENS) * PADDED_TOKENS
        steps = torch.arange(length)
        # Padding reads the last key again: a number, whatever else lies in the cache.
        places.append(read_index[begins + steps.minimum(lengths - 1)].flatten())
        padding = torch.zeros(len(rows), 1, 1, length, dtype=dtype)
        padding.masked_fill_((steps >= lengths)[:, None, None], -torch.inf)
        asked = None if len(rows) == len(queries) else torch.tensor([queries[row].start for row in rows])
        decodes.append(_Decodes(asked, slice(read, read + places[-1].numel()), length, padding))
        read += places[-1].numel()
    for asked_for, seen in zip(queries, keys, strict=True):
        many, all_keys = asked_for.stop - asked_for.start, seen.stop - seen.start
        if many == 1 and reads:
            continue
        mask = None if many == all_keys else torch.ones(many, all_keys, dtype=torch.bool).tril(all_keys - many)
        if reads:
            places.append(read_index[seen])
            seen = slice(read, read + all_keys)
            read += all_keys
        prompts.append(_Prompt(asked_for, seen, mask))
    return _Plan(starts_q, in_c, torch.cat(places) if places else read_index[:0], in_place, decodes, prompts)


AttentionInterface.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
