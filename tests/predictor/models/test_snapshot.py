"""Tests of `predictor.models.snapshot`: lookup of snapshots and prequantized variants."""

import json
import re
from pathlib import Path

import pytest

from predictor.errors import InvalidSettings, SnapshotMissing
from predictor.models import snapshot
from snapshot_format.recipe import INT4_CPU, INT8_CPU
from snapshot_format.record import RECORD as RECORD_NAME

COMMIT = "0123456789abcdef0123456789abcdef01234567"

RECORD = {
    "format_version": 1,
    "reference": "hf://owner/model:main",
    "commit": COMMIT,
    "files": [{"path": "config.json", "size": 2, "sha256": "-"}],
    "choice": {},
    "derived_from": None,
    "tool": "test",
    "published_at": "2026-11-24T04:00:13Z",
    "duration_seconds": 1.0,
}


def publish(root: Path, folder: str = "owner--model", ref: str = "main") -> Path:
    directory = root / folder / COMMIT
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / RECORD_NAME).write_text(json.dumps(RECORD))
    refs = root / folder / "refs"
    refs.mkdir()
    (refs / ref).write_text(COMMIT + "\n")
    return directory


@pytest.mark.parametrize(
    ("reference", "folder", "ref"),
    [
        ("hf://owner/model", "owner--model", "main"),
        ("hf://owner/model:v1.0", "owner--model", "v1.0"),
        ("hf://owner/model@refs/pr/4", "owner--model", "refs%2Fpr%2F4"),
        (f"hf://owner/model:{COMMIT}", "owner--model", "unused"),
        ("file:///data/my-model/", "file--my-model", "main"),
        ("file:///data/my%20model", "file--my%20model", "main"),
    ],
)
def test_find_reference_returns_its_snapshot(tmp_path: Path, reference: str, folder: str, ref: str) -> None:
    directory = publish(tmp_path, folder, ref)
    assert snapshot.find(tmp_path, reference) == snapshot.Snapshot(directory, COMMIT)


def test_find_directory_without_record_returns_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert snapshot.find(tmp_path, None) == snapshot.Snapshot(tmp_path, None)


def test_find_published_directory_returns_its_commit(tmp_path: Path) -> None:
    directory = publish(tmp_path)
    assert snapshot.find(directory, None).commit == COMMIT


def test_find_unpublished_reference_raises_with_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        SnapshotMissing, match=r"hf://owner/model is not published in .*`python -m storage_initializer hf"
    ):
        snapshot.find(tmp_path, "hf://owner/model")


def test_find_missing_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(SnapshotMissing, match="nowhere is not a directory"):
        snapshot.find(tmp_path / "nowhere", None)


def test_find_volume_root_without_reference_raises(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(SnapshotMissing, match=r"has no config.json. .* --model_reference"):
        snapshot.find(tmp_path, None)


def test_find_snapshot_without_record_raises(tmp_path: Path) -> None:
    (publish(tmp_path) / RECORD_NAME).unlink()
    with pytest.raises(SnapshotMissing, match="was not published by the storage initializer"):
        snapshot.find(tmp_path, "hf://owner/model")


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({**RECORD, "files": [7]})])
def test_find_unreadable_record_raises(tmp_path: Path, text: str) -> None:
    (publish(tmp_path) / RECORD_NAME).write_text(text)
    with pytest.raises(SnapshotMissing, match="is not a record"):
        snapshot.find(tmp_path, "hf://owner/model")


def test_find_other_format_version_raises(tmp_path: Path) -> None:
    (publish(tmp_path) / RECORD_NAME).write_text(json.dumps({**RECORD, "format_version": 2}))
    with pytest.raises(SnapshotMissing, match="has format version 2, and this predictor reads 1"):
        snapshot.find(tmp_path, "hf://owner/model")


def test_find_damaged_snapshot_names_the_file(tmp_path: Path) -> None:
    directory = publish(tmp_path)
    (directory / "config.json").write_text("{ }")
    with pytest.raises(SnapshotMissing, match=r"config.json has 3 of 2 bytes"):
        snapshot.find(tmp_path, "hf://owner/model")
    (directory / "config.json").unlink()
    with pytest.raises(SnapshotMissing, match=r"config.json is missing"):
        snapshot.find(tmp_path, "hf://owner/model")


