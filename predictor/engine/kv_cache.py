"""Capacity of the KV cache."""

from typing import Any


def kv_cache_tokens(
    model: Any, *, budget_bytes: int, max_num_batched_tokens: int, max_num_seqs: int, context_tokens: int | None = None
) -> int:
    """Tokens of KV cache for which a budget is enough, with all that is allocated beside it; may be negative.

    Counted for each token of the cache: keys and values of all layers; its place in the index; keys and values of one
    layer once more, gathered and padded to twice their length, or repeated for every query head; and the row that it
    takes in an attention mask, all queries of a step by all keys that they could see. Counted once: logits in float32
    and their copies in the sampler, and activations of the largest step.

    Args:
        model: a transformers causal language model, on its device.
        budget_bytes: for all of it.
        max_num_batched_tokens: tokens computed in one step at most.
        max_num_seqs: sequences in one batch at most.
        context_tokens: keys that a query could see, where masks are made for one sequence at a time, twice, as booleans
            and as numbers; None: one dense mask is made for the whole cache.
    """
    config = model.config.get_text_config()
    number_bytes = model.dtype.itemsize
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    keys_and_values = 2 * config.num_hidden_layers * kv_heads * head_dim * number_bytes
    gathered = 2 * max(heads, 2 * kv_heads) * head_dim * number_bytes
    index = 8
    logits = 3 * max_num_seqs * config.vocab_size * 4
    widest = max(getattr(config, "intermediate_size", None) or 4 * config.hidden_size, config.hidden_size)
    activations = max_num_batched_tokens * (4 * config.hidden_size + 3 * widest) * number_bytes
    left = budget_bytes - logits - activations
    each = keys_and_values + index + gathered
    if context_tokens is None:
        return int(left // (each + max_num_batched_tokens * number_bytes))
    mask_row = max_num_batched_tokens * (1 + number_bytes)
    # Either the cache is shorter than a context, or a context's mask is the largest there will be.
    return int(max(min(left // (each + mask_row), context_tokens), (left - context_tokens * mask_row) // each))
