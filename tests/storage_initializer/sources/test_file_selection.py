"""Which files of a repository become the snapshot, as patterns and settings say."""

import hashlib
import json
import posixpath
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devtools.local_hub import LocalHub
from snapshot_format import model_files
from snapshot_format.record import File, FileSelection
from storage_initializer.errors import RefusedSnapshot
from storage_initializer.sources import file_selection
from tests.storage_initializer.conftest import Run, make_model, problems


def published(volume: Path) -> set[str]:
    (snapshot,) = (path for path in volume.glob("*--*/*") if path.name != "refs")
    assert problems(snapshot) == []
    return {file["path"] for file in json.loads((snapshot / ".snapshot.json").read_text())["files"]}


ALL = {"config.json", "tokenizer.json", "README.md", "model.safetensors"}


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        (["--ignore", "*.md"], {}, ALL - {"README.md"}),
        (["--allow", "*.json", "--allow", "*.safetensors"], {}, ALL - {"README.md"}),
        (["--allow", "*.json", "--ignore", "tok*"], {}, {"config.json"}),
        ([], {"STORAGE_IGNORE_PATTERNS": "*.md,tokenizer.*"}, ALL - {"README.md", "tokenizer.json"}),
        ([], {"STORAGE_IGNORE_PATTERNS": '["*.md", "tokenizer.*"]'}, ALL - {"README.md", "tokenizer.json"}),
        ([], {"STORAGE_ALLOW_PATTERNS": '["config.json", "model*"]'}, {"config.json", "model.safetensors"}),
        (["--ignore", "nothing"], {"STORAGE_IGNORE_PATTERNS": "*.md"}, ALL),
    ],
)
def test_patterns_select_published_files(
    run: Run, volume: Path, flags: list[str], env: dict[str, str], expected: set[str]
) -> None:
    assert run(*flags, "hf://demo/arithmetic", volume, env=env).code == 0
    assert published(volume) == expected


def test_pattern_crosses_folders_and_trailing_slash_matches_all_below(
    run: Run, hub: LocalHub, model: Path, volume: Path
) -> None:
    for name in ("onnx/a/b.json", "original/c.json", "notes/d.json"):
        (model / name).parent.mkdir(parents=True)
        (model / name).write_text("{}")
    hub.add("demo/nested", model)
    assert run("--allow", "*", "--ignore", "onnx/*", "--ignore", "original/", "hf://demo/nested", volume).code == 0
    assert published(volume) == ALL | {"notes/d.json"}


def test_patterns_without_match_are_rejected(run: Run, volume: Path) -> None:
    result = run("--allow", "*.gguf", "hf://demo/arithmetic", volume)
    assert result.code == 2
    assert result.reason == (
        "hf://demo/arithmetic:main has no file that matches the patterns. Check --allow and --ignore."
    )


def test_invalid_pattern_variable_is_rejected(run: Run, volume: Path) -> None:
    result = run("hf://demo/arithmetic", volume, env={"STORAGE_ALLOW_PATTERNS": '["*.json"'})
    assert result.code == 2
    assert result.reason.startswith("STORAGE_ALLOW_PATTERNS has an invalid value: expected a JSON list")


def test_published_commit_with_other_patterns_is_rejected(run: Run, hub: LocalHub, volume: Path) -> None:
    assert run("--ignore", "*.md", "hf://demo/arithmetic", volume).code == 0
    assert run("--ignore", "*.md", "hf://demo/arithmetic", volume).code == 0
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 2
    assert "was published with --ignore *.md, not with no patterns. Use the same" in result.reason
    assert f"gc {volume} --reference hf://demo/arithmetic:{hub.commit('demo/arithmetic')} --force" in result.reason


@pytest.mark.parametrize(
    ("flags", "env"), [(["--allow-pickle"], {}), ([], {"STORAGE_INITIALIZER_ALLOW_PICKLE": "true"})]
)
def test_pickles_are_published_only_if_allowed(
    run: Run, hub: LocalHub, model: Path, volume: Path, flags: list[str], env: dict[str, str]
) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.gguf").write_bytes(b"of another engine")
    hub.add("demo/pickle", model)
    refused = run("hf://demo/pickle", volume)
    assert refused.code == 2
    assert "STORAGE_INITIALIZER_ALLOW_PICKLE=true" in refused.reason
    assert run(*flags, "hf://demo/pickle", volume, env=env).code == 0
    assert published(volume) == ALL - {"model.safetensors"} | {"pytorch_model.bin"}


