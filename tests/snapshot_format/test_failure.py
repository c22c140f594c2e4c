"""Tests of `snapshot_format.failure`: the status file."""

import os
from pathlib import Path

import pytest

from snapshot_format import failure
from snapshot_format.failure import MAX_CHARACTERS, Failure
from snapshot_format.layout import status_path
from snapshot_format.reference import parse


def test_read_returns_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "main").write_text(Failure("no such model", "2026-11-24T04:00:13Z").to_json())
    found = failure.read(tmp_path / "main")
    assert str(found) == "the storage initializer failed at 2026-11-24T04:00:13Z: no such model"


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"error": "x"}'])
def test_read_incomplete_file_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "main").write_text(text)
    assert failure.read(tmp_path / "main") is None


def test_read_limits_the_error_to_one_line_of_bounded_length(tmp_path: Path) -> None:
    (tmp_path / "main").write_text(Failure("two\nlines " * MAX_CHARACTERS, "now").to_json())
    found = failure.read(tmp_path / "main")
    assert found is not None
    assert (len(found.error), "\n" in found.error) == (MAX_CHARACTERS, False)


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        ("hf://demo/arithmetic", ".status/demo--arithmetic/main"),
        ("hf://demo/arithmetic:refs/pr/4", ".status/demo--arithmetic/refs%2Fpr%2F4"),
        ("file:///srv/my%20model", ".status/file--my%20model/main"),
    ],
)
def test_status_path_of_a_reference(reference: str, path: str) -> None:
    assert status_path(Path("/mnt/models"), parse(reference)) == Path("/mnt/models", path)


def test_status_path_of_the_longest_reference_is_a_possible_file(tmp_path: Path) -> None:
    path = status_path(tmp_path, parse(f"hf://{'o' * 40}/{'m' * 55}:{'r' * 200}"))
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert max(map(len, map(os.fsencode, path.parts))) <= 255
