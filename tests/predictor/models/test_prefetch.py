"""Which file systems are read ahead, and that they are, and are left alone again."""

import time
from pathlib import Path

import psutil
import pytest

from predictor.models import prefetch

MOUNTS = [
    ("/", "rootfs"),
    ("/", "overlay"),
    ("/mnt", "ext4"),
    ("/mnt/models", "nfs4"),
    ("/mnt/bucket", "fuse.gcsfuse"),
    ("/a", "9p"),
]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/mnt/models/x", "nfs4"),
        ("/mnt/bucket", "fuse.gcsfuse"),
        ("/mnt/other/models", "ext4"),
        ("/mnt/models2", "ext4"),
        ("/ab", "overlay"),
    ],
)
def test_the_innermost_mount_says_what_a_path_lies_on(path: str, name: str) -> None:
    assert prefetch.file_system(Path(path), MOUNTS) == name


def test_the_mounts_of_this_machine_are_known() -> None:
    assert prefetch.file_system(Path("/proc/self")) == "proc"


@pytest.fixture
def weights(tmp_path: Path) -> list[Path]:
    """Two files of 64 MiB, and one of 1 TiB with nothing in it."""
    files = [tmp_path / name for name in ("1.safetensors", "2.safetensors", "3.safetensors")]
    for file, size in zip(files, (64 << 20, 64 << 20, 1 << 40), strict=True):
        with file.open("wb") as opened:
            opened.truncate(size)
    return files


def read_bytes() -> int:
    """What this process has read from files, so far."""
    return int(psutil.Process().io_counters().read_chars)


def test_a_remote_file_is_read_to_its_end(weights: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "file_system", lambda _: "nfs4")
    before = read_bytes()
    with prefetch.ahead(weights[:2], 128 << 20):
        for _ in range(1000):
            if read_bytes() - before >= 128 << 20:
                break
            time.sleep(0.01)
    assert read_bytes() - before >= 128 << 20


def test_who_has_what_they_need_does_not_wait_for_the_rest(
    weights: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "file_system", lambda _: "nfs4")
    with prefetch.ahead(weights, 2 << 40):
        pass
    after = read_bytes()
    time.sleep(0.1)
    assert read_bytes() - after < 1 << 20


@pytest.mark.parametrize(("name", "free_bytes"), [("fuse", 100 << 20), ("ext4", 2 << 40)])
def test_nothing_is_read_that_would_not_stay_or_lies_on_a_disk(
    weights: list[Path], monkeypatch: pytest.MonkeyPatch, name: str, free_bytes: int
) -> None:
    monkeypatch.setattr(prefetch, "file_system", lambda _: name)
    before = read_bytes()
    with prefetch.ahead(weights[:2], free_bytes):
        time.sleep(0.1)
    assert read_bytes() - before < 1 << 20


def test_a_file_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefetch, "file_system", lambda _: "nfs4")
    (tmp_path / "a.safetensors").mkdir()
    with prefetch.ahead([tmp_path / "a.safetensors"], 1 << 40):
        pass
    assert "not read ahead any more" in caplog.text
