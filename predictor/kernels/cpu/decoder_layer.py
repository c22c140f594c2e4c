"""Fused decoder layers for CPU, of the architectures in `layer_table`.

RMSNorm is folded into the following GEMM, RoPE is applied to Q and K in one pass, residual adds are GEMM epilogues,
activations stay float32. For a batch of up to eight tokens, transformers' own layers spend as long on a hundred small
operations as on matrix products.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from predictor.kernels import shards, tensor_parallel
from predictor.kernels.cpu import gemm, linear, ops
from predictor.kernels.cpu.composed_linear import GatheredLinear
from predictor.kernels.cpu.gemm import LinearKernel, RMSNorm
from predictor.kernels.cpu.layer_table import DecoderLayerParts, Rotary, find_decoder_layers, is_silu
from predictor.kernels.shards import Division, Divisions
from predictor.kernels.transformers_attention import attention_function

_DIVISIONS = (
    (Division.NONE, Division.NONE),
    (Division.OUTPUTS, Division.INPUTS),
    (Division.GATHERED_OUTPUTS, Division.SPLIT_INPUTS),
)
"""Of the first and last linear layers of attention or MLP."""
MLP_CHUNK_TOKENS = 256
"""Tokens per pass through the MLP, so that its intermediate activations stay in the CPU cache."""


def fuse(model: Any) -> int:
    """Replace supported decoder layers, if kernels support their linear layers, and return how many.

    Args:
        model: on a CPU, with weights in bfloat16 or int8.
    """
    divisions, dtype = shards.divisions(model), model.dtype
    layers = [(parent, name, divisions, dtype) for parent, name in find_decoder_layers(model)]
    fused = gemm.map_in_threads(_fuse_layer, layers)
    for parent in model.modules():
        for layer, next_layer in pairwise([*parent.children(), None]):
            if isinstance(layer, DecoderLayer) and isinstance(next_layer, DecoderLayer):
                layer.cast_output_to_weight_dtype = False
    return sum(fused)


def _fuse_layer(parent: nn.Module, name: str, divisions: Divisions, dtype: torch.dtype) -> bool:
    parts = DecoderLayerParts.of(parent.get_submodule(name))
    attention, mlp = _fuse_pair(parts.qkv, parts.o, divisions), _fuse_mlp(parts, divisions, dtype)
    if attention is None or mlp is None:
        return False
    parent.register_module(name, DecoderLayer(parts, *attention, mlp, dtype))
    return True


def _fuse_mlp(parts: DecoderLayerParts, divisions: Divisions, dtype: torch.dtype) -> "GatedMLP | ExpertsMLP | None":
    norm = _rms_norm(parts.mlp_norm, parts)
    if parts.activation is None:
        return ExpertsMLP(norm, parts.mlp, dtype) if tensor_parallel.size() == 1 else None
    pair = _fuse_pair(parts.gate_up, parts.mlp.down_proj, divisions)
    return pair and GatedMLP(norm, *pair, None if is_silu(parts.activation) else parts.activation)


def _fuse_pair(inputs: list[Any], output: nn.Module, divisions: Divisions) -> tuple[LinearKernel, LinearKernel] | None:
    """Pack the first layers and the last one of attention or MLP; None if no kernels support them."""
    first, last = shards.common(divisions, inputs), shards.common(divisions, [output])
    if (first, last) not in _DIVISIONS or (first is Division.GATHERED_OUTPUTS and len(inputs) > 1):
        return None
    fused, packed = linear.fuse_linears(inputs, first), linear.fuse_linears([output], last)
    if fused is None or packed is None:
        return None
    return GatheredLinear(fused, inputs[0].out_features) if first is Division.GATHERED_OUTPUTS else fused, packed


class GatedMLP:
    """Gate and up projection, activation, and down projection.

    Args:
        norm: of the inputs.
        gate_up: fused gate and up projections.
        down: down projection.
        activation: of the gate; None: SiLU.
    """

    def __init__(
        self,
        norm: RMSNorm | None,
        gate_up: LinearKernel,
        down: LinearKernel,
        activation: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self._norm, self._gate_up, self._down, self._activation = norm, gate_up, down, activation

    def __call__(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """(tokens, features) to the same, float32; add `residual`."""
        gate_up = self._gate_up.forward(hidden_states, self._norm)
        if self._activation is None:
            return self._down.silu_and_mul(gate_up, residual=residual)
        gate, up = gate_up.chunk(2, -1)
        return self._down.forward(self._activation(gate).mul_(up), residual=residual)


class ExpertsMLP(nn.Module):
    """MLP with experts: transformers' module, of which other functions pack the linear layers and experts.

    Args:
        norm: of the inputs.
        mlp: the module.
        dtype: of its inputs.
    """

    def __init__(self, norm: RMSNorm | None, mlp: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._norm, self._dtype = norm, dtype
        self.mlp = mlp

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """(tokens, features) to the same, float32; add `residual`."""
        normalized = hidden_states if self._norm is None else self._norm(hidden_states)
        outputs = self.mlp(normalized.to(self._dtype)[None])
        # gpt-oss' returns the router's scores as well.
        states = (outputs[0] if isinstance(outputs, tuple) else outputs)[0].float()
        return states if residual is None else states.add_(residual)


class OutputScaling:
    """What happens to the outputs of attention or MLP before they are added to the residual stream.

    Args:
        norm: of the outputs.
        multiplier: their factor.
    """

    def __init__(self, norm: RMSNorm | None, multiplier: float) -> None:
        self._norm, self._multiplier = norm, multiplier

    def add(self, compute: Callable[[torch.Tensor | None], torch.Tensor], residual: torch.Tensor) -> torch.Tensor:
        """Add outputs to `residual`. `compute` makes them, and adds its argument to them."""
        if self._norm is None and self._multiplier == 1.0:
            return compute(residual)
        outputs = compute(None)
        return torch.add(residual, outputs if self._norm is None else self._norm(outputs), alpha=self._multiplier)


class DecoderLayer(nn.Module):
    """Drop-in replacement for a decoder layer.

    Args:
        parts: of the layer.
        qkv: fused q, k and v projections.
        o: output projection of attention.
        mlp: with its norm.
        dtype: of keys and values, and of the outputs of the last layer.
    """

    def __init__(
        self,
        parts: DecoderLayerParts,
        qkv: LinearKernel,
        o: LinearKernel,
        mlp: GatedMLP | ExpertsMLP,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx = parts.config, parts.layer_idx
        self.num_key_value_groups, self.is_causal = parts.num_key_value_groups, parts.is_causal
        if parts.sinks is not None:
            self.sinks = parts.sinks
        self._qkv, self._o = qkv, o
        self._mlp: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] = mlp
        self._attention_norm = _rms_norm(parts.attention_norm, parts)
        self._attention_scaling = OutputScaling(
            _rms_norm(parts.attention_output_norm, parts), parts.residual_multiplier
        )
        self._mlp_scaling = OutputScaling(_rms_norm(parts.mlp_output_norm, parts), parts.residual_multiplier)
        self._head_dim, self._rotary = parts.head_dim, parts.rotary
        self._qkv_split_sizes = _qkv_split_sizes(parts)
        self._qk_norms = _qk_norms(parts, *self._qkv_split_sizes[:2])
        self._eager_attention, self._attention_arguments = parts.eager_attention, parts.attention_arguments
        self._dtype = dtype
        self.cast_output_to_weight_dtype = True
        """False if the next layer is a `DecoderLayer` as well, which reads float32."""

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
        query, key, value = self._query_key_value(residual, batch_shape, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = attention_function(self.config, self._eager_attention)
        attn_output, _ = attention(self, query, key, value, attention_mask, **self._attention_arguments, **kwargs)
        attn_output = attn_output.reshape(residual.shape[0], -1).float()
        hidden_states = self._attention_scaling.add(
            lambda summand: self._o.forward(attn_output, residual=summand), residual
        )
        if hidden_states.shape[0] <= MLP_CHUNK_TOKENS:
            hidden_states = self._add_mlp(hidden_states)
        else:
            hidden_states = torch.cat([self._add_mlp(chunk) for chunk in hidden_states.split(MLP_CHUNK_TOKENS)])
        if self.cast_output_to_weight_dtype:
            hidden_states = hidden_states.to(self._dtype)
        return hidden_states.view(*batch_shape, -1)

    def _add_mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._mlp_scaling.add(partial(self._mlp, hidden_states), hidden_states)

    def _query_key_value(
        self, hidden_states: torch.Tensor, batch_shape: torch.Size, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project, normalize and rotate: (tokens, features) to (batch, heads, tokens, head_dim) each."""
        qkv = self._qkv.forward(hidden_states, self._attention_norm).view(*batch_shape, -1, self._head_dim)
        for normalized, norm in self._qk_norms:
            states = qkv[:, :, normalized]
            norm.apply_(states if norm.weight.dim() > 1 else states.flatten(2))
        num_rotated_heads = 0 if self._rotary is None else sum(self._qkv_split_sizes[:2])
        converted = _rotate_and_convert(qkv, position_embeddings, self._rotary, num_rotated_heads, self._dtype)
        query, key, value = converted.transpose(1, 2).split_with_sizes(self._qkv_split_sizes, 1)
        return query, key, value


