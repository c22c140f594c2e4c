"""Tests of `predictor.models.snapshot_wait`: the log of a wait, through `snapshot.wait`."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from predictor.errors import SnapshotMissing
from predictor.models import snapshot, snapshot_wait
from snapshot_format.failure import Failure
from snapshot_format.layout import SnapshotLocation, lease_path, status_path
from snapshot_format.reference import parse

REFERENCE = "hf://owner/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOCATION_KEY = f"owner--model@{COMMIT}"
Events = dict[int, Callable[[], None]]
Wait = Callable[..., tuple[list[str], list[str]]]


def fail(root: Path, error: str, reference: str = REFERENCE, failed_at: str = "2026-11-24T04:00:13Z") -> None:
    path = status_path(root, parse(reference))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Failure(error, failed_at).to_json())


def stage(root: Path, key: str, size_bytes: int) -> None:
    partial = root / ".staging" / f"{key}.9d3e" / ".partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(bytes(size_bytes))


@pytest.fixture
def wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Wait:
    """Waits 70 s by a fake clock, one second per poll; returns log lines and reports, and checks that it fails."""

    def wait(at: Events | None = None, reference: str | None = REFERENCE) -> tuple[list[str], list[str]]:
        now = 0

        def sleep(_: float) -> None:
            nonlocal now
            now += 1
            if at and now in at:
                at[now]()

        reports: list[str] = []
        monkeypatch.setattr("predictor.models.snapshot.time", SimpleNamespace(monotonic=lambda: float(now)))
        with caplog.at_level(logging.INFO), pytest.raises(SnapshotMissing) as raised:
            snapshot.wait(tmp_path, reference, 70, reports.append, sleep)
        return [record.getMessage() for record in caplog.records] + [str(raised.value)], reports

    return wait


def test_wait_logs_at_the_start_and_every_30_seconds(wait: Wait) -> None:
    lines, reports = wait()
    *logged, error = lines
    assert [
        re.findall(r"^waiting for the snapshot, (\d+) of 70 s; nothing in staging, no storage init", line)
        for line in logged
    ] == [["0"], ["30"], ["60"]]
    assert "hf://owner/model is not published in" in logged[0]
    assert "is not published" not in logged[1]
    assert [report.partition(" of")[0] for report in reports] == ["0", "30", "60"]
    assert "The last error" not in error


def test_wait_names_staged_bytes_and_the_holder_of_the_lease(wait: Wait, tmp_path: Path) -> None:
    stage(tmp_path, LOCATION_KEY, 3 << 20)
    stage(tmp_path, f"owner--model-2@{COMMIT}", 1 << 20)
    lease = lease_path(SnapshotLocation(tmp_path, "owner--model", COMMIT))
    lease.parent.mkdir()
    lease.write_text(json.dumps({"token": "9d3e", "name": "model-download-x7k2p:1"}))
    lease.with_suffix(".9d3e.clock").touch()
    (first, *_), _ = wait()
    assert re.search(r"; 3\.0 MiB in staging, model-download-x7k2p:1 holds a lease, last heartbeat \d+ s ago;", first)


def test_wait_for_a_commit_ignores_other_commits(wait: Wait, tmp_path: Path) -> None:
    stage(tmp_path, f"owner--model@{'b' * 40}", 3 << 20)
    (first, *_), _ = wait(reference=f"{REFERENCE}:{COMMIT}")
    assert "nothing in staging" in first


def test_wait_repeats_a_new_error_at_once_and_at_the_end(wait: Wait, tmp_path: Path) -> None:
    lines, reports = wait(
        {
            5: lambda: fail(tmp_path, "no such model. Correct it."),
            8: lambda: fail(tmp_path, "again.", failed_at="later"),
        }
    )
    said = "the storage initializer failed at 2026-11-24T04:00:13Z: no such model. Correct it."
    assert lines.count(said) == 1
    assert lines[2] == "the storage initializer failed at later: again."
    assert [report.partition(";")[0] for report in reports] == [
        "0 of 70 s",
        "5 of 70 s",
        "8 of 70 s",
        "30 of 70 s",
        "60 of 70 s",
    ]
    assert reports[1].endswith(said.rstrip("."))
    assert lines[-1].endswith("The last error on the volume: the storage initializer failed at later: again.")


def test_wait_ignores_errors_of_other_references(wait: Wait, tmp_path: Path) -> None:
    fail(tmp_path, "other", f"{REFERENCE}:v2")
    lines, _ = wait()
    assert "other" not in "".join(lines)


def test_wait_without_a_reference_describes_no_volume(wait: Wait) -> None:
    (first, *_), reports = wait(reference=None)
    assert first.startswith("waiting for the snapshot, 0 of 70 s; ")
    assert reports[0] == "0 of 70 s"


def test_describe_unreadable_volume_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    described = snapshot_wait.describe(tmp_path, parse(REFERENCE))
    assert described == f"{tmp_path}/.staging cannot be read (Permission denied)"


def test_wait_without_time_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(SnapshotMissing):
        snapshot.wait(tmp_path, REFERENCE, 0)
    assert caplog.records == []
