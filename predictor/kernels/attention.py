"""Choice of the attention over the paged KV cache."""

import logging
from contextlib import AbstractContextManager
from typing import Any

from predictor.kernels import sequence_attention, transformers_attention
from predictor.kernels.cpu import ops
from predictor.kernels.cuda import attention as cuda_attention

logger = logging.getLogger(__name__)

transformers_attention.register(transformers_attention.SEQUENCE, sequence_attention.attend)
transformers_attention.register(transformers_attention.VARLEN, cuda_attention.attend)


def install(model: Any) -> bool:
    """Make `model` use the fastest attention that its device has, and return whether it can use ours at all.

    If not, the batching manager computes one dense attention for the whole batch.
    """
    if not transformers_attention.is_replaceable(model, any_scores=_uses_c(model)):
        logger.info("attention: one mask for the whole batch, as this architecture needs")
        return False
    unavailable = cuda_attention.unavailable_reason(model)
    if unavailable and model.device.type == "cuda":
        logger.warning("FlashAttention is unavailable, so each sequence is computed by itself: %s", unavailable)
    name = transformers_attention.SEQUENCE if unavailable else transformers_attention.VARLEN
    transformers_attention.select(model, name)
    in_c = "C over the paged KV cache" if _uses_c(model) else "SDPA for each sequence"
    logger.info("attention: %s", in_c if unavailable else "FlashAttention over block tables")
    return True


def uses_block_tables(model: Any) -> bool:
    """Return whether the attention of `model` reads the pages of the KV cache itself."""
    return transformers_attention.is_selected(model, transformers_attention.VARLEN)


def reads_in_place(model: Any) -> bool:
    """Return whether all layers read keys and values in the cache only; on CUDA those with a window gather theirs."""
    if uses_block_tables(model):
        return not getattr(model.config.get_text_config(), "sliding_window", None)
    return transformers_attention.is_selected(model, transformers_attention.SEQUENCE) and _uses_c(model)


def plain(model: Any) -> AbstractContextManager[None]:
    """Select the implementation that computes the same without a paged cache, temporarily."""
    return transformers_attention.selected(model, transformers_attention.plain_implementation(model))


def _uses_c(model: Any) -> bool:
    if model.device.type != "cpu":
        return False
    return ops.supports_paged_attention(model.dtype, *transformers_attention.heads(model))
