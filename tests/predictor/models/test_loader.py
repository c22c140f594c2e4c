import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from devtools.paths import DEMO_MODEL
from predictor.errors import UnsupportedModel
from predictor.models import load_plan, loader, snapshot
from predictor.models.int8_quantizer import Int8Config
from predictor.models.loader import LoadedModel
from predictor.types import SamplingParams
from snapshot_format.model_files import INDEX, SINGLE
from tests.predictor.models.conftest import LoadDemo, Rewrite, Shard

CPU = torch.device("cpu")
DEMO_WEIGHTS = (DEMO_MODEL / SINGLE).read_bytes()


# The plan


def test_plan_auto_resolves_device_and_checkpoint_dtype() -> None:
    plan = load_plan.make_plan(DEMO_MODEL, device="cpu")
    assert (plan.device, plan.dtype, plan.quantization) == (CPU, torch.float32, "none")
    assert (plan.directory, plan.weights_dir, plan.prequantized_dir) == (DEMO_MODEL, DEMO_MODEL, None)
    assert plan.quantization_config is None
    assert plan.placement.device_map == {"": CPU}


def test_plan_8bit_passes_skip_modules_to_transformers() -> None:
    plan = load_plan.make_plan(DEMO_MODEL, device="cpu", dtype="bfloat16", quantization="8bit", skip_modules=["o_proj"])
    assert (plan.dtype, plan.quantization, plan.skip_modules) == (torch.bfloat16, "8bit", ["o_proj"])
    assert isinstance(plan.quantization_config, Int8Config)
    assert plan.quantization_config.modules_to_not_convert == ["o_proj"]


def test_plan_prequantized_weights_are_read_without_quantization(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "prequantized", lambda *_: weights)
    plan = load_plan.make_plan(DEMO_MODEL, device="cpu", quantization="8bit")
    assert (plan.directory, plan.weights_dir, plan.prequantized_dir) == (DEMO_MODEL, weights, weights)
    assert (plan.quantization, plan.quantization_config) == ("8bit", None)
    assert load_plan.make_plan(DEMO_MODEL, device="cpu").prequantized_dir is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (DEMO_WEIGHTS[:5000], r"has 5000 of 3416512 bytes"),
        (DEMO_WEIGHTS[:100], r"is truncated: 100 bytes end in its header"),
        (b"damaged weights", r"is not a safetensors file"),
        (b"", r"is empty"),
    ],
    ids=["data", "header", "other", "empty"],
)
def test_plan_damaged_weights_are_named(weights: Path, content: bytes, problem: str) -> None:
    (weights / SINGLE).unlink()
    (weights / SINGLE).write_bytes(content)
    with pytest.raises(UnsupportedModel, match=rf"model\.safetensors {problem}.*\. Download the model again\.$"):
        load_plan.make_plan(weights, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SINGLE])
def test_plan_git_lfs_pointer_names_the_remedy(weights: Path, name: str) -> None:
    (weights / name).unlink()
    (weights / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    with pytest.raises(UnsupportedModel, match=rf"{name} is a Git LFS pointer .*\. Run git lfs pull in its clone\.$"):
        load_plan.make_plan(weights, device="cpu")


@pytest.mark.parametrize(
    ("dtype", "checkpoint_dtype", "chosen"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.bfloat16),
        ("auto", None, torch.float32),
        ("float16", torch.float32, torch.float16),
    ],
)
def test_choose_dtype_on_cpu_replaces_float16_unless_set(
    dtype: str, checkpoint_dtype: torch.dtype | None, chosen: torch.dtype
) -> None:
    assert load_plan.choose_dtype(dtype, checkpoint_dtype, CPU) == chosen


# The loaded model


def test_load_without_settings_takes_defaults_of_the_directory() -> None:
    loaded = loader.load(DEMO_MODEL, device="cpu")
    assert loaded.model.dtype == torch.float32
    assert loaded.context_tokens == 1024
    assert loaded.eos_token_ids == {loaded.tokenizer.convert_tokens_to_ids("<|end|>")}
    assert loaded.defaults == SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert (loaded.vocabulary_tokens, loaded.unembedded_tokens) == (512, {})
    assert loaded.device_map == {}
    assert not loaded.prequantized


def test_load_dtype_sets_dtype_of_weights(load_demo: LoadDemo) -> None:
    assert load_demo("none").model.dtype == torch.bfloat16


def test_load_generation_config_sets_sampling_defaults_and_end_tokens(weights: Path, rewrite: Rewrite) -> None:
    kept: dict[str, Any] = {"top_p": 0.8, "top_k": 20, "min_p": 0.05}
    sampling = {"temperature": 0.7, "repetition_penalty": 1.1, **kept}
    rewrite("generation_config.json", do_sample=True, max_new_tokens=64, eos_token_id=[2, 5], **sampling)
    loaded = loader.load(weights, device="cpu")
    assert loaded.defaults == SamplingParams(max_tokens=64, **sampling)
    assert loaded.eos_token_ids == {2, 5}


