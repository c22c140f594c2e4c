"""Fused decoder layers, against transformers' own."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from predictor.kernels.cpu import decoder_layer, gemm, linear

KINDS = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = torch.randint(0, 500, (2, 300), generator=torch.Generator().manual_seed(1))
"""More than go through a layer at once."""


@pytest.fixture(autouse=True)
def _inference() -> None:
    torch.set_grad_enabled(False)


def made(kind: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    """A model with weights and norms that all have a say in what comes out."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "head_dim": 32 if "3" in kind else 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = AutoConfig.for_model(kind, vocab_size=500, **sizes, **heads, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, weights in model.named_parameters():
        weights.copy_(torch.rand_like(weights) + 0.5 if "norm" in name else torch.randn_like(weights) * 0.15)
    return model


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Relative, over all logits."""
    return float((found.float() - right).norm() / right.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_errs_no_more_than_the_layers_it_replaces(kind: str) -> None:
    model = made(kind)
    right = copy.deepcopy(model).float()(TOKENS).logits
    of_plain = error(model(TOKENS).logits, right)
    assert decoder_layer.fuse(model) == 3
    linear.pack(model)
    assert error(model(TOKENS).logits, right) < of_plain * 1.05 < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_reads_its_cache(kind: str) -> None:
    model = made(kind)
    decoder_layer.fuse(model)
    cached = model(TOKENS[:, :299], use_cache=True).past_key_values
    last = model(TOKENS[:, 299:], past_key_values=cached).logits[:, -1]
    assert error(last, model(TOKENS).logits[:, -1].float()) < 0.01


@pytest.mark.parametrize("activation", ["swish", "gelu", "relu"])
def test_computes_the_activation_that_the_model_has(activation: str) -> None:
    model = made("llama", hidden_act=activation)
    right = copy.deepcopy(model).float()(TOKENS).logits
    assert decoder_layer.fuse(model) == 3
    assert error(model(TOKENS).logits, right) < 0.05
    rounded = _all_rounded(made("llama", hidden_act=activation))
    assert decoder_layer.fuse(rounded) == 3
    assert error(rounded(TOKENS).logits, right) < 0.1


@pytest.mark.usefixtures("int8_kernel")
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_token_rounded_to_int8_does_not_know_its_neighbours(activation: str) -> None:
    model = _all_rounded(made("qwen2", hidden_act=activation))
    right = made("qwen2", hidden_act=activation).float()(TOKENS).logits
    assert decoder_layer.fuse(model) == 3
    linear.pack(model)
    together = model(TOKENS).logits
    assert error(together, right) < 0.1
    for row in range(2):
        torch.testing.assert_close(model(TOKENS[row : row + 1]).logits[0], together[row], rtol=0, atol=0)


def _all_rounded(model: Any) -> Any:
    """All but what makes the logits."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                parent.register_module(name, _rounded(layer))
    return model


def _rounded(layer: nn.Linear) -> linear.Int8Linear:
    weight, scale = gemm.to_int8(layer.weight)
    bias = {} if layer.bias is None else {"bias": layer.bias}
    rounded = linear.Int8Linear(layer.in_features, layer.out_features, bias["bias"].dtype if bias else None)
    rounded.load_state_dict({"weight": weight, "scale": scale} | bias)
    return rounded


def test_float32_stays_as_transformers_computes_it() -> None:
    assert decoder_layer.fuse(made("llama", torch.float32)) == 0


def test_layers_of_another_kind_stay() -> None:
    assert decoder_layer.fuse(made("gemma")) == 0


def test_a_layer_with_a_product_that_has_no_kernel_stays_whole() -> None:
    model = made("llama")
    right = copy.deepcopy(model).float()(TOKENS).logits
    layer = model.model.layers[1]
    layer.mlp.down_proj.__class__ = type("OtherLinear", (nn.Linear,), {})
    assert decoder_layer.fuse(model) == 2
    assert model.model.layers[1] is layer
    assert error(model(TOKENS).logits, right) < 0.05
