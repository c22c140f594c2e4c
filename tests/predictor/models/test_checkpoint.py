from pathlib import Path
from typing import Any

import pytest

from predictor.errors import UnsupportedModel
from predictor.models import checkpoint
from snapshot_format.model_files import INDEX
from tests.predictor.models.conftest import Rewrite, Shard

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3416512\n"


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


@pytest.mark.parametrize(("text", "reason"), [("{", r"cannot be read \(.*\)"), ("[]", "is not a JSON object")])
def test_read_config_not_a_json_object_raises(weights: Path, text: str, reason: str) -> None:
    (weights / "config.json").unlink()
    (weights / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=rf"config\.json {reason}\. Correct it, or download the model again"):
        checkpoint.read_config(weights, trust_remote_code=False)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("pytorch_model.bin", r"at its top \(only pytorch_model\.bin\)\. .* Pickled weights are not loaded"),
        ("model.gguf", r"only model\.gguf\)\. GGUF is not supported"),
        ("adapter_model.safetensors", r"is an adapter \(adapter_model\.safetensors\) without the weights"),
    ],
)
def test_find_weights_other_format_raises(weights: Path, found: str, reason: str) -> None:
    (weights / "model.safetensors").rename(weights / found)
    with pytest.raises(UnsupportedModel, match=reason):
        checkpoint.find_weights(weights)


def test_find_weights_counts_only_what_is_loaded(weights: Path, shard: Shard) -> None:
    shard("")
    for path in ("consolidated.safetensors", "model.fp16.safetensors", "original/model.safetensors"):
        (weights / path).parent.mkdir(exist_ok=True)
        (weights / path).write_bytes(b"never opened")
    found = checkpoint.find_weights(weights)
    shards = sorted(weights.glob("model-*.safetensors"))
    assert (found.entry, found.files) == (INDEX, tuple(shards))
    assert found.size_bytes == sum(path.stat().st_size for path in shards)


def test_find_weights_missing_shard_is_named(weights: Path, shard: Shard) -> None:
    shard("")
    (weights / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"has no model-00002-of-00002\.safetensors, named in"):
        checkpoint.find_weights(weights)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 1}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_find_weights_damaged_index_raises(weights: Path, text: str) -> None:
    (weights / "model.safetensors").unlink()
    (weights / INDEX).write_text(text)
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors\.index\.json is not a readable index"):
        checkpoint.find_weights(weights)


def test_check_auxiliary_files_git_lfs_pointer_names_the_remedy(weights: Path) -> None:
    (weights / "banner.png").write_text(POINTER)
    checkpoint.check_auxiliary_files(weights)
    (weights / "tokenizer.json").unlink()
    (weights / "tokenizer.json").write_text(POINTER)
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json is a Git LFS pointer .* Run git lfs pull"):
        checkpoint.check_auxiliary_files(weights)


def test_check_code_missing_module_names_the_setting(weights: Path, rewrite: Rewrite) -> None:
    rewrite("config.json", auto_map={"AutoConfig": "custom.Config", "AutoModel": "owner/model--other.Model"})
    with pytest.raises(UnsupportedModel, match=r"has no custom\.py, the code .* set STORAGE_ALLOW_PATTERNS=\*"):
        checkpoint.check_code(weights)
    (weights / "custom.py").write_text("")
    checkpoint.check_code(weights)
