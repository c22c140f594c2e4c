"""Adapters that PEFT writes, merged at load, compared with PEFT's own model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from devtools.paths import DEMO_MODEL
from predictor.errors import UnsupportedModel
from predictor.models import adapter, load_plan, loader, snapshot
from snapshot_format.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SINGLE
from tests.predictor.models.conftest import Rewrite, Shard

MakeAdapter = Callable[..., Path]

PROMPT = torch.tensor([[1, 5, 40, 41, 42, 60, 61]])


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Write an adapter with random weights, with the options of `LoraConfig`."""

    def make(**options: Any) -> Path:
        torch.manual_seed(0)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
                elif "magnitude" in name:
                    parameter.mul_(1.1)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.fixture
def small_adapter(tmp_path: Path) -> Path:
    """An adapter of one layer, written without PEFT."""
    directory = tmp_path / "small"
    directory.mkdir()
    fields = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": "demo/base"}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(fields))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    tensors = {f"{prefix}lora_A.weight": torch.ones(2, 128), f"{prefix}lora_B.weight": torch.ones(128, 2)}
    save_file(tensors, directory / ADAPTER_WEIGHTS)
    return directory


def rewrite_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / ADAPTER_WEIGHTS
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=PROMPT, use_cache=False).logits[0]


def peft_logits(directory: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), directory).eval())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "target_modules": "all-linear"},
        {"use_dora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}},
        {"layers_to_transform": [0, 3], "task_type": "CAUSAL_LM"},
    ],
    ids=["lora", "rslora", "dora", "patterns", "layers"],
)
def test_load_merges_as_peft_does(make_adapter: MakeAdapter, options: dict[str, Any]) -> None:
    directory = make_adapter(**options)
    merged = logits(loader.load(DEMO_MODEL, device="cpu", adapter_dir=directory).model)
    torch.testing.assert_close(merged, peft_logits(directory), rtol=1e-4, atol=1e-4)
    assert (merged - logits(loader.load(DEMO_MODEL, device="cpu").model)).abs().max() > 0.1


def test_load_merges_before_quantization(make_adapter: MakeAdapter) -> None:
    directory = make_adapter()
    loaded = loader.load(DEMO_MODEL, device="cpu", quantization="8bit", adapter_dir=directory)
    expected = peft_logits(directory)
    assert loaded.quantization == "8bit"
    assert (logits(loaded.model) - expected).norm() / expected.norm() < 0.05


def test_load_sharded_weights_are_merged(make_adapter: MakeAdapter, weights: Path, shard: Shard) -> None:
    shard("")
    directory = make_adapter()
    merged = logits(loader.load(weights, device="cpu", adapter_dir=directory).model)
    torch.testing.assert_close(merged, peft_logits(directory), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("transposed", [False, True])
def test_merge_of_a_part_is_that_part_of_the_merged_weight(
    make_adapter: MakeAdapter, options: dict[str, Any], *, transposed: bool
) -> None:
    directory = make_adapter(target_modules=["q_proj"], **options)
    source = DEMO_MODEL / SINGLE
    if transposed:
        tensors = {
            name: tensor.T.contiguous() if tensor.ndim == 2 else tensor for name, tensor in load_file(source).items()
        }
        source = directory / SINGLE
        save_file(tensors, source)
    adapted = replace(adapter.read(directory), is_transposed=transposed)
    weight = adapted.merge([source])["model.layers.1.self_attn.q_proj.weight"]
    whole, rows, columns = weight[...], slice(64, 128), slice(0, 64)
    assert (list(whole.shape), weight.get_dtype()) == (weight.get_shape(), "F32")
    torch.testing.assert_close(weight[rows, columns], whole[rows, columns])


def test_plan_ignores_prequantized_weights(
    make_adapter: MakeAdapter, weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(snapshot, "prequantized", lambda *_: weights)
    with caplog.at_level("INFO"):
        plan = load_plan.make_plan(DEMO_MODEL, device="cpu", quantization="8bit", adapter_dir=make_adapter())
    assert plan.prequantized_dir is None
    assert "prequantized weights would not have the adapter" in caplog.text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"bias": "all"}, "bias 'all'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_read_unsupported_option_is_named(small_adapter: Path, fields: dict[str, Any], named: str) -> None:
    path = small_adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UnsupportedModel, match=rf"has {named}.*not supported\. Merge it into its base model"):
        adapter.read(small_adapter)


def test_read_unknown_tensor_is_named(small_adapter: Path) -> None:
    rewrite_tensors(small_adapter, lambda tensors: {**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(UnsupportedModel, match=r"has the tensor base_model\.model\.lm_head\.weight, which is not"):
        adapter.read(small_adapter)


def test_read_half_of_a_pair_is_named(small_adapter: Path) -> None:
    rewrite_tensors(small_adapter, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(UnsupportedModel, match=r"no complete weights of model\.layers\.0\.self_attn\.q_proj"):
        adapter.read(small_adapter)


def test_read_pickled_adapter_is_refused(small_adapter: Path) -> None:
    (small_adapter / ADAPTER_WEIGHTS).rename(small_adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedModel, match=r"has no adapter_model\.safetensors\. Save the adapter again"):
        adapter.read(small_adapter)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda name, tensor: (name, tensor[:, :3] if "lora_A" in name else tensor),
            r"its model\.layers\.0\.self_attn\.q_proj is 128 x 3, and that of the base model 128 x 128",
        ),
        (
            lambda name, tensor: (name.replace("layers.0", "layers.9"), tensor),
            r"it changes model\.layers\.9\.self_attn",
        ),
        (
            lambda name, tensor: (name.replace("model.layers.0.self_attn.q_proj", "lm_head"), tensor),
            "it changes lm_head",
        ),
    ],
    ids=["shape", "module", "tied"],
)
def test_load_adapter_of_another_model_is_refused(small_adapter: Path, change: Any, problem: str) -> None:
    rewrite_tensors(small_adapter, lambda tensors: dict(change(*item) for item in tensors.items()))
    with pytest.raises(
        UnsupportedModel, match=rf"does not fit the base model: .*{problem}.* trained on demo/base: set"
    ):
        loader.load(DEMO_MODEL, device="cpu", adapter_dir=small_adapter)


def test_plan_quantized_base_model_is_refused(small_adapter: Path, weights: Path, rewrite: Rewrite) -> None:
    rewrite("config.json", quantization_config={"quant_method": "kserve_llm_int8"})
    with pytest.raises(UnsupportedModel, match=r"cannot be merged into weights that are quantized"):
        load_plan.make_plan(weights, device="cpu", adapter_dir=small_adapter)


def test_plan_adapter_of_an_embedding_model_is_refused(small_adapter: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"cannot be merged into a model whose task is embed\. Merge it"):
        load_plan.make_plan(DEMO_MODEL, device="cpu", task="embed", adapter_dir=small_adapter)
