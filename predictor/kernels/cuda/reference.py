"""What torch's `varlen_attn` computes, in plain torch for any device and dtype: to test the kernel, and its callers."""

from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Compute the attention of sequences of different length.

    Args:
        query: (queries of all sequences, num_heads, head_dim).
        key: (keys of all sequences, num_kv_heads, head_dim), or with a block table (pages, tokens per page,
            num_kv_heads, head_dim).
        value: as `key`.
        cu_seq_q: cumulative query lengths, (sequences + 1,), int32.
        cu_seq_k: cumulative key lengths, likewise.
        max_q: at least the longest query length.
        max_k: at least the longest key length.
        scale: of the scores; None: 1 / sqrt(head_dim).
        window_size: keys to the left and right of a query's own position that it attends to; -1: all. The last query is
            at the last key's position.
        enable_gqa: whether query heads may share KV heads.
        seqused_k: number of keys of each sequence, (sequences,), int32.
        block_table: pages of each sequence, (sequences, pages), int32; entries behind its last key are not read.
        num_splits: of the work, without effect on the result.

    Returns:
        (queries of all sequences, num_heads, head_dim); 0 for queries without keys.

    Raises:
        ValueError: for arguments with which the kernel would fail, or skip keys.
    """
    del num_splits
    for tensor in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        if tensor is not None and tensor.dtype != torch.int32:
            raise ValueError("lengths and pages are int32")
    if (seqused_k is None) != (block_table is None):
        raise ValueError("a block table and the number of keys belong together")
    if query.shape[1] != key.shape[-2] and not enable_gqa:
        raise ValueError("query heads share KV heads only with enable_gqa")
    output = torch.zeros_like(query)
    for seq, (begin, end) in enumerate(pairwise(cu_seq_q.tolist())):
        if block_table is None or seqused_k is None:
            first, last = cu_seq_k[seq : seq + 2].tolist()
            keys, values = key[first:last], value[first:last]
        else:
            length, page_tokens = int(seqused_k[seq]), key.shape[1]
            pages = block_table[seq, : -(-length // page_tokens)]
            keys, values = (states[pages].flatten(0, 1)[:length] for states in (key, value))
        if end - begin > max_q or len(keys) > max_k:
            raise ValueError("a sequence is longer than max_q or max_k")
        if end > begin and len(keys):
            output[begin:end] = _attend(query[begin:end], keys, values, scale, *window_size)
    return output


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, left: int, right: int
) -> torch.Tensor:
    diagonal = len(key) - len(query)
    visible = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
    if left >= 0:
        visible.triu_(diagonal - left)
    if right >= 0:
        visible.tril_(diagonal + right)
    query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
    return output[0].transpose(0, 1)
