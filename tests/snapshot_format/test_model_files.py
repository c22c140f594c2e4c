"""The files of a model: which are loaded, and what is wrong with one."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from snapshot_format import model_files

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["model.safetensors", model_files.INDEX], "model.safetensors"),
        ([model_files.INDEX, "consolidated.safetensors"], model_files.INDEX),
        (["weights.safetensors", "adapter_model.safetensors", "folder/model.safetensors"], "weights.safetensors"),
        (["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
        (["model-00001-of-00002.safetensors"], None),
        (["optimizer.safetensors", "weights.safetensors"], "weights.safetensors"),
        (["a.safetensors", "b.safetensors"], None),
        (["folder/model.safetensors", "pytorch_model.bin"], None),
    ],
)
def test_find_weights_follows_the_order_of_transformers(paths: list[str], found: str | None) -> None:
    assert model_files.find_weights(paths) == found


def test_read_index_normalizes_and_orders_shards() -> None:
    index = {"weight_map": {"a": "./parts/2.safetensors", "b": "1.safetensors", "c": "parts/2.safetensors"}}
    assert model_files.read_index(json.dumps(index).encode()) == ("1.safetensors", "parts/2.safetensors")


@pytest.mark.parametrize(
    ("index", "problem"),
    [(POINTER, "run git lfs pull"), ('{"weight_map": {"a": "a.bin"}}', r"other than \*\.safetensors")],
    ids=["pointer", "pickle"],
)
def test_read_index_other_content_raises(index: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        model_files.read_index(index.encode())


@pytest.mark.parametrize("shard", ["../a.safetensors", "/a.safetensors", "b/../../a.safetensors"])
def test_read_index_path_outside_raises(shard: str) -> None:
    with pytest.raises(ValueError, match="outside"):
        model_files.read_index(json.dumps({"weight_map": {"a": shard}}).encode())


def test_find_problem_long_text_that_starts_like_a_pointer_is_none(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(POINTER)
    assert "is a Git LFS pointer" in (model_files.find_problem(readme, "") or "")
    readme.write_text(POINTER + "What such a file means. " * 100)
    assert model_files.find_problem(readme, "") is None


def test_find_problem_empty_file_without_weights_is_none(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").touch()
    assert model_files.find_problem(tmp_path / "merges.txt", "") is None


def test_vocabulary_of_every_tokenizer_of_transformers_is_an_auxiliary_file() -> None:
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    names: set[str] = set()
    for path in Path(spec.origin).parent.glob("models/*/tokenization_*.py"):
        names.update(re.findall(r'_file": "([^"{]+)"', path.read_text()))
    assert {"tokenizer.json", "vocab.txt", "spiece.model", "bpe.codes"} < names
    assert [name for name in sorted(names) if not model_files.is_auxiliary(name)] == []
