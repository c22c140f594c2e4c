"""Fence around the paged KV cache of transformers' continuous batching, whose pages can be in int8.

To the manager, a head of such a cache has as many features as `int8_heads` has bytes. So pages, their copies, shared
prefixes and rings of sliding windows are those of any cache. Attention in C reads the heads; `update`, which all other
implementations use, takes and returns keys and values of the model's dtype.
"""

import threading
from functools import partial
from typing import Any

import torch
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.utils import find_head_dim

from predictor.kernels import int8_heads

_creation = threading.Lock()


class Int8PagedCache(PagedAttentionCache):
    """The manager's cache with pages in int8; arguments are those of its base."""

    def __init__(self, *, config: Any, dtype: torch.dtype, **arguments: Any) -> None:
        head_dim = find_head_dim(config)
        super().__init__(config=_WithHeadDim(config, int8_heads.head_bytes(head_dim)), dtype=torch.int8, **arguments)
        for allocator in self.cache_allocators.values():
            allocator.update = partial(_update, allocator.update, head_dim, dtype)


class _WithHeadDim:
    """A model's configuration with another `head_dim`."""

    def __init__(self, config: Any, head_dim: int) -> None:
        self._config = config
        self.head_dim = head_dim

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _update(
    update: Any, head_dim: int, dtype: torch.dtype, key: torch.Tensor, value: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write new keys and values, and return what is read, as `update` of an allocator does, but of `dtype`."""
    keys, values = update(int8_heads.quantize(key), int8_heads.quantize(value), *arguments)
    return int8_heads.dequantize(keys, head_dim, dtype), int8_heads.dequantize(values, head_dim, dtype)


def create_batch_processor(manager: Any, kv_cache_dtype: str) -> Any:
    """Return a manager's batch processor, with a cache of the model's dtype ("auto") or of int8 ("int8").

    Raises:
        MemoryError: the cache does not fit into memory.
        ValueError: likewise.
    """
    # The manager has no argument for the class of its cache, and other models may be loaded at the same time.
    with _creation:
        continuous_api.PagedAttentionCache = Int8PagedCache if kv_cache_dtype == "int8" else PagedAttentionCache
        try:
            return manager._create_batch_processor()
        finally:
            continuous_api.PagedAttentionCache = PagedAttentionCache
