import json
from pathlib import Path
from typing import Any

import pytest

from predictor.errors import UnsupportedModel
from predictor.models import checkpoint
from tests.predictor.models.conftest import Rewrite


def test_read_config_unknown_model_type_raises(weights: Path, rewrite: Rewrite) -> None:
    rewrite("config.json", model_type="megabrain", architectures=["MegaBrainForCausalLM"])
    with pytest.raises(UnsupportedModel, match="names the model type 'megabrain', which transformers"):
        checkpoint.read_config(weights, trust_remote_code=False)


def test_read_config_of_another_task_raises(weights: Path, rewrite: Rewrite) -> None:
    rewrite("config.json", model_type="vit", architectures=["ViTForImageClassification"])
    with pytest.raises(UnsupportedModel, match="holds a ViTForImageClassification, which does not generate text"):
        checkpoint.read_config(weights, trust_remote_code=False)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hidden_size": "abc"}, r"\(Field 'hidden_size' expected int, got str \(value: 'abc'\)\)"),
        ({"hidden_size": 129}, r"\(The hidden size \(129\) is not a multiple of the number of attention heads \(4\)\)"),
        ({"dtype": "float99"}, r"\(.*float99.*\)"),
    ],
    ids=["type", "value", "dtype"],
)
def test_read_config_invalid_field_names_the_error(
    weights: Path, rewrite: Rewrite, fields: dict[str, Any], why: str
) -> None:
    rewrite("config.json", **fields)
    with pytest.raises(UnsupportedModel, match=rf"config\.json cannot be used {why}\. Download the model again\.$"):
        checkpoint.read_config(weights, trust_remote_code=False)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_read_config_not_a_json_object_raises(weights: Path, text: str) -> None:
    (weights / "config.json").unlink()
    (weights / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json is not a JSON object\. Download the model again"):
        checkpoint.read_config(weights, trust_remote_code=False)


def test_check_weight_files_pickled_weights_raises(weights: Path) -> None:
    (weights / "model.safetensors").unlink()
    (weights / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedModel, match=r"has no \*\.safetensors\. Only that format is loaded"):
        checkpoint.check_weight_files(weights)


def test_check_weight_files_missing_shard_is_named(weights: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (weights / "model-00001-of-00002.safetensors").write_bytes(b"")
    (weights / checkpoint.WEIGHTS_INDEX).write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match=r"has no model-00002-of-00002\.safetensors, named in"):
        checkpoint.check_weight_files(weights)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 1}'])
def test_check_weight_files_damaged_index_raises(weights: Path, text: str) -> None:
    (weights / checkpoint.WEIGHTS_INDEX).write_text(text)
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors\.index\.json is not a readable index"):
        checkpoint.check_weight_files(weights)
