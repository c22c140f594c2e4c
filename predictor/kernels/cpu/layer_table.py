"""Fence around transformers' decoder layers and experts, as of transformers 5.23: what they consist of.

A new architecture is an entry of `LAYERS`. Its experts need none: their class says how it keeps their matrices.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe


class Rotary(Enum):
    """How features of a head are paired for rotation. As many are rotated as `cos` and `sin` have."""

    HALVES = "the first half with the second"
    HALVES_SHARED = "the first half with the second; cos and sin have the features of one half"
    INTERLEAVED = "each with its neighbour"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStructure:
    """Names of a decoder layer's modules, and what their forward functions do that names do not say."""

    attention_norm: str | None = "input_layernorm"
    """RMSNorm of the inputs of attention."""
    attention_output_norm: str | None = None
    """RMSNorm of the outputs of attention, before they are added to the residual stream."""
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    norm_offset: float = 0.0
    """Added to the weights of all norms."""
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    """Of an MLP without experts. One with experts is a module that is called as it is."""
    activation: str = "act_fn"
    """Of the MLP's gate."""
    rotary: Rotary = Rotary.HALVES
    has_rotary: Callable[[Any], bool] = lambda _: True
    """Whether an attention module rotates queries and keys."""
    window: Callable[[Any], int | None] = lambda attention: getattr(attention, "sliding_window", None)
    """The keys that an attention module's queries attend to; None: all."""
    attention_arguments: Mapping[str, str] = field(default_factory=dict)
    """Further arguments of the attention function, and the attention module's attributes that hold them."""


def _window_of_config(attention: Any) -> int | None:
    window: int | None = getattr(attention.config, "sliding_window", None)
    return window


_PRE_NORM = LayerStructure()
_OUTPUT_NORM = LayerStructure(
    attention_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_output_norm="post_feedforward_layernorm",
)
_GEMMA_NORMS: dict[str, Any] = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
    "norm_offset": 1.0,
}
_GLM_MLP: dict[str, Any] = {"gate_up": ("gate_up_proj",), "activation": "activation_fn", "rotary": Rotary.INTERLEAVED}

LAYERS: dict[str, LayerStructure] = {
    "Exaone4DecoderLayer": replace(
        _OUTPUT_NORM,
        has_rotary=lambda attention: attention.sliding_window is None or attention.is_sliding,
        window=lambda attention: attention.sliding_window if attention.is_sliding else None,
    ),
    "GemmaDecoderLayer": LayerStructure(norm_offset=1.0),
    "Gemma2DecoderLayer": LayerStructure(**_GEMMA_NORMS, attention_arguments={"softcap": "attn_logit_softcapping"}),
    "Gemma3DecoderLayer": LayerStructure(**_GEMMA_NORMS),
    "GlmDecoderLayer": LayerStructure(**_GLM_MLP),
    "Glm4DecoderLayer": LayerStructure(
        **_GLM_MLP, attention_output_norm="post_self_attn_layernorm", mlp_output_norm="post_mlp_layernorm"
    ),
    "GptOssDecoderLayer": LayerStructure(rotary=Rotary.HALVES_SHARED, attention_arguments={"s_aux": "sinks"}),
    "GraniteDecoderLayer": _PRE_NORM,
    "LlamaDecoderLayer": _PRE_NORM,
    "MistralDecoderLayer": LayerStructure(window=_window_of_config),
    "MixtralDecoderLayer": LayerStructure(window=_window_of_config),
    "Olmo2DecoderLayer": _OUTPUT_NORM,
    "Olmo3DecoderLayer": _OUTPUT_NORM,
    "Phi3DecoderLayer": LayerStructure(
        qkv=("qkv_proj",), gate_up=("gate_up_proj",), activation="activation_fn", window=_window_of_config
    ),
    "Qwen2DecoderLayer": _PRE_NORM,
    "Qwen2MoeDecoderLayer": _PRE_NORM,
    "Qwen3DecoderLayer": _PRE_NORM,
    "Qwen3MoeDecoderLayer": _PRE_NORM,
    "SmolLM3DecoderLayer": LayerStructure(has_rotary=lambda attention: bool(attention.use_rope)),
}
"""By the names of the layers' classes."""