def test_safetensors_are_preferred_over_allowed_pickles(run: Run, volume: Path) -> None:
    assert run("--allow-pickle", "hf://demo/arithmetic", volume).code == 0
    assert published(volume) == ALL
    assert "nothing to do" in run("hf://demo/arithmetic", volume).stdout


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "BIN", "safetensors", *model_files.FOREIGN_WEIGHTS])
def test_weights_that_are_not_loaded_are_excluded_even_if_a_pattern_matches(
    run: Run, hub: LocalHub, model: Path, volume: Path, suffix: str
) -> None:
    (model / f"weights.{suffix.removeprefix('.')}").write_bytes(b"weights")
    hub.add("demo/many", model)
    result = run("--allow", "*", "hf://demo/many", volume)
    assert f"weights.{suffix.removeprefix('.')}" in result.stderr
    assert published(volume) == ALL


SETTINGS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
SHARDS = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
INDEX = "model.safetensors.index.json"
NO_PATTERNS = FileSelection()


def listing(paths: Iterable[str]) -> list[File]:
    return [File(path, 100, "0" * 64) for path in paths]


def index_of(shards: Iterable[str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"layer of {shard}": shard for shard in shards}}).encode()


def plan(paths: Iterable[str], selection: FileSelection = NO_PATTERNS, shards: Iterable[str] = SHARDS) -> set[str]:
    made = file_selection.make_plan(listing(paths), "hf://demo/many", selection, lambda _: index_of(shards))
    return {file.path for file in made.files}


@pytest.mark.parametrize(
    ("needed", "useless"),
    [
        (
            {"model.safetensors", "vocab.json", "merges.txt", "README.md"},
            {"pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "64.tflite", "64-fp16.tflite"}
            | {
                "onnx/config.json",
                "onnx/decoder_model.onnx",
                "onnx/tokenizer.json",
                "coreml/fp32.mlpackage/weight.bin",
            },
        ),
        (
            {*SHARDS, INDEX, "params.json", "tokenizer.model", "tokenizer.model.v3", "LICENSE"},
            {"consolidated.safetensors", "original/consolidated.00.pth", "original/params.json", "banner.png"},
        ),
        (
            {"model.safetensors", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"},
            {"onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_q4.onnx", "onnx/model_fp16.onnx_data_1"},
        ),
        (
            {"model.safetensors", "special_tokens_map.json", "NOTICE.txt"},
            {"model.fp16.safetensors", "model.pte", "model.nemo", "adapter_model.safetensors", "adapter_config.json"}
            | {"openvino/openvino_model.xml", "openvino/openvino_model.bin", "runs/events.out.tfevents.1"}
            | {"checkpoint-500/model.safetensors", "checkpoint-500/optimizer.safetensors", "training_args.bin"}
            | {"checkpoint-500/trainer_state.json", "eval/results.jsonl", "data/train.parquet", "train.parquet"}
            | {"pytorch_model.bin.index.json", "modeling_custom.py", "run.sh"},
        ),
        (
            {"model.safetensors", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"},
            {"1_Pooling/model.onnx", "openvino/openvino_model_qint8_quantized.bin"},
        ),
        # transformers prefers the single file, so an index next to it and what it names are not needed.
        ({"model.safetensors"}, {INDEX, *SHARDS}),
        ({"gptq-4bit.safetensors", "quantize_config.json"}, {"adapter_model.safetensors"}),
    ],
    ids=["gpt2", "mistral", "onnx", "variants", "sentence-transformers", "index-and-single", "other-name"],
)
def test_make_plan_selects_what_is_loaded(needed: set[str], useless: set[str]) -> None:
    assert plan(SETTINGS | needed | useless) == SETTINGS | needed


def test_make_plan_index_with_paths_into_a_folder_selects_these() -> None:
    shards = {f"weights/{shard}" for shard in SHARDS}
    assert plan({*SETTINGS, INDEX, *shards, *SHARDS}, shards=shards) == {*SETTINGS, INDEX, *shards}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (FileSelection(ignore=("model*",)), {"consolidated.safetensors"}),
        (FileSelection(ignore=("*.safetensors*",), pickle=True), {"pytorch_model.bin"}),
        (FileSelection(allow=("*.json", "*.safetensors", "*.py")), {*SHARDS, INDEX, "modeling_custom.py"}),
        (FileSelection(allow=("*",)), {*SHARDS, INDEX, "modeling_custom.py", "data/train.parquet"}),
        (FileSelection(ignore=("*.safetensors*",)), set()),
    ],
    ids=["other-weights", "pickles", "code", "everything", "no-weights"],
)
def test_make_plan_patterns_come_first(selection: FileSelection, expected: set[str]) -> None:
    paths = {
        *SHARDS,
        INDEX,
        "consolidated.safetensors",
        "pytorch_model.bin",
        "modeling_custom.py",
        "data/train.parquet",
    }
    assert plan(SETTINGS | paths, selection) == SETTINGS | expected


def test_make_plan_sharded_pickles_select_shards_of_their_index() -> None:
    shards = {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}
    paths = {*SETTINGS, *shards, "pytorch_model.bin.index.json", "training_args.bin", "optimizer.pt"}
    selected = plan(paths, FileSelection(pickle=True), shards)
    assert selected == {*SETTINGS, *shards, "pytorch_model.bin.index.json"}


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (
            {"pytorch_model.bin"},
            r"at its top \(only pytorch_model\.bin\)\. .* convert the weights: .*ALLOW_PICKLE=true",
        ),
        ({"a-Q4_K_M.gguf"}, r"\(only a-Q4_K_M\.gguf\)\. GGUF is not supported: use the model from which"),
        ({"adapter_config.json", "adapter_model.safetensors"}, r"is an adapter \(adapter_model\.safetensors\) without"),
        ({"a.safetensors", "b.safetensors"}, r"neither model\.safetensors nor .*, only a\.safetensors, b\.safetensors"),
        ({"model-00001-of-00002.safetensors"}, r"only model-00001-of-00002\.safetensors\. Use a complete revision"),
        ({"checkpoint-5/model.safetensors"}, r"at its top \(only checkpoint-5/model\.safetensors\)\. Use a revision"),
        (set(), r"\(no weights at all\)\. Use a revision or repository that has them\.$"),
    ],
    ids=["pickle", "gguf", "adapter", "ambiguous", "shard-without-index", "folder", "none"],
)
def test_make_plan_without_loadable_weights_names_what_was_found(paths: set[str], reason: str) -> None:
    with pytest.raises(RefusedSnapshot, match=f"^hf://demo/many .*{reason}"):
        plan(SETTINGS | paths)