def _rms_norm(norm: nn.Module | None, parts: DecoderLayerParts) -> RMSNorm | None:
    return None if norm is None else RMSNorm(*_weight_and_epsilon(norm, parts))


def _weight_and_epsilon(norm: Any, parts: DecoderLayerParts) -> tuple[torch.Tensor, float]:
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return norm.weight.float() + parts.norm_offset, epsilon


def _qkv_split_sizes(parts: DecoderLayerParts) -> list[int]:
    """Return this rank's numbers of query, key and value heads."""
    if len(parts.qkv) > 1:
        return [len(shards.local(layer.weight)) // parts.head_dim for layer in parts.qkv]
    # Of a fused projection each rank gets all outputs.
    [qkv] = parts.qkv
    num_kv_heads = qkv.out_features // parts.head_dim // (parts.num_key_value_groups + 2)
    return [num_kv_heads * parts.num_key_value_groups, num_kv_heads, num_kv_heads]


def _qk_norms(parts: DecoderLayerParts, num_heads: int, num_kv_heads: int) -> list[tuple[slice, RMSNorm]]:
    """Return the norms of queries and keys, each with the heads that it applies to.

    Norms of heads are joined into one, with a weight (heads, head_dim); norms of all heads have a weight (features,).
    """
    if parts.qk_norms is None:
        return []
    (q_weight, epsilon), (k_weight, _) = (_weight_and_epsilon(norm, parts) for norm in parts.qk_norms)
    if len(q_weight) == parts.head_dim:
        weight = torch.cat((q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)))
        return [(slice(num_heads + num_kv_heads), RMSNorm(weight, epsilon))]
    keys = slice(num_heads, num_heads + num_kv_heads)
    return [(slice(num_heads), RMSNorm(q_weight, epsilon)), (keys, RMSNorm(k_weight, epsilon))]


