"""Which files of a repository become the snapshot, as patterns and settings say."""

import json
import posixpath
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devtools.local_hub import LocalHub
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
    for name in ("onnx/a/b.json", "original/c.json"):
        (model / name).parent.mkdir(parents=True)
        (model / name).write_text("{}")
    hub.add("demo/nested", model)
    assert run("--ignore", "onnx/*", "--ignore", "original/", "hf://demo/nested", volume).code == 0
    assert published(volume) == ALL


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


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "h5", "msgpack", "onnx", "gguf", "BIN"])
def test_foreign_weight_formats_are_excluded(run: Run, hub: LocalHub, model: Path, volume: Path, suffix: str) -> None:
    (model / f"weights.{suffix}").write_bytes(b"weights")
    hub.add("demo/many", model)
    result = run("hf://demo/many", volume)
    assert f"weights.{suffix}" in result.stderr
    assert published(volume) == ALL


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
        chosen = file_selection.make_plan([*listing, *needed], "hf://demo/arithmetic", FileSelection())
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
