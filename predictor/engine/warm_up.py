"""Warm-up: greedy tokens of the engine are compared with forward passes of the same model without a KV cache.

A model whose attention does not see the cache, or sees the other sequences of a batch, would be served with wrong text.
"""

from collections.abc import Sequence

import torch

from predictor.errors import GenerationFailed

_PROMPT_TOKENS, _NEW_TOKENS = 16, 8
_TOLERANCE = {torch.float32: 0.02, torch.float16: 0.05}
_COARSEST_TOLERANCE = 0.1
"""Shortfall up to which rounding explains it. Rounding has caused 0.008 at most, with 8-bit activations, too; attention
without the cache at least 0.26."""


def make_prompts(vocabulary_tokens: int, context_tokens: int, count: int) -> tuple[list[list[int]], int]:
    """Return two prompts of different length, or one if `count` is 1, and the tokens to generate for each."""
    total = min(_PROMPT_TOKENS + _NEW_TOKENS, context_tokens)
    max_tokens = min(_NEW_TOKENS, total // 2)
    prompt_tokens = total - max_tokens
    # Special tokens are usually at the ends of a vocabulary.
    first = vocabulary_tokens // 4
    ids = [first + 7919 * index % max(1, vocabulary_tokens // 2) for index in range(prompt_tokens)]
    return [ids, ids[prompt_tokens // 2 :]][:count], max_tokens


def check(logits: torch.Tensor, completion: Sequence[int], *, is_cache_rounded: bool = False) -> None:
    """Check that each token of a completion has the largest logit, up to rounding.

    Args:
        logits: of prompt and completion, (tokens, vocabulary).
        completion: the greedy tokens, the last ones of the sequence.
        is_cache_rounded: whether the KV cache has fewer bits than `logits`.

    Raises:
        GenerationFailed: a token has not.
    """
    largest = shortfall(logits, completion)
    tolerance = _COARSEST_TOLERANCE if is_cache_rounded else _TOLERANCE.get(logits.dtype, _COARSEST_TOLERANCE)
    if not largest <= tolerance:  # also if it is not a number
        raise GenerationFailed(
            "its tokens are not those of a forward pass without a KV cache, so every answer would be wrong "
            f"(a logit is {largest:.0%} of the row's range below the largest one)"
        )


def shortfall(logits: torch.Tensor, completion: Sequence[int]) -> float:
    """Return the largest distance of a token's logit from the largest one of its row, relative to largest - median."""
    rows = logits[-len(completion) - 1 : -1].float()
    chosen = rows.gather(1, torch.tensor(completion)[:, None])[:, 0]
    largest = rows.amax(1)
    spread = (largest - rows.median(1).values).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((largest - chosen) / spread).amax())


def check_rows(alone: torch.Tensor, together: torch.Tensor) -> None:
    """Check that rows computed alone and in one batch are the same, up to rounding.

    Raises:
        GenerationFailed: they are not.
    """
    scale = alone.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((alone - together).abs().amax() / scale)
    if not difference <= _COARSEST_TOLERANCE:
        raise GenerationFailed(
            f"a result depends on the rest of its batch, so every answer could be wrong (difference {difference:.0%})"
        )
