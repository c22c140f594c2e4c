"""The record file: written and read back, and what readers reject."""

import json
from pathlib import Path

import pytest

from snapshot_format import record
from snapshot_format.record import File, FileSelection, InvalidRecord, QuantizationRecipe, Record

RECORD = Record(
    reference="hf://demo/arithmetic:main",
    commit="4f" * 20,
    files=(File("config.json", 2, "0" * 64),),
    selection=FileSelection(ignore=("*.md",), pickle=True),
    recipe=QuantizationRecipe("int8-cpu", 1, "bfloat16", ("down_proj",)),
    tool="kserve-llm 0.1.0",
    published_at="2026-11-24T04:00:13Z",
    duration_seconds=12.5,
)


def test_record_round_trips(tmp_path: Path) -> None:
    (tmp_path / record.RECORD).write_text(RECORD.to_json())
    assert record.read(tmp_path) == RECORD


def test_read_ignores_unknown_fields(tmp_path: Path) -> None:
    (tmp_path / record.RECORD).write_text(json.dumps(json.loads(RECORD.to_json()) | {"later": 1}))
    assert record.read(tmp_path) == RECORD


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": "x"}'])
def test_read_invalid_record_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / record.RECORD).write_text(text)
    with pytest.raises(InvalidRecord):
        record.read(tmp_path)


def test_read_other_format_version_raises_with_that_version(tmp_path: Path) -> None:
    (tmp_path / record.RECORD).write_text('{"format_version": 2}')
    with pytest.raises(record.UnsupportedFormatVersion) as raised:
        record.read(tmp_path)
    assert raised.value.version == 2


@pytest.mark.parametrize(
    ("selection", "accepted", "rejected"),
    [
        (FileSelection(), "a/b.json", None),
        (FileSelection(allow=("a/",)), "a/b.json", "b.json"),
        (FileSelection(ignore=("*.md",)), "a.json", "docs/a.md"),
    ],
    ids=["default", "allow", "ignore"],
)
def test_selection_accepts_paths_by_pattern(selection: FileSelection, accepted: str, rejected: str | None) -> None:
    assert selection.accepts(accepted)
    assert rejected is None or not selection.accepts(rejected)
