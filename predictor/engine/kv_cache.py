"""Size of the KV cache."""

import math

import torch

from predictor.engine.causal_lm import CausalLM
from predictor.engine.prompt_scorer import CHUNK_LOGITS
from predictor.errors import InvalidSettings, StartupError
from predictor.kernels import int8_heads, tensor_parallel, transformers_attention
from predictor.resources import memory
from predictor.settings import Settings

PAGE_TOKENS = 256
"""Tokens in one block of the KV cache: the smallest allocation of a sequence, and the unit of prefix sharing."""
SEQUENCE_TOKENS = 2048
"""Cache per sequence of a full batch, if memory allows. More is rarely used, and a host takes long to zero it."""
CUDA_WORKSPACE_BYTES = 2**29
"""Memory of a CUDA device for what appears with the first steps: cuBLAS's workspaces (32 MiB for each stream on a
Hopper GPU), kernels, which CUDA loads when they are first launched, and CUDA graphs, one per power of two of rows."""
_PADDING_BLOCKS = 2
"""Blocks that the batching manager allocates in addition, for padding."""


def token_budget(
    model: CausalLM, settings: Settings, *, context_tokens: int, dense_mask: bool, in_place: bool = False
) -> int:
    """Return the capacity of the KV cache: what the free memory allows, and on a host no more than sequences use.

    On CUDA the rest of the memory keeps prefixes of sequences that have ended. Other processes on the device keep
    theirs.

    Args, in addition to those of `Engine.from_model`:
        dense_mask: whether one attention mask is made for the whole cache.
        in_place: whether keys and values are read in the cache, without masks.

    Raises:
        StartupError: not even one block fits.
    """
    is_cuda = model.device.type == "cuda"
    # The ranks of a model have a GPU each, and share a host.
    free_bytes = memory.available_bytes(model.device) // (1 if is_cuda else tensor_parallel.size())
    budget_bytes = int(free_bytes * settings.kv_cache_memory_fraction) - (CUDA_WORKSPACE_BYTES if is_cuda else 0)
    mask_tokens = None if dense_mask else context_tokens
    tokens = tokens_within(model, settings, budget_bytes, mask_tokens, in_place=in_place)
    blocks = tokens // PAGE_TOKENS - _PADDING_BLOCKS
    if blocks < 1:
        raise StartupError(
            f"Not enough memory for a KV cache: {free_bytes / 2**30:.1f} GiB free on {model.device} after loading the "
            f"weights, of which --kv_cache_memory_fraction allows {settings.kv_cache_memory_fraction:.0%}. Add memory, "
            "end other processes, use --quantization, or lower --max_num_batched_tokens and --max_num_seqs."
        )
    if is_cuda:
        return blocks * PAGE_TOKENS
    useful_tokens = max(context_tokens, settings.max_num_seqs * min(context_tokens, SEQUENCE_TOKENS))
    return min(blocks, math.ceil(useful_tokens / PAGE_TOKENS)) * PAGE_TOKENS


def tokens_within(
    model: CausalLM,
    settings: Settings,
    budget_bytes: int,
    context_tokens: int | None = None,
    *,
    in_place: bool = False,
) -> int:
    """Return the tokens of KV cache that fit into a budget together with its working space; may be negative.

    Per token of the cache: keys and values of all layers; an index entry; keys and values of one layer once more,
    gathered and padded to twice their length, or repeated for every query head, of an int8 cache also as they were and
    in float32; and its column in the attention mask.
    Once: float32 logits with their copies in the sampler and those of prompts, and the activations of the largest step.

    Args, in addition to those of `Engine.from_model`:
        budget_bytes: for all of it.
        context_tokens: keys per query, if masks are made for one sequence at a time, twice, as booleans and as
            numbers; None: one dense mask is made for the whole cache.
        in_place: of `token_budget`.
    """
    batched_tokens = settings.max_num_batched_tokens
    config = model.config.get_text_config()
    element_bytes = model.dtype.itemsize
    heads, num_kv_heads, head_dim = transformers_attention.heads(model)
    intermediate_size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    is_int8 = settings.kv_cache_dtype == "int8"
    head_bytes = int8_heads.head_bytes(head_dim) if is_int8 else head_dim * element_bytes
    keys_and_values = 2 * config.num_hidden_layers * num_kv_heads * head_bytes
    gathered = 0 if in_place else 2 * max(heads, 2 * num_kv_heads) * head_dim * element_bytes
    if is_int8 and not in_place:
        gathered += num_kv_heads * (2 * head_bytes + 2 * head_dim * torch.float32.itemsize)
    index_entry = 8
    token_bytes = keys_and_values + index_entry + gathered
    prompt_logits = min(batched_tokens * config.vocab_size, max(CHUNK_LOGITS, config.vocab_size))
    logits = 3 * (settings.max_num_seqs * config.vocab_size + prompt_logits) * 4
    widest = max(intermediate_size, config.hidden_size)
    activations = batched_tokens * (4 * config.hidden_size + 3 * widest) * element_bytes
    cache_bytes = budget_bytes - logits - activations
    if in_place:
        return int(cache_bytes // token_bytes)
    if context_tokens is None:
        return int(cache_bytes // (token_bytes + batched_tokens * element_bytes))
    mask_column = batched_tokens * (1 + element_bytes)
    # Either the cache is shorter than a context, or a context's mask is the largest there will be.
    return int(
        max(
            min(cache_bytes // (token_bytes + mask_column), context_tokens),
            (cache_bytes - context_tokens * mask_column) // token_bytes,
        )
    )


def check_dtype(kv_cache_dtype: str, device: torch.device) -> None:
    """Check that a device supports a setting `kv_cache_dtype`.

    Raises:
        InvalidSettings: it does not.
    """
    if kv_cache_dtype == "auto" or device.type == "cpu":
        return
    raise InvalidSettings(
        f"--kv_cache_dtype {kv_cache_dtype} needs a CPU, but the device is {device}. Set --kv_cache_dtype auto, or "
        "--device cpu. On a GPU --quantization leaves more memory to the cache."
    )