def test_make_plan_patterns_that_exclude_the_index_are_rejected() -> None:
    with pytest.raises(RefusedSnapshot, match=r"has neither .* The patterns exclude the rest: check --allow\.$"):
        plan({*SETTINGS, *SHARDS, INDEX}, FileSelection(allow=("config.json", "*.safetensors")))


def test_make_plan_index_never_selects_pickles() -> None:
    with pytest.raises(
        RefusedSnapshot, match=r"unreadable model\.safetensors\.index\.json \(its weight_map names files"
    ):
        plan({*SETTINGS, INDEX, "pytorch_model.bin"}, shards={"pytorch_model.bin"})


def test_make_plan_large_index_is_not_read() -> None:
    files = [*listing(SETTINGS | SHARDS), File(INDEX, file_selection.MAX_INDEX_BYTES + 1, "0" * 64)]
    with pytest.raises(RefusedSnapshot, match=r"unreadable model\.safetensors\.index\.json \(it has more than"):
        file_selection.make_plan(files, "hf://demo/many", FileSelection(), lambda _: b"")


def test_hub_sends_only_what_is_loaded(run: Run, hub: LocalHub, volume: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "sharded", shards=2)
    needed = {path.name for path in model.iterdir()} - {".gitattributes", "pytorch_model.bin"}
    for path in ("consolidated.safetensors", "onnx/model.onnx_data", "checkpoint-500/model.safetensors"):
        (model / path).parent.mkdir(exist_ok=True)
        (model / path).write_bytes(b"useless")
    hub.add("demo/sharded", model)
    assert run("hf://demo/sharded", volume).code == 0
    assert published(volume) == set(hub.downloads()) == needed