def _rotate_and_convert(
    heads: torch.Tensor, position_embeddings: Any, rotary: Rotary | None, num_rotated_heads: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rotate the first heads and convert all: (batch, tokens, heads, head_dim); `heads` is overwritten."""
    if rotary is None:
        return heads.to(dtype)
    if ops.cpu_isa is None or dtype != torch.bfloat16 or rotary is Rotary.INTERLEAVED:
        _rotate(heads[:, :, :num_rotated_heads], position_embeddings, rotary)
        return heads.to(dtype)
    batch, tokens = heads.shape[:2]
    cos, sin = (
        states.expand(batch, tokens, 1, states.shape[-1]).reshape(batch * tokens, -1)
        for states in _rotary_cos_sin(position_embeddings, rotary)
    )
    return ops.rotate_to_bf16(heads.flatten(0, 1), cos, sin, num_rotated_heads).view(heads.shape)


def _rotate(states: torch.Tensor, position_embeddings: Any, rotary: Rotary) -> None:
    """Rotate the first features of each head in place, as many as are rotated: (batch, tokens, heads, head_dim)."""
    cos, sin = _rotary_cos_sin(position_embeddings, rotary)
    states = states[..., : cos.shape[-1]]
    if rotary is Rotary.INTERLEAVED:
        swapped = states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = states.roll(cos.shape[-1] // 2, -1)
    states.mul_(cos).addcmul_(swapped, sin)


def _rotary_cos_sin(position_embeddings: Any, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos, and sin with the sign of each feature's partner, (batch, tokens, 1, rotated features) in float32.

    The result is kept on the step's `cos` tensor, which all layers share.
    """
    cos, sin = position_embeddings
    cached: tuple[torch.Tensor, torch.Tensor] | None = getattr(cos, "rotary_cos_sin", None)
    if cached is None:
        half = sin.shape[-1] // (1 if rotary is Rotary.HALVES_SHARED else 2)
        pair_dim = -1 if rotary is Rotary.INTERLEAVED else -2
        cos_half, sin_half = (states.unsqueeze(2)[..., :half].float() for states in (cos, sin))
        cached = (
            torch.stack((cos_half, cos_half), pair_dim).flatten(-2),
            torch.stack((-sin_half, sin_half), pair_dim).flatten(-2),
        )
        cos.rotary_cos_sin = cached
    return cached