@pytest.mark.parametrize("reference", ["s3://bucket/key", "owner/model", "hf://model", "hf://a/b/c", "file://relative"])
def test_find_malformed_reference_raises_with_grammar(tmp_path: Path, reference: str) -> None:
    with pytest.raises(InvalidSettings, match="Expected hf://owner/model, hf://owner/model:revision or file:///"):
        snapshot.find(tmp_path, reference)


def test_wait_returns_snapshot_published_meanwhile(tmp_path: Path) -> None:
    slept: list[float] = []

    def publish_meanwhile(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            publish(tmp_path)

    published = snapshot.wait(tmp_path, "hf://owner/model", timeout_seconds=3600, sleep=publish_meanwhile)
    assert published.commit == COMMIT
    assert len(slept) == 2


def test_wait_timeout_raises(tmp_path: Path) -> None:
    with pytest.raises(SnapshotMissing):
        snapshot.wait(tmp_path, "hf://owner/model", timeout_seconds=0)


def derive(directory: Path, **changes: object) -> Path:
    """Create the int8 variant of a snapshot."""
    variant = directory.with_name(f"{directory.name}-int8-cpu")
    variant.mkdir()
    (variant / "config.json").write_text("{}")
    recipe = {"recipe": "int8-cpu", "version": 1, "dtype": "bfloat16", "skip_modules": ["a", "b"]}
    commit = changes.pop("commit", COMMIT)
    record = RECORD | {"commit": commit, "derived_from": recipe | changes}
    (variant / RECORD_NAME).write_text(json.dumps(record))
    return variant


def test_prequantized_returns_matching_variant_also_through_a_link(tmp_path: Path) -> None:
    directory = publish(tmp_path)
    assert snapshot.prequantized(directory, INT8_CPU, "bfloat16", ["b", "a"]) is None
    variant = derive(directory)
    assert snapshot.prequantized(directory, INT8_CPU, "bfloat16", ["b", "a"]) == variant
    (tmp_path / "link").symlink_to(directory)
    assert snapshot.prequantized(tmp_path / "link", INT8_CPU, "bfloat16", ["b", "a"]) == variant
    assert snapshot.find(tmp_path, "hf://owner/model").directory == directory
    assert snapshot.prequantized(directory, INT4_CPU, "bfloat16", ["b", "a"]) is None


@pytest.mark.parametrize("directory", [".", "/"])
def test_prequantized_unpublished_directory_has_no_variant(directory: str) -> None:
    assert snapshot.prequantized(Path(directory), INT8_CPU, "bfloat16", []) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "uses recipe int8-cpu version 2 instead of int8-cpu version 1"),
        ({"recipe": "4bit-cpu"}, "uses recipe 4bit-cpu version 1 instead of int8-cpu version 1"),
        ({"commit": "f" * 40}, "derived from ffff"),
        ({"dtype": "float32"}, "quantized from float32 instead of bfloat16"),
        ({"skip_modules": []}, r"skips modules \[\] instead of \['b', 'a'\]"),
        ({"skip_modules": None}, "not iterable"),
    ],
    ids=["version", "recipe", "commit", "dtype", "skip_modules", "malformed"],
)
def test_prequantized_different_variant_is_skipped_with_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, object], reason: str
) -> None:
    directory = publish(tmp_path)
    variant = derive(directory, **changes)
    assert snapshot.prequantized(directory, INT8_CPU, "bfloat16", ["b", "a"]) is None
    [message] = caplog.messages
    assert message.startswith(f"not using prequantized weights in {variant}, quantizing while loading: ")
    assert re.search(reason, message)


def test_find_absent_adapter_names_its_setting_and_command(tmp_path: Path) -> None:
    command = f"`ADAPTER_REFERENCE=hf://owner/adapter python -m storage_initializer MODEL {tmp_path}`"
    with pytest.raises(SnapshotMissing, match=re.escape(command)):
        snapshot.find(tmp_path, "hf://owner/adapter", snapshot.ADAPTER)
    with pytest.raises(InvalidSettings, match=r"^--adapter_reference: 'adapter' is not a reference"):
        snapshot.find(tmp_path, "adapter", snapshot.ADAPTER)