def test_log_names_the_first_excluded_files_of_many(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    (model / "data").mkdir()
    for number in range(100):
        (model / "data" / f"{number:02}.parquet").write_bytes(b"")
    hub.add("demo/data", model)
    planned = next(line for line in run("hf://demo/data", volume).stderr.splitlines() if ", excluding " in line)
    assert planned.endswith("data/18.parquet, data/19.parquet and 81 more")


def test_snapshot_that_was_published_with_more_files_stays_valid(run: Run, hub: LocalHub, volume: Path) -> None:
    assert run("hf://demo/arithmetic", volume).code == 0
    snapshot = volume / "demo--arithmetic" / hub.commit("demo/arithmetic")
    (snapshot / "consolidated.safetensors").write_bytes(b"more")
    record = json.loads((snapshot / ".snapshot.json").read_text())
    record["files"].append(
        {"path": "consolidated.safetensors", "size": 4, "sha256": hashlib.sha256(b"more").hexdigest()}
    )
    (snapshot / ".snapshot.json").write_text(json.dumps(record))
    hub.forget()
    assert "nothing to do" in run("hf://demo/arithmetic", volume).stdout
    assert run("verify", snapshot).code == 0
    assert not hub.downloads()


def test_directory_fingerprint_ignores_weights_that_are_not_loaded(run: Run, model: Path, volume: Path) -> None:
    assert run(f"file://{model}", volume).code == 0
    (model / "consolidated.safetensors").write_bytes(b"useless")
    assert "nothing to do" in run(f"file://{model}", volume).stdout


@pytest.mark.parametrize("excluded", [False, True])
def test_missing_shard_fails_before_weights_are_fetched(
    run: Run, hub: LocalHub, volume: Path, tmp_path: Path, excluded: bool
) -> None:
    model = make_model(tmp_path / "sharded", shards=3)
    if not excluded:
        (model / "model-00002-of-00003.safetensors").unlink()
    hub.add("demo/sharded", model)
    flags = ["--ignore", "*00002*"] if excluded else []
    result = run(*flags, "hf://demo/sharded", volume)
    assert result.code == 2
    assert "misses model-00002-of-00003.safetensors of its model.safetensors.index.json" in result.reason
    assert set(hub.downloads()) == {"model.safetensors.index.json"}


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": 1}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": 1}}']
)
def test_unreadable_index_is_rejected(run: Run, hub: LocalHub, volume: Path, tmp_path: Path, index: str) -> None:
    model = make_model(tmp_path / "sharded", shards=2)
    (model / "model.safetensors.index.json").write_text(index)
    hub.add("demo/sharded", model)
    result = run("hf://demo/sharded", volume)
    assert result.code == 2
    assert "has an unreadable model.safetensors.index.json" in result.reason


def test_index_with_path_outside_is_rejected(run: Run, hub: LocalHub, volume: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "sharded", shards=2)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    hub.add("demo/sharded", model)
    assert run("hf://demo/sharded", volume).code == 2


PATHS = st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=10), min_size=1, max_size=4)
"""Includes surrogates, which a JSON listing may contain."""


@given(PATHS, st.sampled_from(["", "/"]))
def test_check_safe_path_accepts_only_paths_below_the_directory(parts: list[str], root: str) -> None:
    path = root + "/".join(parts)
    try:
        file_selection.check_safe_path(path, "hf://demo/arithmetic")
    except RefusedSnapshot:
        return
    joined = posixpath.normpath(posixpath.join("/snapshot", path))
    assert joined == f"/snapshot/{path}"
    assert "\\" not in path


@pytest.mark.parametrize(
    "path", ["", "/", "..", "../x", "x/..", "a//b", "./x", "x/", "C:/x", "x\\y", "a\nb", "x" * 250]
)
def test_check_safe_path_rejects(path: str) -> None:
    with pytest.raises(RefusedSnapshot):
        file_selection.check_safe_path(path, "hf://demo/arithmetic")


@given(st.lists(st.builds(File, path=st.text(max_size=20), size_bytes=st.integers(0), sha256=st.just("0" * 64))))
def test_make_plan_selects_safe_visible_files_only(listing: list[File]) -> None:
    needed = [File("config.json", 2, "0" * 64), File("model.safetensors", 2, "0" * 64)]
    try:
        chosen = file_selection.make_plan(
            [*listing, *needed], "hf://demo/arithmetic", FileSelection(), lambda _: b"unused"
        )
    except RefusedSnapshot:
        return
    for file in chosen.files:
        file_selection.check_safe_path(file.path, "hf://demo/arithmetic")
        assert not any(part.startswith(".") for part in file.path.split("/"))


def test_fingerprint_depends_on_every_path_size_and_checksum() -> None:
    file = File("config.json", 2, "0" * 64)
    prints = {
        file_selection.Plan((file,)).fingerprint,
        file_selection.Plan((File("config.jsom", 2, "0" * 64),)).fingerprint,
        file_selection.Plan((File("config.json", 3, "0" * 64),)).fingerprint,
        file_selection.Plan((File("config.json", 2, "1" * 64),)).fingerprint,
    }
    assert len(prints) == 4
    assert file_selection.Plan((file,)).fingerprint == file_selection.Plan((file,), excluded=("a.bin",)).fingerprint
