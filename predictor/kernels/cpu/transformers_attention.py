"""Adapter for transformers' attention and decoder-layer internals, as of transformers 5.23."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "cpu_flash_paged"
"""The batching manager builds no attention mask for implementations whose name contains `flash`."""

SUPPORTED_LAYER_CLASSES = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
"""transformers' decoder layers with the structure of `DecoderLayerParts`."""


class PagedKVCache(Protocol):
    """The batching manager's KV cache."""

    layer_to_allocator: Any

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, attention_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values, and gather those that `read_index` names."""


def register(attention: Callable[..., tuple[torch.Tensor, None]]) -> None:
    """Register `attention` as the implementation `NAME`, without a mask."""
    AttentionInterface.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


def enable(model: Any) -> bool:
    """Select the implementation `NAME` if `model` is on a CPU and all its layers have full attention.

    Layers with a sliding window keep their cache in another order, so their models keep transformers' implementation.
    """
    config = model.config.get_text_config()
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    layer_types = set(getattr(config, "layer_types", None) or [default])
    if (
        model.device.type != "cpu"
        or model.config._attn_implementation not in ("sdpa", NAME)
        or layer_types != {"full_attention"}
    ):
        return False
    # `set_attn_implementation` would download any unknown name with `flash` in it as a kernel from the Hub.
    model.config._attn_implementation = NAME
    return True


def plain_implementation(model: Any) -> str:
    """Return the implementation that computes the same as the selected one, without a paged cache."""
    selected: str = model.config._attn_implementation
    return {NAME: "sdpa", "paged|eager": "eager"}.get(selected, selected)


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


def attention_function(config: Any) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Return the attention implementation that `config` selects."""
    function: Callable[..., tuple[torch.Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    return function


def paged_kv(cache: PagedKVCache, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the key and value cache of a layer, (slots, num_kv_heads, head_dim) each."""
    key_cache, value_cache = cache.layer_to_allocator[layer_idx].get_cache_for_block_table(layer_idx)
    return key_cache.flatten(0, 1), value_cache.flatten(0, 1)


def find_decoder_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find the parent and name of each decoder layer in `SUPPORTED_LAYER_CLASSES`."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer).__name__ in SUPPORTED_LAYER_CLASSES and type(layer).__module__.startswith("transformers.models.")
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayerParts:
    """Modules and constants of one decoder layer."""

    config: Any
    layer_idx: int
    num_key_value_groups: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    qkv: list[nn.Module]
    o: nn.Module
    gate_up: list[nn.Module]
    down: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    qk_norms: tuple[nn.Module, nn.Module] | None
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_silu: bool

    @classmethod
    def of(cls, layer: nn.Module) -> "DecoderLayerParts":
        """Read the parts of one of `SUPPORTED_LAYER_CLASSES`."""
        attention, mlp = layer.self_attn, layer.mlp
        config = attention.config
        return cls(
            config=config,
            layer_idx=attention.layer_idx,
            num_key_value_groups=attention.num_key_value_groups,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            sliding_window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)),
            qkv=[attention.q_proj, attention.k_proj, attention.v_proj],
            o=attention.o_proj,
            gate_up=[mlp.gate_proj, mlp.up_proj],
            down=mlp.down_proj,
            input_layernorm=layer.input_layernorm,
            post_attention_layernorm=layer.post_attention_layernorm,
            qk_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
            activation=mlp.act_fn,
            is_silu=config.hidden_act in ("silu", "swish"),
        )
