"""Fused decoder layers, against transformers' own."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from predictor.kernels.cpu import decoder_layer, gemm, linear

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = torch.randint(0, 500, (2, 300), generator=torch.Generator().manual_seed(1))
"""More than `MLP_CHUNK_TOKENS`."""


@pytest.fixture(autouse=True)
def _inference() -> None:
    torch.set_grad_enabled(False)


def make_model(model_type: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    """A small model in which every weight affects the logits."""
    torch.manual_seed(7)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "head_dim": 32 if "3" in model_type else 16,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = AutoConfig.for_model(model_type, vocab_size=500, **sizes, **heads, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, weights in model.named_parameters():
        weights.copy_(torch.rand_like(weights) + 0.5 if "norm" in name else torch.randn_like(weights) * 0.15)
    return model


def relative_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error over all logits."""
    return float((logits.float() - exact).norm() / exact.norm())


@pytest.mark.usefixtures("bf16_kernel")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fuse_is_as_accurate_as_the_replaced_layers(model_type: str) -> None:
    model = make_model(model_type)
    exact = copy.deepcopy(model).float()(TOKENS).logits
    plain_error = relative_error(model(TOKENS).logits, exact)
    assert decoder_layer.fuse(model) == 3
    linear.pack_linear_layers(model)
    assert relative_error(model(TOKENS).logits, exact) < plain_error * 1.05 < 0.05


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_decoder_layer_reads_its_kv_cache(model_type: str) -> None:
    model = make_model(model_type)
    decoder_layer.fuse(model)
    cached = model(TOKENS[:, :299], use_cache=True).past_key_values
    last = model(TOKENS[:, 299:], past_key_values=cached).logits[:, -1]
    assert relative_error(last, model(TOKENS).logits[:, -1].float()) < 0.01


@pytest.mark.parametrize("activation", ["swish", "gelu", "relu"])
def test_decoder_layer_applies_the_configured_activation(activation: str) -> None:
    model = make_model("llama", hidden_act=activation)
    exact = copy.deepcopy(model).float()(TOKENS).logits
    assert decoder_layer.fuse(model) == 3
    assert relative_error(model(TOKENS).logits, exact) < 0.05
    quantized = quantize_decoder(make_model("llama", hidden_act=activation))
    assert decoder_layer.fuse(quantized) == 3
    assert relative_error(quantized(TOKENS).logits, exact) < 0.1


@pytest.mark.usefixtures("int8_kernel")
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_int8_decoder_layer_is_independent_of_the_batch(activation: str) -> None:
    model = quantize_decoder(make_model("qwen2", hidden_act=activation))
    exact = make_model("qwen2", hidden_act=activation).float()(TOKENS).logits
    assert decoder_layer.fuse(model) == 3
    linear.pack_linear_layers(model)
    together = model(TOKENS).logits
    assert relative_error(together, exact) < 0.1
    for row in range(2):
        torch.testing.assert_close(model(TOKENS[row : row + 1]).logits[0], together[row], rtol=0, atol=0)


@pytest.mark.parametrize("bf16_kernel", ["avx512", "avx512_bf16", "amx"], indirect=True)
@pytest.mark.usefixtures("bf16_kernel")
def test_bf16_decoder_layer_is_independent_of_the_batch() -> None:
    model = make_model("qwen2")
    assert decoder_layer.fuse(model) == 3
    linear.pack_linear_layers(model, model.lm_head)
    together = model(TOKENS).logits
    for row in range(2):
        assert torch.equal(model(TOKENS[row : row + 1]).logits[0], together[row])


def quantize_decoder(model: Any) -> Any:
    """Quantize all linear layers but the LM head."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                parent.register_module(name, quantize_linear(layer))
    return model


def quantize_linear(layer: nn.Linear) -> linear.Int8Linear:
    weight, scale = gemm.quantize_per_channel_int8(layer.weight)
    bias = {} if layer.bias is None else {"bias": layer.bias}
    quantized = linear.Int8Linear(layer.in_features, layer.out_features, bias["bias"].dtype if bias else None)
    quantized.load_state_dict({"weight": weight, "scale": scale} | bias)
    return quantized


def test_fuse_leaves_float32_models_unchanged() -> None:
    assert decoder_layer.fuse(make_model("llama", torch.float32)) == 0


def test_fuse_leaves_unsupported_architectures_unchanged() -> None:
    assert decoder_layer.fuse(make_model("gemma")) == 0


def test_fuse_skips_a_layer_with_an_unsupported_linear() -> None:
    model = make_model("llama")
    exact = copy.deepcopy(model).float()(TOKENS).logits
    layer = model.model.layers[1]
    layer.mlp.down_proj.__class__ = type("OtherLinear", (nn.Linear,), {})
    assert decoder_layer.fuse(model) == 2
    assert model.model.layers[1] is layer
    assert relative_error(model(TOKENS).logits, exact) < 0.05
