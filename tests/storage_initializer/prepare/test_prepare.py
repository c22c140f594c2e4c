"""What is made of a snapshot ahead of serving: its place, its record, its bytes; made once, and made again."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from devtools import tiny_llama
from devtools.local_hub import LocalHub
from devtools.paths import ROOT
from snapshot_format.recipe import INT4_CPU, INT8_CPU, Variant
from storage_initializer.prepare import quantized_checkpoint, recipes
from tests.storage_initializer.conftest import Result, Run, finish, problems

FILES = 8
"""Of the model below: three shards, their index, two configurations, two files of the tokenizer."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.make(tmp_path_factory.mktemp("llama") / "model", shard_size="150KB")


@pytest.fixture
def model(llama: Path) -> Path:
    """What the hub has."""
    return llama


@pytest.fixture
def commit(hub: LocalHub) -> str:
    return hub.commit("demo/arithmetic")


@pytest.fixture
def variant() -> Variant:
    """What is made, unless a test has `VARIANTS`."""
    return INT8_CPU


VARIANTS = pytest.mark.parametrize("variant", [INT8_CPU, INT4_CPU])


@pytest.fixture
def made(volume: Path, commit: str, variant: Variant) -> Path:
    """Where it is to be."""
    return volume / "demo--arithmetic" / f"{commit}-{variant}"


def prepare(run: Run, volume: Path, *flags: str, variant: Variant = INT8_CPU) -> Result:
    return run("--prepare", variant, *flags, "hf://demo/arithmetic", volume)


def tensors(snapshot: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in snapshot.glob("*.safetensors"):
        found |= load_file(path)
    return found


def weights_bytes(snapshot: Path) -> int:
    return sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))


@VARIANTS
def test_prepare_publishes_variant_with_recipe_in_record(
    run: Run, volume: Path, commit: str, made: Path, variant: Variant
) -> None:
    result = prepare(run, volume, variant=variant)
    assert result.code == 0, result.stderr
    published, prepared = result.stdout.splitlines()
    assert published.startswith("published hf://demo/arithmetic@")
    assert prepared.startswith(f"prepared hf://demo/arithmetic@{commit[:12]} at {made}: {FILES} files, ")

    assert problems(made) == problems(made.with_name(commit)) == []
    record = json.loads((made / ".snapshot.json").read_text())
    assert record["commit"] == commit
    assert record["derived_from"] == {
        "reference": "hf://demo/arithmetic:main",
        "commit": commit,
        "recipe": variant,
        "version": 1,
        "dtype": "bfloat16",
        "skip_modules": [],
    }
    assert json.loads((made.with_name(commit) / ".snapshot.json").read_text())["derived_from"] is None
    assert (volume / "demo--arithmetic" / "refs" / "main").read_text() == f"{commit}\n"
    assert list((volume / ".staging").iterdir()) == list((volume / ".locks").iterdir()) == []


def test_prepare_quantizes_linear_layers_and_copies_other_tensors(
    run: Run, volume: Path, made: Path, llama: Path
) -> None:
    assert prepare(run, volume).code == 0
    before, after = tensors(llama), tensors(made)
    rounded = {name for name, tensor in after.items() if tensor.dtype == torch.int8}
    assert len(rounded) == tiny_llama.QUANTIZED
    for name in rounded:
        scale = after.pop(f"{name.removesuffix('weight')}scale")
        weight = before.pop(name)
        assert scale.dtype == torch.float32
        # Rounded to the nearest: off by half a step at most, and a little for bfloat16's own roughness.
        assert ((after.pop(name) * scale[:, None] - weight.float()).abs() <= 0.501 * scale[:, None]).all()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    linear_bytes = sum(tensor.nbytes for name, tensor in tensors(llama).items() if name in rounded)
    scales_bytes = weights_bytes(made) - (weights_bytes(llama) - linear_bytes / 2)
    assert 0 < scales_bytes < 0.1 * linear_bytes

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made / name).read_bytes() == (llama / name).read_bytes()
    config = json.loads((made / "config.json").read_text())
    said = config.pop("quantization_config")
    assert said == {"quant_method": "kserve_llm_int8", "modules_to_not_convert": []}
    assert config == json.loads((llama / "config.json").read_text())


