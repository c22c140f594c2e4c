"""The directory format that the two packages share: what one publishes or prepares, the other finds."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from safetensors.torch import load_file

from devtools import processes, tiny_llama, tiny_poolers
from devtools.paths import DEMO_MODEL, ROOT
from predictor.errors import SnapshotMissing
from predictor.models import int4_quantizer, int8_quantizer, load_plan, loader, quantization, snapshot
from predictor.models.loader import LoadedModel
from snapshot_format.recipe import INT4_CPU, INT8_CPU, Variant
from snapshot_format.record import RECORD
from tests.predictor.servers import HANG_SECONDS

MODES = {INT8_CPU: "8bit", INT4_CPU: "4bit"}
PROMPTS = ["60-91=", "3+4=", "7*8=", "100-1="]


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with the demo model from a hub, and once more from a directory with a blank in its name."""
    root = tmp_path_factory.mktemp("volume")
    directory = tmp_path_factory.mktemp("source") / "my model"
    directory.symlink_to(DEMO_MODEL)
    with processes.local_hub({"demo/arithmetic": DEMO_MODEL}) as hub_url:
        processes.initialize("hf://demo/arithmetic", root, hub_url)
    processes.initialize(directory.as_uri(), root, None)
    return root


@pytest.mark.parametrize(
    "reference", ["hf://demo/arithmetic", "hf://demo/arithmetic:main", "hf://demo/arithmetic@main"]
)
def test_predictor_finds_published_reference(volume: Path, reference: str) -> None:
    found = snapshot.find(volume, reference)
    assert (found.directory / "model.safetensors").read_bytes() == (DEMO_MODEL / "model.safetensors").read_bytes()
    record = json.loads((found.directory / RECORD).read_text())
    assert record["commit"] == found.commit == found.directory.name
    assert snapshot.find(volume, f"hf://demo/arithmetic:{found.commit}") == found
    assert snapshot.find(found.directory, None) == found


def test_predictor_finds_published_directory(volume: Path) -> None:
    found = snapshot.find(volume, "file:///anywhere/my%20model")
    assert found.directory.parent.name == "file--my%20model"


def test_predictor_repeats_the_error_of_the_initializer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "storage_initializer", "file:///does/not/exist", str(tmp_path)]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert failed.returncode == 2
    with pytest.raises(SnapshotMissing) as raised:
        snapshot.wait(tmp_path, "file:///does/not/exist", 0)
    assert str(raised.value).endswith(failed.stderr.splitlines()[-1])


def test_predictor_finds_the_pooling_of_a_published_sentence_transformer(tmp_path: Path) -> None:
    source = tiny_poolers.make_bert(tmp_path / "embedder")
    with processes.local_hub({"demo/embedder": source}) as hub_url:
        processes.initialize("hf://demo/embedder", tmp_path / "volume", hub_url)
    published = snapshot.find(tmp_path / "volume", "hf://demo/embedder").directory
    pooling = load_plan.make_plan(published, device="cpu").pooling
    assert pooling == load_plan.make_plan(source, device="cpu").pooling
    assert pooling is not None
    assert (pooling.modes, pooling.normalize, pooling.max_tokens) == (("mean",), True, 24)
    assert pooling.prompts == tiny_poolers.PROMPTS


# What is prepared


@dataclass(frozen=True)
class Prepared:
    """A published snapshot, and what was made of it."""

    published: Path
    made: Path
    variant: Variant = INT8_CPU

    @property
    def mode(self) -> str:
        """Of the predictor."""
        return MODES[self.variant]

    def load(self, mode: str = "", dtype: str = "auto", skip_modules: Sequence[str] = ()) -> LoadedModel:
        mode = mode or self.mode
        return loader.load(self.published, device="cpu", dtype=dtype, quantization=mode, skip_modules=skip_modules)

    def say(self, **changes: object) -> None:
        """Change what the record says of how it was made."""
        path = self.made / RECORD
        record = json.loads(path.read_text())
        record["derived_from"] |= changes
        path.write_text(json.dumps(record))


def prepare(source: Path, root: Path, *flags: str, variant: Variant = INT8_CPU) -> Prepared:
    processes.initialize(source.as_uri(), root, None, "--prepare", variant, *flags)
    published = snapshot.find(root, source.as_uri()).directory
    return Prepared(published, published.with_name(f"{published.name}-{variant}"), variant)


