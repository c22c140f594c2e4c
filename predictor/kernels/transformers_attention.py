"""Adapter for transformers' attention internals, as of transformers 5.23."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from predictor.kernels import shards, tensor_parallel

SEQUENCE, VARLEN = "sequence_flash", "varlen_flash"
"""Implementations of `sequence_attention` and `cuda.attention`.

The batching manager builds no attention mask for names that contain `flash`. With a 2 or 3 after that, it would look
for the package flash-attn.
"""


class PagedKVCache(Protocol):
    """The batching manager's KV cache."""

    layer_to_allocator: Any
    cache_allocators: Any

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, attention_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values, and gather those that `read_index` names."""


class PagedLayer:
    """Keys and values of one layer in the batching manager's cache."""

    def __init__(self, cache: PagedKVCache, layer_idx: int) -> None:
        self._allocator = cache.layer_to_allocator[layer_idx]
        self._layer_idx = layer_idx
        self.index: int = self._allocator.index
        """Of the layer's type, in lists of the step's arguments."""
        self.type: str = self._allocator.layer_type
        """`full_attention` or `sliding_attention`, the key of the step's other arguments."""
        self.window: int | None = getattr(self._allocator, "sliding_window", None)
        """Number of keys that a query attends to, its own included; None: all."""
        self.is_first: bool = self._allocator.layer_indices[0] == layer_idx
        """Whether this is the first layer of its type."""
        self.unused_slot: int = self._allocator.write_trash_index
        """A slot that belongs to no sequence, for the keys of padding."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, read_index: torch.Tensor, write_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values, and return those of the slots to read.

        Args:
            key: (1, num_kv_heads, tokens, head_dim).
            value: as `key`.
            read_index: slots of the keys of all sequences; the batching manager's, if the layer has a window. None to
                read: the result is `key` and `value`.
            write_index: slots of the new keys, (tokens,).

        Returns:
            Keys and values, (tokens, num_kv_heads, head_dim) each.
        """
        states = key[0].transpose(0, 1), value[0].transpose(0, 1)
        updated: tuple[torch.Tensor, torch.Tensor] = self._allocator.update(
            *states, self._layer_idx, read_index, write_index
        )
        return updated

    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, (pages, tokens per page, num_kv_heads, head_dim) each, if the layer has no window."""
        pages: tuple[torch.Tensor, torch.Tensor] = self._allocator.get_cache_for_block_table(self._layer_idx)
        return pages

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values by slot, (slots, num_kv_heads, head_dim) each; of an int8 cache `int8_heads`."""
        slots: tuple[torch.Tensor, torch.Tensor] = self._allocator._kv_token_views[self._layer_idx]
        return slots

    def write(self, key: torch.Tensor, value: torch.Tensor, write_index: torch.Tensor) -> None:
        """Write keys and values to slots, (tokens, num_kv_heads, head_dim) each, as those of `slots` are."""
        for cache, states in zip(self.slots(), (key, value), strict=True):
            cache.index_copy_(0, write_index, states)


def read_pages(cache: PagedKVCache) -> None:
    """Make the batching manager pass the pages of each sequence as `read_index`, instead of the slots in them.

    Slots would be a list of all keys of the batch, made on the host before every step that is not of decodes only.
    """
    for allocator in cache.cache_allocators.values():
        if allocator.supports_block_table:
            allocator.get_read_indices = partial(_sequence_pages, allocator)


def _sequence_pages(allocator: Any, request_id: str, past_length: int, query_length: int) -> list[int]:
    pages_per_block = allocator.block_physical_stride // allocator.tokens_per_page
    pages = math.ceil((past_length + query_length) / allocator.tokens_per_page)
    return [block * pages_per_block for block in allocator.block_table[request_id][:pages]]


def register(name: str, attention: Callable[..., tuple[torch.Tensor, None]]) -> None:
    """Register an attention function that needs no mask.

    It has no function that makes masks: with one, transformers would read positions back from the device before every
    forward pass.
    """
    AttentionInterface.register(name, attention)


def heads(model: Any) -> tuple[int, int, int]:
    """Return this rank's number of query heads and of KV heads, and the features of a head."""
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    ranks = tensor_parallel.size() if shards.divides_heads(config) else 1
    return num_heads // ranks, num_kv_heads // ranks, head_dim


def check_scores(kwargs: dict[str, Any]) -> None:
    """Check that a layer's scores need no function that the implementations here lack.

    Raises:
        NotImplementedError: they are soft-capped, or include attention sinks.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("Soft-capped scores and attention sinks are not supported by this attention.")


def is_replaceable(model: Any, *, any_scores: bool) -> bool:
    """Return whether `SEQUENCE` or `VARLEN` computes the attention of `model`, which uses SDPA or one of them already.

    Args:
        model: with its attention implementation.
        any_scores: also replace eager attention, of architectures with soft-capped scores or attention sinks.
    """
    selected = model.config._attn_implementation
    if selected == "eager":
        return any_scores and bool(model._supports_flash_attn) and not model._supports_sdpa
    return selected in ("sdpa", SEQUENCE, VARLEN)


def select(model: Any, name: str) -> None:
    """Select a registered implementation."""
    # `set_attn_implementation` would download any unknown name with `flash` in it as a kernel from the Hub.
    model.config._attn_implementation = name


def is_selected(model: Any, name: str) -> bool:
    """Return whether an implementation is selected."""
    return bool(model.config._attn_implementation == name)


def plain_implementation(model: Any) -> str:
    """Return the implementation that computes the same as the selected one, without a paged cache."""
    selected: str = model.config._attn_implementation
    if selected in (SEQUENCE, VARLEN):
        return "sdpa" if model._supports_sdpa else "eager"
    return "eager" if selected == "paged|eager" else selected


@contextmanager
def selected(model: Any, implementation: str) -> Iterator[None]:
    """Select an implementation temporarily."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def attention_function(
    config: Any, eager: Callable[..., tuple[torch.Tensor, Any]]
) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Return the attention implementation that `config` selects; `eager` is the model's own."""
    function: Callable[..., tuple[torch.Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager
    )
    return function
