"""The last error of a publication on the volume, for a predictor that waits."""

import json
import os
import stat
from pathlib import Path

import pytest

from tests.storage_initializer.conftest import FIRST_USER, GROUP, SECOND_USER, Run, Start, finish

STATUS = Path(".status/demo--arithmetic/main")


def test_failed_run_leaves_its_last_line_on_the_volume(run: Run, volume: Path) -> None:
    volume.mkdir()
    result = run("hf://demo/nothing:v1", volume)
    kept = json.loads((volume / ".status/demo--nothing/v1").read_text())
    assert kept["error"] == result.reason
    assert kept["failed_at"].endswith("Z")
    assert [path.name for path in (volume / ".status/demo--nothing").iterdir()] == ["v1"]


def test_publication_removes_the_error_of_an_earlier_run(run: Run, volume: Path) -> None:
    volume.mkdir()
    assert run("hf://demo/arithmetic", volume, env={"HF_ENDPOINT": "http://127.0.0.1:9"}).code == 1
    assert (volume / STATUS).exists()
    assert run("hf://demo/arithmetic", volume).code == 0
    assert not (volume / STATUS).exists()


def test_unexpected_error_is_kept_too(run: Run, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("two\nlines")

    volume.mkdir()
    monkeypatch.setattr("storage_initializer.sources.file_selection.make_plan", explode)
    result = run("hf://demo/arithmetic", volume)
    assert json.loads((volume / STATUS).read_text())["error"] == result.reason
    assert result.reason.startswith("Unexpected RuntimeError (two lines)")


def test_status_never_contains_the_token(run: Run, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("header Bearer hf_abcdefgh of https://me:hf_abcdefgh@hub")

    volume.mkdir()
    monkeypatch.setattr("storage_initializer.sources.file_selection.make_plan", explode)
    run("hf://demo/arithmetic", volume, env={"HF_TOKEN": "hf_abcdefgh"})
    kept = (volume / STATUS).read_text()
    assert "hf_abcdefgh" not in kept
    assert "***" in kept


def test_status_is_readable_and_replaceable_by_the_group(start: Start, public: Path, unprivileged: int | None) -> None:
    if unprivileged is None:
        pytest.skip("needs root, to run as two users")
    volume = public / "volume"
    volume.mkdir()
    volume.chmod(0o2770)
    os.chown(volume, -1, GROUP)
    for user in (FIRST_USER, SECOND_USER):
        env = {"STORAGE_INITIALIZER_UMASK": "0027"}
        assert finish(start("hf://demo/nothing", volume, user=user, env=env)).code == 2
        path = volume / ".status/demo--nothing/main"
        assert path.stat().st_uid == user
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_full_volume_keeps_the_exit_code_and_the_last_line(
    run: Run, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    volume.mkdir()
    monkeypatch.setattr("storage_initializer.volume.status._write", is_full)
    result = run("hf://demo/nothing", volume)
    assert result.code == 2
    assert f"{volume}/.status/demo--nothing/main is not updated: No space left on device" in result.stderr
    assert "demo/nothing" in result.reason
    assert "not updated" not in result.reason