def test_prepare_4bit_packs_layers_of_whole_groups_and_copies_other_tensors(
    run: Run, volume: Path, commit: str, llama: Path
) -> None:
    assert prepare(run, volume, variant=INT4_CPU).code == 0
    made = volume / "demo--arithmetic" / f"{commit}-{INT4_CPU}"
    before, after = tensors(llama), tensors(made)
    packed = {name for name, tensor in after.items() if tensor.dtype == torch.uint8}
    # The down projections have 137 inputs.
    assert len(packed) == tiny_llama.QUANTIZED - tiny_llama.LAYERS
    for name in packed:
        scale = after.pop(f"{name.removesuffix('weight')}scale").repeat_interleave(32, 1)
        halves = after.pop(name)
        weight = before.pop(name).float()
        integers = torch.stack((halves & 15, halves >> 4), -1).flatten(1).float() - 8
        assert (integers * scale - weight).norm() < 0.09 * weight.norm()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    said = json.loads((made / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "kserve_llm_int4", "modules_to_not_convert": []}


def test_prepare_variants_are_next_to_each_other(run: Run, volume: Path, commit: str) -> None:
    for variant in (INT8_CPU, INT4_CPU):
        assert prepare(run, volume, variant=variant).code == 0
    assert there(volume) == {commit, f"{commit}-{INT8_CPU}", f"{commit}-{INT4_CPU}"}
    again = prepare(run, volume)
    assert again.stdout.splitlines()[1].startswith("already prepared")


@VARIANTS
def test_prepare_index_maps_every_tensor_to_its_shard(run: Run, volume: Path, made: Path, variant: Variant) -> None:
    assert prepare(run, volume, variant=variant).code == 0
    index = json.loads((made / "model.safetensors.index.json").read_text())
    there: dict[str, str] = {}
    for path in made.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            there |= dict.fromkeys(opened.keys(), path.name)
    assert index["weight_map"] == there
    assert len(set(there.values())) == 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(made).values())


def test_prepare_skip_modules_are_not_quantized_and_recorded(run: Run, volume: Path, made: Path) -> None:
    keep = ("--prepare-skip-modules", "down_proj", "--prepare-skip-modules", r"model\.layers\.0")
    assert prepare(run, volume, *keep).code == 0
    kept = {
        name for name, tensor in tensors(made).items() if name.endswith("proj.weight") and tensor.is_floating_point()
    }
    assert len(kept) == 7 + (tiny_llama.LAYERS - 1)
    patterns = ["down_proj", r"model\.layers\.0"]
    said = json.loads((made / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == patterns
    assert json.loads((made / ".snapshot.json").read_text())["derived_from"]["skip_modules"] == patterns


def test_prepare_published_variant_imports_no_torch(run: Run, hub: LocalHub, volume: Path, made: Path) -> None:
    assert prepare(run, volume).code == 0
    before = made.stat().st_ino
    hub.forget()
    code = (
        "import sys\n"
        "from storage_initializer.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "sys.exit(code)"
    )
    words = ["--prepare", "int8-cpu", "--offline", "hf://demo/arithmetic", str(volume)]
    again = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [line.split(" hf:")[0] for line in again.stdout.splitlines()] == ["already published", "already prepared"]
    assert hub.requests == []
    assert made.stat().st_ino == before


def test_prepare_published_snapshot_downloads_nothing(run: Run, hub: LocalHub, volume: Path, made: Path) -> None:
    assert run("hf://demo/arithmetic", volume).code == 0
    assert not made.exists()
    hub.forget()
    result = run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_PREPARE": "int8-cpu"})
    assert result.code == 0, result.stderr
    assert sum(hub.downloads().values()) == 0
    assert problems(made) == []


@pytest.mark.parametrize("other", [{"version": 0}, {"version": 2}, {"skip_modules": ["down_proj"]}])
def test_prepare_replaces_variant_of_other_recipe(run: Run, volume: Path, made: Path, other: dict[str, object]) -> None:
    assert prepare(run, volume).code == 0
    path = made / ".snapshot.json"
    record = json.loads(path.read_text())
    record["derived_from"] |= other
    path.write_text(json.dumps(record))
    result = prepare(run, volume)
    assert result.code == 0, result.stderr
    assert "replacing a variant of another recipe" in result.stderr
    assert json.loads(path.read_text())["derived_from"] == record["derived_from"] | {"version": 1, "skip_modules": []}
    assert problems(made) == []
    assert list((volume / ".staging").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 4, FILES - 1])
def test_prepare_after_kill_starts_again(
    run: Run, environment: dict[str, str], volume: Path, commit: str, made: Path, after: int
) -> None:
    words = [str(after), "--prepare", "int8-cpu", "hf://demo/arithmetic", str(volume)]
    command = [sys.executable, "-m", "tests.programs.killed_initializer", *words]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert problems(made.with_name(commit)) == []
    assert not made.exists()
    [left] = (volume / ".staging").iterdir()
    assert left.name.startswith(f"demo--arithmetic@{commit}-int8-cpu.")
    # What is left may be anything.
    for path in left.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"half")

    again = run(
        "--prepare",
        "int8-cpu",
        "hf://demo/arithmetic",
        volume,
        env={"STORAGE_INITIALIZER_LOCK_STALE_SECONDS": "0.5"},
    )
    assert again.code == 0, again.stderr
    assert problems(made) == []
    assert list((volume / ".staging").iterdir()) == list((volume / ".locks").iterdir()) == []


