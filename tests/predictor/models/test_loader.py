import json
from pathlib import Path
from typing import Any

import pytest
import torch

from devtools.processes import ROOT
from predictor.errors import UnsupportedModel
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.types import SamplingParams

CPU = torch.device("cpu")


def load(directory: Path, **options: Any) -> LoadedModel:
    return loader.load(directory, **{"device": "cpu", "dtype": "auto", "trust_remote_code": False} | options)


def rewrite(directory: Path, name: str, **fields: Any) -> None:
    """Replace the link to a JSON file by a copy with some fields changed."""
    content = json.loads((directory / name).read_text())
    (directory / name).unlink()
    (directory / name).write_text(json.dumps(content | fields))


def test_reads_what_the_directory_says_of_itself(weights: Path) -> None:
    loaded = load(weights)
    assert loaded.model.dtype == torch.float32
    assert loaded.context_tokens == 1024
    assert loaded.eos_token_ids == {loaded.tokenizer.convert_tokens_to_ids("<|end|>")}
    assert loaded.defaults == SamplingParams(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)


def test_takes_sampling_from_the_generation_config(weights: Path) -> None:
    rewrite(
        weights,
        "generation_config.json",
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        max_new_tokens=64,
        repetition_penalty=1.1,
    )
    expected = SamplingParams(max_tokens=64, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    assert load(weights).defaults == expected


def test_takes_several_end_tokens(weights: Path) -> None:
    rewrite(weights, "generation_config.json", eos_token_id=[2, 5])
    assert load(weights).eos_token_ids == {2, 5}


def test_loads_in_the_dtype_asked_for(weights: Path) -> None:
    assert load(weights, dtype="bfloat16").model.dtype == torch.bfloat16


def test_keeps_the_checkpoints_dtype_where_a_cpu_computes_in_it() -> None:
    assert loader.choose_dtype("auto", torch.bfloat16, CPU) == torch.bfloat16
    assert loader.choose_dtype("auto", torch.float16, CPU) == torch.bfloat16
    assert loader.choose_dtype("auto", None, CPU) == torch.float32
    assert loader.choose_dtype("float16", torch.float32, CPU) == torch.float16


def test_computes_with_as_many_threads_as_it_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        for granted, number, threads in ((0.5, None, 1), (100.0, None, before), (None, None, before), (1.0, 2, 2)):
            torch.set_num_threads(before)
            monkeypatch.setattr(loader.cgroup, "cpus", lambda _, granted=granted: granted)
            threads.set_threads(number)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_refuses_an_architecture_that_transformers_does_not_know(weights: Path) -> None:
    rewrite(weights, "config.json", model_type="megabrain", architectures=["MegaBrainForCausalLM"])
    with pytest.raises(UnsupportedModel, match="names the model type 'megabrain', which transformers"):
        load(weights)


def test_refuses_a_model_that_does_not_generate_text(weights: Path) -> None:
    rewrite(weights, "config.json", model_type="vit", architectures=["ViTForImageClassification"])
    with pytest.raises(UnsupportedModel, match="holds a ViTForImageClassification, which does not generate text"):
        load(weights)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hidden_size": "abc"}, r"\(Field 'hidden_size' expected int, got str \(value: 'abc'\)\)"),
        ({"hidden_size": 129}, r"\(The hidden size \(129\) is not a multiple of the number of attention heads \(4\)\)"),
        ({"dtype": "float99"}, r"\(.*float99.*\)"),
    ],
)
def test_says_what_in_a_config_cannot_be_used(weights: Path, fields: dict[str, Any], why: str) -> None:
    rewrite(weights, "config.json", **fields)
    with pytest.raises(UnsupportedModel, match=rf"config\.json cannot be used {why}; download the model again\.$"):
        load(weights)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_hidden_layers": 5}, r"model\.layers\.4\.\S+ and \d+ more"),
        ({"vocab_size": 700}, r"model\.embed_tokens\.weight"),
    ],
)
@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_refuses_weights_that_do_not_fit_the_config(
    weights: Path, fields: dict[str, Any], named: str, quantization: str
) -> None:
    rewrite(weights, "config.json", **fields)
    with pytest.raises(UnsupportedModel, match=rf"config\.json \(missing or of another shape: {named}\); download"):
        load(weights, quantization=quantization)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_refuses_a_config_that_is_not_json(weights: Path, text: str) -> None:
    (weights / "config.json").unlink()
    (weights / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json is no JSON object; download the model again"):
        load(weights)


def test_refuses_pickled_weights(weights: Path) -> None:
    (weights / "model.safetensors").unlink()
    (weights / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedModel, match=r"has no \*\.safetensors; only that format is loaded"):
        load(weights)


def test_names_the_shard_that_is_missing(weights: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (weights / "model-00001-of-00002.safetensors").write_bytes(b"")
    (weights / loader.WEIGHTS_INDEX).write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match=r"lacks model-00002-of-00002\.safetensors"):
        load(weights)


def test_says_that_the_weights_are_damaged(weights: Path) -> None:
    (weights / "model.safetensors").unlink()
    (weights / "model.safetensors").write_bytes((ROOT / "demo/model/model.safetensors").read_bytes()[:5000])
    with pytest.raises(UnsupportedModel, match=r"The weights in .* cannot be loaded \(.*\); download the model"):
        load(weights)


def test_says_that_the_tokenizer_is_missing(weights: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (weights / name).unlink()
    with pytest.raises(UnsupportedModel, match=r"The tokenizer in .* cannot be loaded \(.*\); download the model"):
        load(weights)
