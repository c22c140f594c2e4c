"""Fused Llama-style decoder layers for CPU.

RMSNorm is folded into the following GEMM, RoPE is applied to Q and K in one pass, residual adds are GEMM epilogues,
activations stay float32. For a batch of up to eight tokens, transformers' own layers spend as long on a hundred small
operations as on matrix products.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from predictor.kernels import shards
from predictor.kernels.cpu import gemm, linear
from predictor.kernels.cpu.gemm import LinearKernel, RMSNorm
from predictor.kernels.shards import Division, Divisions
from predictor.kernels.transformers_attention import DecoderLayerParts, attention_function, find_decoder_layers

MLP_CHUNK_TOKENS = 256
"""Tokens per pass through the MLP, so that its intermediate activations stay in the CPU cache."""


def fuse(model: nn.Module) -> int:
    """Replace supported decoder layers, if kernels support their linear layers, and return how many.

    Args:
        model: on a CPU, with weights in bfloat16 or int8.
    """
    divisions = shards.divisions(model)
    fused = gemm.map_in_threads(_fuse_layer, [(parent, name, divisions) for parent, name in find_decoder_layers(model)])
    for parent in model.modules():
        for layer, next_layer in pairwise([*parent.children(), None]):
            if isinstance(layer, DecoderLayer) and isinstance(next_layer, DecoderLayer):
                layer.cast_output_to_weight_dtype = False
    return sum(fused)


def _fuse_layer(parent: nn.Module, name: str, divisions: Divisions) -> bool:
    parts = DecoderLayerParts.of(parent.get_submodule(name))
    groups = (parts.qkv, [parts.o], parts.gate_up, [parts.down])
    common = [shards.common(divisions, layers) for layers in groups]
    if common not in ([Division.NONE] * 4, [Division.OUTPUTS, Division.INPUTS] * 2):
        return False
    qkv, o, gate_up, down = map(linear.fuse_linears, groups, common)
    if qkv is None or o is None or gate_up is None or down is None:
        return False
    parent.register_module(name, DecoderLayer(parts, qkv, o, gate_up, down))
    return True


class DecoderLayer(nn.Module):
    """Drop-in replacement for a decoder layer.

    Args:
        parts: of the layer.
        qkv: fused q, k and v projections.
        o: output projection of attention.
        gate_up: fused gate and up projections.
        down: down projection.
    """

    def __init__(
        self, parts: DecoderLayerParts, qkv: LinearKernel, o: LinearKernel, gate_up: LinearKernel, down: LinearKernel
    ) -> None:
        super().__init__()
        self.config, self.layer_idx = parts.config, parts.layer_idx
        self.num_key_value_groups, self.is_causal = parts.num_key_value_groups, True
        self._qkv, self._o, self._gate_up, self._down = qkv, o, gate_up, down
        self._input_layernorm = _rms_norm(parts.input_layernorm)
        self._post_attention_layernorm = _rms_norm(parts.post_attention_layernorm)
        self._activation, self._is_silu = parts.activation, parts.is_silu
        self._head_dim = parts.head_dim
        self._qkv_split_sizes = [len(shards.local(layer.weight)) // parts.head_dim for layer in parts.qkv]
        self._qk_norm = _qk_norm(parts.qk_norms, *self._qkv_split_sizes[:2])
        self._weight_dtype = parts.input_layernorm.weight.dtype
        self.cast_output_to_weight_dtype = True
        """False if the next layer is a `DecoderLayer` as well, which reads float32."""
        self._attention_kwargs = {"scaling": parts.scaling, "dropout": 0.0, "sliding_window": parts.sliding_window}

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(batch, tokens, features) to the same; arguments as those of transformers' layers."""
        batch_shape = hidden_states.shape[:2]
        residual = hidden_states.float().flatten(0, 1)
        qkv = self._qkv.forward(residual, self._input_layernorm).view(*batch_shape, -1, self._head_dim)
        qk = qkv[:, :, : sum(self._qkv_split_sizes[:2])]
        if self._qk_norm is not None:
            qk.mul_(self._qk_norm.inverse_rms(qk)).mul_(self._qk_norm.weight)
        cos, sin = _rotary_cos_sin(position_embeddings)
        rotated = qk.roll(self._head_dim // 2, -1)
        qk.mul_(cos).addcmul_(rotated, sin)
        query, key, value = qkv.to(self._weight_dtype).transpose(1, 2).split(self._qkv_split_sizes, 1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = attention_function(self.config)
        attn_output, _ = attention(self, query, key, value, attention_mask, **self._attention_kwargs, **kwargs)
        hidden_states = self._o.forward(attn_output.reshape(len(residual), -1).float(), residual=residual)
        chunks = [self._mlp(chunk) for chunk in hidden_states.split(MLP_CHUNK_TOKENS)]
        hidden_states = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        if self.cast_output_to_weight_dtype:
            hidden_states = hidden_states.to(self._weight_dtype)
        return hidden_states.view(*batch_shape, -1)

    def _mlp(self, residual: torch.Tensor) -> torch.Tensor:
        gate_up = self._gate_up.forward(residual, self._post_attention_layernorm)
        if self._is_silu:
            return self._down.silu_and_mul(gate_up, residual=residual)
        gate, up = gate_up.chunk(2, -1)
        return self._down.forward(self._activation(gate).mul_(up), residual=residual)


def _rms_norm(norm: nn.Module) -> RMSNorm:
    return RMSNorm(norm.weight, norm.variance_epsilon)


def _qk_norm(norms: tuple[nn.Module, nn.Module] | None, num_heads: int, num_kv_heads: int) -> RMSNorm | None:
    """Join the norms of query and key heads (Qwen3) into one."""
    if norms is None:
        return None
    q_norm, k_norm = norms
    weights = q_norm.weight.expand(num_heads, -1), k_norm.weight.expand(num_kv_heads, -1)
    return RMSNorm(torch.cat(weights), q_norm.variance_epsilon)


def _rotary_cos_sin(position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos, and sin with the first half negated, (batch, tokens, 1, head_dim) in float32.

    The result is kept on the step's `cos` tensor, which all layers share.
    """
    cos, sin = position_embeddings
    cached: tuple[torch.Tensor, torch.Tensor] | None = getattr(cos, "rotary_cos_sin", None)
    if cached is None:
        half = sin.shape[-1] // 2
        signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        cached = cos.float().unsqueeze(2), signed_sin.float().unsqueeze(2)
        cos.rotary_cos_sin = cached
    return cached
