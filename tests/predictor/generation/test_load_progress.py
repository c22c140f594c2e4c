"""`LoadProgress` with a clock of the test."""

import json
import logging
from pathlib import Path

import pytest

from predictor.generation import load_progress
from predictor.generation.load_progress import LoadProgress

SNAPSHOT = Path("/mnt/models/demo")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(load_progress, "time", clock)
    return clock


def left(progress: LoadProgress) -> float | None:
    return progress.seconds_left


def percent(progress: LoadProgress) -> int | None:
    return progress.weights_percent


def test_progress_without_time_file_extrapolates_from_the_weights(clock: Clock) -> None:
    progress = LoadProgress()
    assert (left(progress), percent(progress)) == (None, None)
    progress.start(SNAPSHOT)
    clock.now += 50
    progress.report_weights(0)
    assert left(progress) is None
    assert percent(progress) == 0
    clock.now += 10
    progress.report_weights(0.255)
    assert left(progress) == pytest.approx(29.2, abs=0.1)
    assert percent(progress) == 25
    progress.report_weights(1)
    assert (left(progress), percent(progress)) == (None, None), "what follows is unknown"
    progress.finish()


def test_progress_with_time_of_the_snapshot_counts_down(clock: Clock, tmp_path: Path) -> None:
    first = LoadProgress(tmp_path / "time")
    first.start(SNAPSHOT)
    clock.now += 40
    first.finish()
    assert json.loads((tmp_path / "time").read_text()) == {"snapshot": str(SNAPSHOT), "seconds": 40}
    second, other = LoadProgress(tmp_path / "time"), LoadProgress(tmp_path / "time")
    assert left(second) is None, "the snapshot may still be downloaded"
    second.start(SNAPSHOT)
    other.start(SNAPSHOT.with_name("other"))
    clock.now += 15
    assert left(second) == 25
    assert left(other) is None
    clock.now += 30
    second.report_weights(0)
    clock.now += 10
    second.report_weights(0.5)
    assert left(second) == 10, "slower than the last load"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"snapshot": "/mnt/models/demo", "seconds": null}'])
def test_progress_with_unreadable_time_file_warns(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "time").write_text(content)
    progress = LoadProgress(tmp_path / "time")
    progress.start(SNAPSHOT)
    assert left(progress) is None
    assert "the duration of the last load cannot be read" in caplog.text


def test_progress_with_time_file_that_cannot_be_written_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    progress = LoadProgress(tmp_path / "missing" / "time")
    progress.start(SNAPSHOT)
    progress.finish()
    assert "the duration of the load is not saved" in caplog.text