def find_decoder_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find the parent and name of each decoder layer in `LAYERS`."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer).__name__ in LAYERS and type(layer).__module__.startswith("transformers.models.")
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayerParts:
    """Modules and constants of one decoder layer."""

    config: Any
    layer_idx: int
    num_key_value_groups: int
    is_causal: bool
    head_dim: int
    eager_attention: Callable[..., tuple[torch.Tensor, Any]]
    """The attention function of the layer's module, which is registered nowhere."""
    attention_arguments: Mapping[str, Any]
    sinks: torch.Tensor | None
    rotary: Rotary | None
    """None: queries and keys are not rotated."""
    qkv: list[Any]
    o: nn.Module
    mlp: Any
    gate_up: list[Any]
    """Empty if the MLP has experts."""
    attention_norm: nn.Module | None
    attention_output_norm: nn.Module | None
    mlp_norm: nn.Module | None
    mlp_output_norm: nn.Module | None
    norm_offset: float
    qk_norms: tuple[nn.Module, nn.Module] | None
    """Of each head, or of all queries and all keys of a token, as the sizes of their weights say."""
    residual_multiplier: float
    """Factor of what attention and MLP add to the residual stream."""
    activation: Callable[[torch.Tensor], torch.Tensor] | None

    @classmethod
    def of(cls, layer: nn.Module) -> "DecoderLayerParts":
        """Read the parts of a layer in `LAYERS`."""
        structure = LAYERS[type(layer).__name__]
        attention, mlp = layer.self_attn, layer.mlp
        has_experts = any(are_experts(module) for module in mlp.children())
        arguments = {name: getattr(attention, attribute) for name, attribute in structure.attention_arguments.items()}
        scores = {"scaling": attention.scaling, "sliding_window": structure.window(attention), "dropout": 0.0}
        norms = {
            name: getattr(layer, attribute) if (attribute := getattr(structure, name)) else None
            for name in ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")
        }
        return cls(
            config=attention.config,
            layer_idx=attention.layer_idx,
            num_key_value_groups=attention.num_key_value_groups,
            is_causal=attention.is_causal,
            head_dim=attention.head_dim,
            eager_attention=sys.modules[type(attention).__module__].eager_attention_forward,
            attention_arguments=scores | arguments,
            sinks=getattr(attention, "sinks", None),
            rotary=structure.rotary if structure.has_rotary(attention) else None,
            qkv=[getattr(attention, name) for name in structure.qkv],
            o=attention.o_proj,
            mlp=mlp,
            gate_up=[] if has_experts else [getattr(mlp, name) for name in structure.gate_up],
            **norms,
            norm_offset=structure.norm_offset,
            qk_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
            residual_multiplier=getattr(layer, "residual_multiplier", 1.0),
            activation=None if has_experts else getattr(mlp, structure.activation),
        )


def is_silu(activation: Any) -> bool:
    """Whether an activation of transformers is SiLU."""
    return isinstance(activation, (nn.SiLU, SiLUActivation))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsParts:
    """How the experts of a layer keep and use their matrices, `gate_up_proj` and `down_proj`."""

    is_transposed: bool
    """Whether a matrix is (experts, in_features, out_features)."""
    has_bias: bool
    """Whether there are biases (experts, out_features), `gate_up_proj_bias` and `down_proj_bias`."""
    apply_gate: Callable[[torch.Tensor], torch.Tensor]
    """Gate and up to the inputs of the down projection."""
    is_silu: bool
    """Whether `apply_gate` is silu(gate) * up, of halves."""

    @classmethod
    def of(cls, experts: Any) -> "ExpertsParts":
        """Read the parts of experts."""
        has_default_gate = type(experts)._apply_gate is moe._default_apply_gate
        return cls(
            is_transposed=experts.is_transposed,
            has_bias=experts.has_bias,
            apply_gate=experts._apply_gate,
            is_silu=has_default_gate and is_silu(experts.act_fn),
        )


def are_experts(module: Any) -> bool:
    """Whether a module is transformers' experts, with a gate, in the form of `ExpertsParts`."""
    return getattr(module, "has_gate", False) and not getattr(module, "has_post_expert_norm", True)


def is_router(module: nn.Module) -> bool:
    """Whether a module chooses experts, and computes each token by itself."""
    return type(module).__name__.endswith("TopKRouter")
