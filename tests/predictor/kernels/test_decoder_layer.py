"""Fused decoder layers, against transformers' own."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from devtools import architectures
from devtools.architectures import CASES
from predictor.kernels.cpu import decoder_layer, experts, linear
from predictor.kernels.cpu.layer_table import LAYERS, are_experts
from tests.predictor.kernels.products import by, quantize_linear

FUSED_CASES = tuple(name for name, case in CASES.items() if architectures.has_fused_layers(case))
TOKENS = torch.randint(0, 500, (2, 300), generator=torch.Generator().manual_seed(1))
"""More than `MLP_CHUNK_TOKENS`."""
FEW_TOKENS = TOKENS[:, :40]
"""More than the windows of `CASES`."""


@pytest.fixture(autouse=True)
def _inference() -> None:
    torch.set_grad_enabled(False)


def make_model(name: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    """A small model in which every weight affects the logits."""
    torch.manual_seed(7)
    case = CASES[name]
    config = dataclasses.replace(case, fields=case.fields | overrides).config()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    structure = LAYERS.get(architectures.decoder_layer_class(case))
    smallest_norm = 0.5 - (structure.norm_offset if structure else 0.0)
    for name, weights in model.named_parameters():
        weights.copy_(torch.rand_like(weights) + smallest_norm if "norm" in name else torch.randn_like(weights) * 0.15)
    return model


def relative_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error over all logits."""
    return float((logits.float() - exact).norm() / exact.norm())


def typical_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Median over tokens of the relative error: rounding changes the experts of a few tokens."""
    return float(((logits.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


def error_function(name: str) -> Callable[[torch.Tensor, torch.Tensor], float]:
    return typical_error if any("num_experts_per_tok" in field for field in CASES[name].fields) else relative_error


def test_every_entry_of_the_table_has_a_case() -> None:
    assert {architectures.decoder_layer_class(CASES[name]) for name in FUSED_CASES} == LAYERS.keys()


@pytest.mark.parametrize("name", FUSED_CASES)
def test_fuse_is_as_accurate_as_the_replaced_layers(name: str) -> None:
    model, error = make_model(name), error_function(name)
    exact = copy.deepcopy(model).float()(FEW_TOKENS).logits
    plain_error = error(model(FEW_TOKENS).logits, exact)
    assert decoder_layer.fuse(model) == model.config.num_hidden_layers
    linear.pack_linear_layers(model)
    experts.pack(model)
    logits = model(FEW_TOKENS).logits
    assert error(logits, exact) < plain_error * 1.05 < 0.05
    cached = model(FEW_TOKENS[:, :-1], use_cache=True).past_key_values
    last = model(FEW_TOKENS[:, -1:], past_key_values=cached).logits[:, -1]
    assert error(last, logits[:, -1].float()) < 0.01


@pytest.mark.parametrize("name", FUSED_CASES)
def test_int8_decoder_layer_is_independent_of_the_batch(name: str) -> None:
    check_int8_rows(name)


@pytest.mark.usefixtures("int8_kernel")
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_int8_kernels_compute_decoder_layers_independently_of_the_batch(activation: str) -> None:
    check_int8_rows("qwen2", hidden_act=activation)


def check_int8_rows(name: str, **overrides: Any) -> None:
    """Check a batch of two sequences against float32 and, bit by bit, against each sequence alone."""
    model = quantize_decoder(make_model(name, **overrides))
    exact = make_model(name, **overrides).float()(FEW_TOKENS).logits
    quantized = [module for module in model.modules() if are_experts(module)]
    assert decoder_layer.fuse(model) == model.config.num_hidden_layers
    linear.pack_linear_layers(model)
    experts.pack(model, quantized)
    assert not any(are_experts(module) for module in model.modules())
    together = model(FEW_TOKENS).logits
    assert error_function(name)(together, exact) < 0.1
    for row in range(2):
        torch.testing.assert_close(model(FEW_TOKENS[row : row + 1]).logits[0], together[row], rtol=0, atol=0)


def test_decoder_layer_splits_long_inputs_to_the_mlp() -> None:
    model = make_model("llama")
    exact = copy.deepcopy(model).float()(TOKENS).logits
    assert decoder_layer.fuse(model) == 3
    assert relative_error(model(TOKENS).logits, exact) < 0.05


@pytest.mark.parametrize("activation", ["swish", "gelu", "relu"])
def test_decoder_layer_applies_the_configured_activation(activation: str) -> None:
    model = make_model("llama", hidden_act=activation)
    exact = copy.deepcopy(model).float()(TOKENS).logits
    assert decoder_layer.fuse(model) == 3
    assert relative_error(model(TOKENS).logits, exact) < 0.05
    quantized = quantize_decoder(make_model("llama", hidden_act=activation))
    assert decoder_layer.fuse(quantized) == 3
    assert relative_error(quantized(TOKENS).logits, exact) < 0.1


@by("bf16_kernel", "avx512", "avx512_bf16", "amx")
def test_bf16_kernels_compute_decoder_layers_independently_of_the_batch() -> None:
    model = make_model("qwen2")
    exact = copy.deepcopy(model).float()(FEW_TOKENS).logits
    plain_error = relative_error(model(FEW_TOKENS).logits, exact)
    assert decoder_layer.fuse(model) == model.config.num_hidden_layers
    linear.pack_linear_layers(model, model.lm_head)
    together = model(FEW_TOKENS).logits
    assert relative_error(together, exact) < plain_error * 1.05
    for row in range(2):
        assert torch.equal(model(FEW_TOKENS[row : row + 1]).logits[0], together[row])


def quantize_decoder(model: Any) -> Any:
    """Quantize all linear layers but the LM head."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                parent.register_module(name, quantize_linear(layer))
    return model


def test_fuse_leaves_float32_models_unchanged() -> None:
    assert decoder_layer.fuse(make_model("llama", torch.float32)) == 0


def test_fuse_leaves_unsupported_architectures_unchanged() -> None:
    assert decoder_layer.fuse(make_model("cohere")) == 0


def test_fuse_skips_a_layer_with_an_unsupported_linear() -> None:
    model = make_model("llama")
    exact = copy.deepcopy(model).float()(TOKENS).logits
    layer = model.model.layers[1]
    layer.mlp.down_proj.__class__ = type("OtherLinear", (nn.Linear,), {})
    assert decoder_layer.fuse(model) == 2
    assert model.model.layers[1] is layer
    assert relative_error(model(TOKENS).logits, exact) < 0.05