def test_load_tokens_beyond_the_embedding_are_reported_and_no_end_tokens(
    weights: Path, rewrite: Rewrite, caplog: pytest.LogCaptureFixture
) -> None:
    added = json.loads((weights / "tokenizer.json").read_text())["added_tokens"]
    pads = [added[0] | {"id": 512 + index, "content": f"[PAD{index}]"} for index in range(9)]
    rewrite("tokenizer.json", added_tokens=added + pads)
    rewrite("generation_config.json", eos_token_id=[2, 512])
    loaded = loader.load(weights, device="cpu")
    assert loaded.unembedded_tokens == {512 + index: f"[PAD{index}]" for index in range(9)}
    assert loaded.eos_token_ids == {2}
    [warning] = [record.getMessage() for record in caplog.records if "too few" in record.getMessage()]
    assert "has 512 rows, too few for 9 of the tokenizer's tokens: '[PAD0]' (512), " in warning
    assert "'[PAD4]' (516); prompts with them are refused" in warning, "the first five"


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_load_rows_that_pad_the_embedding_are_token_ids(weights: Path, rewrite: Rewrite, quantization: str) -> None:
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.nn.functional.pad(tensors["model.embed_tokens.weight"], (0, 0, 0, 64))
    (weights / "model.safetensors").unlink()
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    rewrite("config.json", vocab_size=576)
    loaded = loader.load(weights, device="cpu", quantization=quantization)
    assert (loaded.vocabulary_tokens, loaded.unembedded_tokens) == (576, {})
    assert loaded.tokenizer.decode([575], skip_special_tokens=True) == "", "a row without a token has no text"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_load_json_with_byte_order_mark_is_read(weights: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    content = (weights / name).read_bytes()
    (weights / name).unlink()
    (weights / name).write_bytes(b"\xef\xbb\xbf" + content)
    loaded = loader.load(weights, device="cpu")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("17+25", add_special_tokens=False)) == "17+25"
    assert f"{name}" in caplog.text


def test_plan_generation_config_with_byte_order_mark_is_read(weights: Path) -> None:
    (weights / "generation_config.json").unlink()
    (weights / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"max_new_tokens": 7}')
    assert load_plan.make_plan(weights, device="cpu").generation_config.max_new_tokens == 7


def test_plan_damaged_generation_config_raises(weights: Path) -> None:
    (weights / "generation_config.json").unlink()
    (weights / "generation_config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"generation_config\.json cannot be read"):
        load_plan.make_plan(weights, device="cpu")


def test_load_generation_config_that_transformers_rejects_is_served(weights: Path, rewrite: Rewrite) -> None:
    rewrite("generation_config.json", num_return_sequences=2)
    assert loader.load(weights, device="cpu").defaults.temperature == 0.0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_hidden_layers": 5}, r"model\.layers\.4\.\S+ and \d+ more"),
        ({"vocab_size": 700}, r"model\.embed_tokens\.weight"),
    ],
    ids=["missing", "other-shape"],
)
@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_load_weights_that_do_not_fit_config_raises(
    weights: Path, rewrite: Rewrite, fields: dict[str, Any], named: str, quantization: str
) -> None:
    rewrite("config.json", **fields)
    with pytest.raises(UnsupportedModel, match=rf"config\.json \(missing or of another shape: {named}\)\. Download"):
        loader.load(weights, device="cpu", quantization=quantization)


def test_load_unreadable_weights_raises(weights: Path) -> None:
    plan = load_plan.make_plan(weights, device="cpu")
    (weights / SINGLE).unlink()
    (weights / SINGLE).write_bytes(DEMO_WEIGHTS[:5000])
    with pytest.raises(UnsupportedModel, match=r"The weights in .* cannot be loaded \(.*\)\. Download the model"):
        loader.execute(plan)


def assert_demo_weights(loaded: LoadedModel) -> None:
    expected = load_file(DEMO_MODEL / SINGLE)["model.norm.weight"]
    assert torch.equal(loaded.model.state_dict()["model.norm.weight"], expected)


@pytest.mark.parametrize("folder", ["", "parts"])
def test_load_index_next_to_other_weights_reads_its_shards(weights: Path, shard: Shard, folder: str) -> None:
    shard(folder)
    (weights / "consolidated.safetensors").write_bytes(b"never opened")
    assert_demo_weights(loader.load(weights, device="cpu"))


def test_load_single_file_is_preferred_over_an_index(weights: Path) -> None:
    (weights / INDEX).write_text('{"metadata": {}, "weight_map": {"a": "model-00001-of-00003.safetensors"}}')
    assert_demo_weights(loader.load(weights, device="cpu"))


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_load_only_weights_of_another_name_are_read(weights: Path, quantization: str) -> None:
    (weights / SINGLE).rename(weights / "model.fp16.safetensors")
    assert_demo_weights(loader.load(weights, device="cpu", quantization=quantization))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_load_out_of_memory_names_the_setting(
    weights: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def raise_out_of_memory(*_: object, **__: object) -> None:
        raise error("Tried to allocate 9 GiB.\nand so on")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", raise_out_of_memory)
    expected = r"^Not enough memory to load the weights in .* \(Tried to allocate 9 GiB\)\. .* --quantization\.$"
    with pytest.raises(UnsupportedModel, match=expected):
        loader.load(weights, device="cpu")


def test_load_missing_tokenizer_raises(weights: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (weights / name).unlink()
    with pytest.raises(UnsupportedModel, match=r"The tokenizer in .* cannot be loaded \(.*\)\. Download the model"):
        loader.load(weights, device="cpu")


def test_load_times_each_phase(weights: Path) -> None:

    phases: list[str] = []

    def time_phase(name: str) -> AbstractContextManager[None]:
        phases.append(name)
        return nullcontext()

    loader.load(weights, device="cpu", time_phase=time_phase)
    assert phases == ["tokenizer", "weights", "pack"]


def test_load_reports_the_fraction_of_the_weights_and_leaves_no_hook(weights: Path) -> None:
    fractions: list[float] = []
    loader.load(weights, device="cpu", report_weights=fractions.append)
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert fractions == sorted(fractions)
    assert len(set(fractions)) > 10
    assert transformers.utils.logging.set_tqdm_hook(None) is None
