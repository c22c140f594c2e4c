"""What a volume gets and what it withstands: modes, no room."""

import os
import subprocess
from pathlib import Path

import pytest

from devtools.local_hub import LocalHub
from tests.storage_initializer.conftest import Run, make_model, problems


@pytest.mark.parametrize(("umask", "mode"), [("0027", 0o640), ("022", 0o644)])
def test_umask_setting_limits_file_modes(run: Run, hub: LocalHub, volume: Path, umask: str, mode: int) -> None:
    assert run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_UMASK": umask}).code == 0
    snapshot = volume / "demo--arithmetic" / hub.commit("demo/arithmetic")
    assert {path.stat().st_mode & 0o777 for path in snapshot.iterdir()} == {mode}


@pytest.mark.parametrize("umask", ["0077", "0040", "9", "rwx"])
def test_umask_without_group_read_is_rejected(run: Run, volume: Path, umask: str) -> None:
    result = run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_UMASK": umask})
    assert result.code == 2
    assert "STORAGE_INITIALIZER_UMASK has an invalid value: expected three octal digits" in result.reason


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A volume of 256 KiB."""
    root = tmp_path / "tiny"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a tiny volume, and not in every container")
    return root


def test_full_volume_fails_and_next_run_resumes(
    run: Run, hub: LocalHub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        hub.add("demo/large", make_model(tmp_path / "large", shards=2, shard_bytes=200_000))
        too_large = run("hf://demo/large", tiny)
        assert too_large.code == 1
        assert "needs 391.0 KiB, 252.0 KiB free on" in too_large.reason

        # As with a quota that the file system does not show, or another writer.
        monkeypatch.setattr("storage_initializer.volume.layout.require_space", lambda *_: None)
        full = run("hf://demo/large", tiny, env={"STORAGE_INITIALIZER_PARALLEL_FILES": "1"})
        assert full.code == 1
        assert f"No space left on {tiny}. Enlarge it" in full.reason
        assert list(tiny.glob(".locks/*.lease")) == []
        assert not (tiny / "demo--large").exists()

        subprocess.run(["mount", "-o", "remount,size=1m", str(tiny)], check=True)
        hub.forget()
        assert run("hf://demo/large", tiny).code == 0
        assert problems(tiny / "demo--large" / hub.commit("demo/large")) == []
        assert sum(hub.sent_bytes().values()) < 400_000
    finally:
        subprocess.run(["umount", str(tiny)], check=True)


def test_adoption_without_space_resumes_incomplete_copy(run: Run, hub: LocalHub, tiny: Path, tmp_path: Path) -> None:
    try:
        commit = hub.add("demo/large", make_model(tmp_path / "large", shard_bytes=180_000))
        left = tiny / ".staging" / f"demo--large@{commit}.{'0' * 16}" / ".partial"
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes((tmp_path / "large" / "model.safetensors").read_bytes()[:150_000])
        result = run("hf://demo/large", tiny)
        assert result.code == 0, result.stderr
        assert problems(tiny / "demo--large" / commit) == []
        assert 30_000 < hub.sent_bytes()["model.safetensors"] < 180_000
    finally:
        subprocess.run(["umount", str(tiny)], check=True)
