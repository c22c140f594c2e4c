"""The paged KV cache as `past_key_values`, for layers that do not pass the attention's arguments on.

Continuous batching passes the cache as an argument of the attention interface. Some models have attention code of
their own, or drop the argument on the way, and would see no cache. All of them call `past_key_values.update`.
Their attention then runs over all sequences of a step, with the mask that the batching manager makes for it.
"""

from typing import Any

import torch
from torch import nn

from predictor.kernels import tensor_parallel
from predictor.kernels.transformers_attention import PagedKVCache

MODEL_TYPES = frozenset({"falcon", "nemotron", "stablelm"})
"""Models whose layers do not pass the batching manager's arguments on to the attention interface."""


class PagedPast:
    """The part of a transformers cache that these models use, for one step.

    Args:
        cache: of the batching manager.
        kwargs: of the step, with the indices that `cache` needs.
        num_kv_heads: of the cache. Layers may repeat each head for several queries.
    """

    def __init__(self, cache: PagedKVCache, kwargs: dict[str, Any], num_kv_heads: int) -> None:
        self._cache = cache
        self._kwargs = kwargs
        self._num_kv_heads = num_kv_heads

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values, and return those of all sequences, (1, heads, tokens, head_dim)."""
        repeats = key.shape[1] // self._num_kv_heads
        # A copy: the cache replaces arguments in it by those of the layer.
        keys, values = self._cache.update(key[:, ::repeats], value[:, ::repeats], layer_idx, dict(self._kwargs))
        if repeats == 1:
            return keys, values
        return keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)

    def get_seq_length(self, *_: Any) -> int:
        """Return 0: positions are arguments of the step."""
        return 0


def install(model: Any) -> bool:
    """Pass the cache to `model` as `past_key_values`, if it needs that, and return whether it does."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        return False
    if config.model_type == "falcon":  # it has other names for the number of heads
        multi_query = config.multi_query and not config.new_decoder_architecture
        config.num_key_value_heads = 1 if multi_query else config.num_kv_heads
    # Of the models here, tensor parallelism is supported for those whose plan divides the heads.
    num_kv_heads = config.num_key_value_heads // tensor_parallel.size()

    def add_past(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("cache") is None:
            return args, kwargs
        return args, kwargs | {"past_key_values": PagedPast(kwargs["cache"], kwargs, num_kv_heads)}

    model.register_forward_pre_hook(add_past, with_kwargs=True)
    return True