@pytest.fixture(scope="module")
def demo_volume(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The demo model: float32, one file, tied embeddings; not to be changed."""
    return prepare(DEMO_MODEL, tmp_path_factory.mktemp("demo") / "volume")


@pytest.fixture
def prepared(demo_volume: Prepared, tmp_path: Path) -> Prepared:
    """A copy of that, to be changed."""
    root = shutil.copytree(demo_volume.published.parents[1], tmp_path / "volume")
    published, made = (
        root / path.relative_to(demo_volume.published.parents[1]) for path in (demo_volume.published, demo_volume.made)
    )
    return Prepared(published, made)


@pytest.fixture(
    scope="module",
    params=[
        ("sharded", INT8_CPU),
        ("sharded", INT4_CPU),
        *(
            pytest.param((name, variant), marks=pytest.mark.slow)
            for name in ("demo", "tied", "float16")
            for variant in (INT8_CPU, INT4_CPU)
        ),
    ],
    ids="-".join,
)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Prepared snapshots of models of several shapes; not to be changed."""
    name, variant = request.param
    root = tmp_path_factory.mktemp(name)
    model = root / "model"
    match name:
        case "demo":
            model = DEMO_MODEL
        case "sharded":
            tiny_llama.make(model, shard_size="150KB")
        case "tied":
            tiny_llama.make(model, tied=True)
        case "float16":
            tiny_llama.make(model, dtype=torch.float16)
    return prepare(model, root / "volume", variant=variant)


def logits(loaded: LoadedModel) -> list[torch.Tensor]:
    # Not a generator: one that is not read to its end leaves its thread in this mode.
    with torch.inference_mode():
        return [loaded.model(torch.tensor([loaded.tokenizer.encode(prompt)])).logits for prompt in PROMPTS]


def greedy(loaded: LoadedModel) -> list[list[int]]:
    texts = []
    for prompt in PROMPTS:
        ids = loaded.tokenizer.encode(prompt)
        for _ in range(8):
            with torch.inference_mode():
                ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
        texts.append(ids)
    return texts


def test_prequantized_weights_equal_those_quantized_while_loading(each: Prepared, tmp_path: Path) -> None:
    dtype = json.loads((each.made / RECORD).read_text())["derived_from"]["dtype"]
    config = {INT8_CPU: int8_quantizer.Int8Config, INT4_CPU: int4_quantizer.Int4Config}[each.variant]()
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        each.published, dtype=getattr(torch, dtype), quantization_config=config
    )
    rounded.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    made = {name: tensor for path in each.made.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert made.keys() == expected.keys()
    stored = {INT8_CPU: torch.int8, INT4_CPU: torch.uint8}[each.variant]
    for name, tensor in expected.items():
        if name.endswith("q_proj.weight"):
            assert (tensor.dtype, made[name].dtype) == (stored, stored)
        assert torch.equal(made[name].to(tensor.dtype), tensor), name


def test_prequantized_variant_is_loaded_and_gives_the_same_tokens(
    each: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        loaded = each.load()
    assert loaded.prequantized
    assert loaded.quantization == each.mode
    assert f"loading pre-quantized weights from {each.made}" in caplog.text
    away = each.made.rename(each.made.with_name("away"))
    try:
        rounding_now = each.load()
    finally:
        away.rename(each.made)
    assert not rounding_now.prequantized
    assert all(torch.equal(one, other) for one, other in zip(logits(loaded), logits(rounding_now), strict=True))
    assert greedy(loaded) == greedy(rounding_now)


def test_quantization_mode_decides_use_of_variant(prepared: Prepared) -> None:
    assert prepared.load("auto").prequantized == (
        quantization.resolve_mode("auto", torch.device("cpu"), None, 1, 1) == "8bit"
    )
    for mode in ("none", "4bit"):
        loaded = prepared.load(mode)
        assert not loaded.prequantized
        assert loaded.quantization == mode


def test_variant_of_unknown_recipe_is_skipped_with_warning(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    prepared.say(version=7)
    loaded = prepared.load()
    assert not loaded.prequantized
    assert loaded.quantization == "8bit"
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"not using prequantized weights in {prepared.made}, quantizing while loading" in warning
    assert "uses recipe int8-cpu version 7 instead of int8-cpu version 1" in warning


def test_variant_of_other_dtype_is_skipped(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    assert not prepared.load(dtype="bfloat16").prequantized
    assert "quantized from float32 instead of bfloat16; use --dtype auto" in caplog.text


def test_variant_with_other_skip_modules_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared = prepare(DEMO_MODEL, tmp_path / "volume", "--prepare-skip-modules", "down_proj")
    assert not prepared.load().prequantized
    assert "it skips modules ['down_proj'] instead of []" in caplog.text

    assert prepared.load(skip_modules=["down_proj"]).prequantized


@pytest.mark.parametrize("change", ["no record", "a file less", "nonsense"])
def test_damaged_variant_is_skipped(prepared: Prepared, caplog: pytest.LogCaptureFixture, change: str) -> None:
    match change:
        case "no record":
            (prepared.made / RECORD).unlink()
        case "a file less":
            (prepared.made / "tokenizer.json").unlink()
        case "nonsense":
            prepared.say(version=1, skip_modules=None)
    assert not prepared.load().prequantized
    assert f"not using prequantized weights in {prepared.made}" in caplog.text


@pytest.mark.slow
def test_predictor_serves_prequantized_variant(prepared: Prepared, tmp_path: Path) -> None:
    arguments = ["--model_dir", str(prepared.published.parents[1]), "--model_reference", DEMO_MODEL.as_uri()]
    arguments += ["--quantization", "8bit"]
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        processes.predictor(arguments, model_name="demo", port=processes.free_port(), stderr=stderr) as server,
        httpx.Client(base_url=server.url, timeout=HANG_SECONDS, trust_env=False) as client,
    ):
        properties = client.get("/v2/models/demo").json()["properties"]
        body = {"text_input": "60-91=", "parameters": {"temperature": 0, "max_tokens": 64}}
        answer = client.post("/v2/models/demo/generate", json=body).json()["text_output"]
    assert (properties["quantization"], properties["prepared"]) == ("8bit", "true")
    assert properties["commit"] == prepared.published.name
    assert f"loading pre-quantized weights from {prepared.made}" in log.read_text()
    assert "-31" in answer