def test_prepare_sigterm_leaves_no_files(
    run: Run, volume: Path, commit: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.RECIPES[INT8_CPU]

    def interrupted(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return recipe.quantize(weight)

    with monkeypatch.context() as patch:
        patch.setattr(quantized_checkpoint, "RECIPES", {INT8_CPU: replace(recipe, quantize=interrupted)})
        result = prepare(run, volume)
    assert result.code == 1
    assert result.reason == "Stopped by SIGTERM. Run the same command again to resume."
    assert problems(made.with_name(commit)) == []
    assert not made.exists()
    assert list((volume / ".staging").iterdir()) == list((volume / ".locks").iterdir()) == []


@pytest.mark.slow
def test_prepare_four_processes_publish_once(environment: dict[str, str], volume: Path, made: Path) -> None:
    words = ["--prepare", "int8-cpu", "hf://demo/arithmetic", str(volume)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "storage_initializer", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    results = [finish(process) for process in processes]
    assert [result.code for result in results] == [0] * 4, [result.stderr for result in results]
    assert sorted(result.stdout.splitlines()[1].split()[0] for result in results) == ["already"] * 3 + ["prepared"]
    assert problems(made) == []


def test_prepare_without_torch_fails_before_download(
    run: Run, hub: LocalHub, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Makes the import fail.
    monkeypatch.setitem(sys.modules, "torch", None)
    result = prepare(run, volume)
    assert result.code == 2
    assert result.reason == (
        "--prepare int8-cpu needs torch, which are not installed. "
        "Use the image that is built with --target prepare, or install kserve-llm[prepare]."
    )
    assert hub.requests == []
    assert run("hf://demo/arithmetic", volume).code == 0


def test_prepare_damaged_source_is_rejected(run: Run, volume: Path, commit: str, made: Path) -> None:
    assert run("hf://demo/arithmetic", volume).code == 0
    tokenizer = made.with_name(commit) / "tokenizer.json"
    tokenizer.write_bytes(b"x" + tokenizer.read_bytes()[1:])
    result = prepare(run, volume)
    assert result.code == 2
    assert f"{made.with_name(commit)} is damaged: tokenizer.json has sha256" in result.reason
    assert not made.exists()
    assert list((volume / ".staging").iterdir()) == []


def refused(run: Run, hub: LocalHub, volume: Path, model: Path) -> str:
    """Why it is not prepared; it is published all the same."""
    hub.add("demo/other", model)
    result = run("--prepare", "int8-cpu", "--allow-pickle", "hf://demo/other", volume)
    assert result.code == 2
    assert result.stdout.startswith("published hf://demo/other@")
    assert len(result.stdout.splitlines()) == 1
    assert list((volume / ".staging").iterdir()) == list((volume / ".locks").iterdir()) == []
    assert "Traceback" not in result.stderr
    return result.reason


def copy(model: Path, to: Path, **config: object) -> Path:
    to.mkdir()
    for path in model.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    fields = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(fields | config))
    return to


def test_prepare_pickles_are_never_opened(run: Run, hub: LocalHub, volume: Path, llama: Path, tmp_path: Path) -> None:
    model = copy(llama, tmp_path / "pickled")
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")
    assert "has no weights as safetensors, so it cannot be prepared" in refused(run, hub, volume, model)


def test_prepare_quantized_checkpoint_is_rejected(
    run: Run, hub: LocalHub, volume: Path, llama: Path, tmp_path: Path
) -> None:
    model = copy(llama, tmp_path / "quantized", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantized. Remove --prepare" in refused(run, hub, volume, model)


def test_prepare_remote_code_is_rejected(run: Run, hub: LocalHub, volume: Path, llama: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    model = copy(llama, tmp_path / "remote", model_type="unheard-of", auto_map=auto_map)
    (model / "modeling.py").write_text(f"open({str(ran)!r}, 'w')\n")
    assert "without remote code, so it cannot be prepared" in refused(run, hub, volume, model)
    assert not ran.exists()


def test_prepare_assembled_weights_are_rejected(
    run: Run, hub: LocalHub, volume: Path, llama: Path, tmp_path: Path
) -> None:
    model = copy(llama, tmp_path / "apart")
    weights = tensors(model)
    for path in model.glob("*.safetensors*"):
        path.unlink()
    whole = weights.pop("model.layers.1.mlp.up_proj.weight")
    weights |= {
        "model.layers.1.mlp.up_proj.left": whole[:7].clone(),
        "model.layers.1.mlp.up_proj.right": whole[7:].clone(),
    }
    save_file(weights, model / "model.safetensors")
    reason = refused(run, hub, volume, model)
    assert "transformers assembles model.layers.1.mlp.up_proj from other tensors while loading" in reason


def test_prepare_unreadable_weights_are_rejected(
    run: Run, hub: LocalHub, volume: Path, llama: Path, tmp_path: Path
) -> None:
    model = copy(llama, tmp_path / "broken")
    shard = next(model.glob("*.safetensors"))
    # A header whose length is right, of a dtype that does not exist.
    shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"BF99"', 1))
    assert "has unreadable weights" in refused(run, hub, volume, model)


def test_prepare_reads_index_with_paths_into_a_folder(
    run: Run, hub: LocalHub, volume: Path, llama: Path, tmp_path: Path
) -> None:
    model = copy(llama, tmp_path / "folder")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    (model / "weights").mkdir()
    for path in model.glob("*.safetensors"):
        path.rename(model / "weights" / path.name)
    index["weight_map"] = {tensor: f"weights/{shard}" for tensor, shard in index["weight_map"].items()}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "consolidated.safetensors").write_bytes(b"never opened")
    commit = hub.add("demo/arithmetic", model)
    assert prepare(run, volume).code == 0
    made = volume / "demo--arithmetic" / f"{commit}-int8-cpu"
    assert problems(made) == []
    assert {path.name for path in (made / "weights").iterdir()} == {path.name for path in llama.glob("*.safetensors")}
    assert not (made / "consolidated.safetensors").exists()
    written = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(written) > set(index["weight_map"])
    assert set(written.values()) == set(index["weight_map"].values())


@pytest.mark.parametrize("words", [["--prepare", "4bit"], ["--prepare"]])
def test_prepare_unknown_variant_is_rejected(run: Run, volume: Path, words: list[str]) -> None:
    assert run("hf://demo/arithmetic", volume, *words).code == 2
    said = run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_PREPARE": "4bit"})
    assert said.code == 2
    assert "STORAGE_INITIALIZER_PREPARE has an invalid value: Input should be 'int8-cpu' or 'int4-cpu'" in said.reason


def test_prepare_variant_is_listed_and_verified(run: Run, volume: Path, made: Path) -> None:
    assert prepare(run, volume).code == 0
    listed = run("list", volume).stdout.splitlines()
    assert sum(line.startswith(f"demo--arithmetic/{made.name} ") for line in listed) == 1
    assert any("0 min  int8-cpu  hf://demo/arithmetic:main" in line for line in listed)
    assert f"verified {made}: sizes and checksums of {FILES} files" in run("verify", made).stdout
    weights = next(made.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert f"{made} is damaged, 1 files differ" in run("verify", made).reason


@pytest.fixture
def two(run: Run, hub: LocalHub, volume: Path, commit: str, llama: Path, tmp_path: Path) -> tuple[str, str]:
    """The commits of two snapshots that are both prepared, the older one first."""
    assert prepare(run, volume).code == 0
    new = hub.add("demo/arithmetic", copy(llama, tmp_path / "newer", bos_token_id=3))
    assert prepare(run, volume).code == 0
    record = volume / "demo--arithmetic" / commit / ".snapshot.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"published_at": "2026-01-01T00:00:00Z"}))
    return commit, new


def there(volume: Path) -> set[str]:
    return {path.name for path in (volume / "demo--arithmetic").iterdir()} - {"refs"}


def test_gc_removes_variant_with_its_source(run: Run, volume: Path, two: tuple[str, str]) -> None:
    old, new = two
    everything = {old, new, f"{old}-int8-cpu", f"{new}-int8-cpu"}
    assert run("gc", volume, "--keep", "2").stdout.startswith("removed 0 in all")
    dry = run("gc", volume, "--dry-run").stdout.splitlines()
    assert [line.partition(":")[0] for line in dry[:2]] == [
        f"would remove demo--arithmetic/{old}-int8-cpu",
        f"would remove demo--arithmetic/{old}",
    ]
    assert there(volume) == everything

    assert "removed 2 in all" in run("gc", volume).stdout
    assert there(volume) == {new, f"{new}-int8-cpu"}
    assert run("gc", volume, "--reference", f"hf://demo/arithmetic:{new}", "--force").code == 0
    assert there(volume) == set()
    assert list((volume / ".staging").iterdir()) == list((volume / ".locks").iterdir()) == []


def test_gc_removes_variant_without_source(run: Run, volume: Path, two: tuple[str, str]) -> None:
    old, new = two
    (volume / "demo--arithmetic" / old).rename(volume / "moved-away")
    assert "removed 1 in all" in run("gc", volume).stdout
    assert there(volume) == {new, f"{new}-int8-cpu"}


def test_gc_keeps_snapshot_that_is_being_prepared(run: Run, volume: Path, two: tuple[str, str]) -> None:
    old, _ = two
    before = there(volume)
    lease = volume / ".locks" / f"demo--arithmetic@{old}.lease"
    lease.write_text(json.dumps({"token": "0" * 16, "name": "other:7"}))
    staging = volume / ".staging" / f"demo--arithmetic@{old}-int8-cpu.{'0' * 16}"
    staging.mkdir()
    assert run("gc", volume).code == 0
    assert there(volume) == before
    assert staging.exists()
    os.utime(lease, (0, 0))
    assert run("gc", volume).code == 0
    assert not staging.exists()
    assert not lease.exists()


# The files themselves


def write(plan: quantized_checkpoint.QuantizedCheckpoint, directory: Path) -> None:
    directory.mkdir()
    for draft in plan.files:
        content = b"".join(draft.chunks())
        assert len(content) == draft.size_bytes
        (directory / draft.path).write_bytes(content)


@VARIANTS
def test_plan_block_size_bounds_memory_and_keeps_bytes(llama: Path, tmp_path: Path, variant: Variant) -> None:
    write(quantized_checkpoint.plan(variant, llama, "model", ()), tmp_path / "whole")
    plan = quantized_checkpoint.plan(variant, llama, "model", (), block_elements=200)
    write(plan, tmp_path / "blocks")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "blocks" / path.name).read_bytes()
    blocks = [chunk for file in plan.files if file.path.endswith(".safetensors") for chunk in list(file.chunks())[1:]]
    assert max(map(len, blocks)) <= 200 * 4


@pytest.mark.parametrize(("dtype", "rounded_in"), [("float32", "float32"), ("float16", "bfloat16")])
def test_plan_casts_to_the_predictors_dtype(tmp_path: Path, variant: Variant, dtype: str, rounded_in: str) -> None:
    model = tiny_llama.make(tmp_path / "model", dtype=getattr(torch, dtype), tied=True)
    plan = quantized_checkpoint.plan(variant, model, "it", ())
    assert plan.dtype == rounded_in
    assert [draft.path for draft in plan.files] == ["model.safetensors", "config.json"]


def test_plan_without_dtype_in_config_is_float32(llama: Path, tmp_path: Path, variant: Variant) -> None:
    model = copy(llama, tmp_path / "unsaid", dtype=None)
    assert quantized_checkpoint.plan(variant, model, "it", ()).dtype == "float32"


def test_plan_odd_sizes_scalars_and_empty_tensors_are_aligned(tmp_path: Path, variant: Variant) -> None:
    model = tiny_llama.make(tmp_path / "model", hidden_size=20)
    weights = tensors(model)
    extra = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "one": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "odder": torch.arange(5, dtype=torch.bfloat16),
    }
    save_file(weights | extra, model / "model.safetensors", metadata={"format": "pt"})
    write(quantized_checkpoint.plan(variant, model, "it", ()), tmp_path / "made")
    path = tmp_path / "made" / "model.safetensors"
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    items = {"F64": 8, "F32": 4, "BF16": 2}
    assert header_bytes % 8 == 0
    assert all(
        tensor["data_offsets"][0] % items.get(tensor["dtype"], 1) == 0
        for name, tensor in header.items()
        if name != "__metadata__"
    )
    assert any(math.prod(tensor["shape"]) % 8 for name, tensor in header.items() if name != "__metadata__")
    made = load_file(path)
    assert all(torch.equal(made[name], tensor) for name, tensor in extra.items())


def test_quantize_all_zero_row_has_positive_scale() -> None:
    zeros = torch.zeros(2, 8, dtype=torch.bfloat16)
    weight, scale = recipes.quantize_int8(zeros)
    assert torch.equal(weight, zeros.to(torch.int8))
    assert (scale > 0).all()
