import json
import re
from pathlib import Path

import pytest

from predictor.errors import InvalidSettings, SnapshotMissing
from predictor.models import snapshot

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
    (directory / snapshot.RECORD).write_text(json.dumps(RECORD))
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
def test_finds_what_a_reference_names(tmp_path: Path, reference: str, folder: str, ref: str) -> None:
    directory = publish(tmp_path, folder, ref)
    assert snapshot.find(tmp_path, reference) == snapshot.Snapshot(directory, COMMIT)


def test_takes_a_directory_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert snapshot.find(tmp_path, None) == snapshot.Snapshot(tmp_path, None)


def test_reads_the_commit_of_a_published_directory(tmp_path: Path) -> None:
    directory = publish(tmp_path)
    assert snapshot.find(directory, None).commit == COMMIT


def test_says_how_to_publish_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        SnapshotMissing, match=r"hf://owner/model is not published in .*`python -m storage_initializer hf"
    ):
        snapshot.find(tmp_path, "hf://owner/model")


def test_says_that_a_directory_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SnapshotMissing, match="nowhere is not a directory"):
        snapshot.find(tmp_path / "nowhere", None)


def test_asks_for_a_reference_on_a_volume_root(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(SnapshotMissing, match=r"has no config.json; .* --model_reference"):
        snapshot.find(tmp_path, None)


def test_refuses_a_snapshot_without_a_record(tmp_path: Path) -> None:
    (publish(tmp_path) / snapshot.RECORD).unlink()
    with pytest.raises(SnapshotMissing, match="was not published by the storage initializer"):
        snapshot.find(tmp_path, "hf://owner/model")


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({**RECORD, "files": [7]})])
def test_refuses_a_record_that_it_cannot_read(tmp_path: Path, text: str) -> None:
    (publish(tmp_path) / snapshot.RECORD).write_text(text)
    with pytest.raises(SnapshotMissing, match="is not a record"):
        snapshot.find(tmp_path, "hf://owner/model")


def test_refuses_a_record_of_another_format(tmp_path: Path) -> None:
    (publish(tmp_path) / snapshot.RECORD).write_text(json.dumps({**RECORD, "format_version": 2}))
    with pytest.raises(SnapshotMissing, match="has format version 2, and this predictor reads 1"):
        snapshot.find(tmp_path, "hf://owner/model")


def test_names_the_file_that_is_not_as_recorded(tmp_path: Path) -> None:
    directory = publish(tmp_path)
    (directory / "config.json").write_text("{ }")
    with pytest.raises(SnapshotMissing, match=r"config.json has 3 of 2 bytes"):
        snapshot.find(tmp_path, "hf://owner/model")
    (directory / "config.json").unlink()
    with pytest.raises(SnapshotMissing, match=r"config.json is missing"):
        snapshot.find(tmp_path, "hf://owner/model")


@pytest.mark.parametrize("reference", ["s3://bucket/key", "owner/model", "hf://model", "hf://a/b/c", "file://relative"])
def test_names_the_references_that_it_knows(tmp_path: Path, reference: str) -> None:
    with pytest.raises(InvalidSettings, match="expected hf://owner/model, hf://owner/model:revision or file:///dir"):
        snapshot.find(tmp_path, reference)


def test_waits_until_it_is_published(tmp_path: Path) -> None:
    slept: list[float] = []

    def publish_meanwhile(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            publish(tmp_path)

    found = snapshot.wait(tmp_path, "hf://owner/model", timeout_seconds=3600, sleep=publish_meanwhile)
    assert found.commit == COMMIT
    assert len(slept) == 2


def test_gives_up_after_the_time_to_wait(tmp_path: Path) -> None:
    with pytest.raises(SnapshotMissing):
        snapshot.wait(tmp_path, "hf://owner/model", timeout_seconds=0)


def prepare(directory: Path, **changes: object) -> Path:
    """Put beside a snapshot what could have been prepared of it."""
    made = directory.with_name(f"{directory.name}-int8-cpu")
    made.mkdir()
    (made / "config.json").write_text("{}")
    origin = {"commit": COMMIT, "recipe": "int8-cpu", "version": 1, "dtype": "bfloat16", "keep": ["a", "b"]}
    (made / snapshot.RECORD).write_text(json.dumps({**RECORD, "derived_from": origin | changes}))
    return made


def test_finds_what_was_prepared_of_a_snapshot_wherever_that_is_mounted(tmp_path: Path) -> None:
    directory = publish(tmp_path)
    assert snapshot.prepared(directory, "bfloat16", ["b", "a"]) is None
    made = prepare(directory)
    assert snapshot.prepared(directory, "bfloat16", ["b", "a"]) == made
    (tmp_path / "link").symlink_to(directory)
    assert snapshot.prepared(tmp_path / "link", "bfloat16", ["b", "a"]) == made
    assert snapshot.find(tmp_path, "hf://owner/model").directory == directory


@pytest.mark.parametrize("directory", [".", "/"])
def test_beside_any_other_directory_nothing_is_prepared(directory: str) -> None:
    assert snapshot.prepared(Path(directory), "bfloat16", []) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "made by int8-cpu version 2, and this predictor knows int8-cpu version 1"),
        ({"recipe": "4bit-cpu"}, "made by 4bit-cpu version 1, and this predictor knows int8-cpu version 1"),
        ({"commit": "f" * 40}, "made of ffff"),
        ({"dtype": "float32"}, "rounded from float32, and this predictor would from bfloat16"),
        ({"keep": []}, r"are \[\], and this predictor would keep \['b', 'a'\]"),
        ({"keep": None}, "not iterable"),
    ],
)
def test_passes_over_what_was_prepared_in_another_way_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, object], why: str
) -> None:
    directory = publish(tmp_path)
    made = prepare(directory, **changes)
    assert snapshot.prepared(directory, "bfloat16", ["b", "a"]) is None
    [message] = caplog.messages
    assert message.startswith(f"not using {made}, but rounding weights while they load: ")
    assert re.search(why, message)
