"""Decoder layers of Llama's kind on a CPU: the same sums in a third of the operations, and float32 between layers.

For a token or eight, transformers' own layer spends as long on a hundred small operations as on its matrix products.
Here a norm's factor joins the scale of the product after it, queries and keys turn together, sums go onto what they are
added to, and nothing is rounded to bfloat16 but what a kernel reads.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from predictor.kernels.cpu import gemm, linear
from predictor.kernels.cpu.gemm import Kernel, Norm

KINDS = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
"""transformers' layers that compute what is computed here."""

_AT_ONCE = 256
"""Tokens that go through the feed-forward network together: what lies between its products stays in the cache."""


def fuse(model: nn.Module) -> int:
    """Put a `DecoderLayer` in place of each layer of one of `KINDS` whose products have kernels; returns how many.

    Args:
        model: on a CPU, with weights in bfloat16 or rounded to int8.
    """
    known = [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer).__name__ in KINDS and type(layer).__module__.startswith("transformers.models.")
    ]
    fused = gemm.on_all_cores(_fuse, known)
    for parent in model.modules():
        for layer, following in pairwise([*parent.children(), None]):
            if isinstance(layer, DecoderLayer) and isinstance(following, DecoderLayer):
                layer.rounds = False
    return sum(fused)


def _fuse(parent: nn.Module, name: str) -> bool:
    layer = parent.get_submodule(name)
    attention, mlp = layer.self_attn, layer.mlp
    qkv = linear.join([attention.q_proj, attention.k_proj, attention.v_proj])
    o = linear.join([attention.o_proj])
    gate_up = linear.join([mlp.gate_proj, mlp.up_proj])
    down = linear.join([mlp.down_proj])
    if qkv is None or o is None or gate_up is None or down is None:
        return False
    parent.register_module(name, DecoderLayer(layer, qkv, o, gate_up, down))
    return True


class DecoderLayer(nn.Module):  # type: ignore[misc]
    """Computes what `layer` does.

    Args:
        layer: of one of `KINDS`.
        qkv: its projections to queries, keys and values.
        o: the one of what was attended to.
        gate_up: those into the feed-forward network.
        down: the one out of it.
    """

    def __init__(self, layer: nn.Module, qkv: Kernel, o: Kernel, gate_up: Kernel, down: Kernel) -> None:
        super().__init__()
        attention = layer.self_attn
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.num_key_value_groups, self.is_causal = attention.num_key_value_groups, True
        self._qkv, self._o, self._gate_up, self._down = qkv, o, gate_up, down
        self._before, self._after = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._activation = layer.mlp.act_fn
        self._gated = self.config.hidden_act in ("silu", "swish")
        self._size = attention.head_dim
        keys = attention.k_proj.out_features // self._size
        self._heads = [attention.q_proj.out_features // self._size, keys, keys]
        self._norm_of_heads = _norm_of_heads(attention, *self._heads[:2])
        self._format = layer.input_layernorm.weight.dtype
        self.rounds = True
        """Whether what comes out has the format of the weights, and not float32: the next layer is not one of these."""
        self._options = {
            "scaling": attention.scaling,
            "dropout": 0.0,
            "sliding_window": getattr(attention, "sliding_window", getattr(self.config, "sliding_window", None)),
        }

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> torch.Tensor:
        """(batch, tokens, features) to the same; arguments as those of transformers' layers."""
        rows = hidden_states.float().flatten(0, 1)
        heads = self._qkv.rows(rows, self._before)
        heads = heads.view(*hidden_states.shape[:2], -1, self._size)
        turned = heads[:, :, : sum(self._heads[:2])]
        if self._norm_of_heads is not None:
            turned.mul_(self._norm_of_heads.gain(turned)).mul_(self._norm_of_heads.weight)
        cos, sin = _turns(position_embeddings)
        swapped = turned.roll(self._size // 2, -1)
        turned.mul_(cos).addcmul_(swapped, sin)
        query, key, value = heads.to(self._format).transpose(1, 2).split(self._heads, 1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        found, _ = attend(self, query, key, value, attention_mask, **self._options, **others)
        rows = self._o.rows(found.reshape(len(rows), -1).float(), onto=rows)
        parts = [self._feed_forward(part) for part in rows.split(_AT_ONCE)]
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (rows.to(self._format) if self.rounds else rows).view(*hidden_states.shape[:2], -1)

    def _feed_forward(self, rows: torch.Tensor) -> torch.Tensor:
        both = self._gate_up.rows(rows, self._after)
        if self._gated:
            return self._down.gated(both, onto=rows)
        gate, up = both.chunk(2, -1)
        return self._down.rows(self._activation(gate).mul_(up), onto=rows)


def _norm(norm: nn.Module) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon)


def _norm_of_heads(attention: nn.Module, queries: int, keys: int) -> Norm | None:
    if not hasattr(attention, "q_norm"):
        return None
    norms = attention.q_norm.weight.expand(queries, -1), attention.k_norm.weight.expand(keys, -1)
    return Norm(torch.cat(norms), attention.q_norm.variance_epsilon)


_last: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None


def _turns(position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines, and sines whose first half is negative, (batch, tokens, 1, head size); once for all layers of a step."""
    global _last
    cos, sin = position_embeddings
    if _last is None or _last[0] is not cos:
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        _last = cos, (cos.float().unsqueeze(2), signed.float().unsqueeze(2))
    return _last[1]
