import threading
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
MIB = 2**20
TIB = 2**40
HANG_SECONDS = 60


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/mnt/models/x", "nfs4"),
        ("/mnt/bucket", "fuse.gcsfuse"),
        ("/mnt/other/models", "ext4"),
        ("/mnt/models2", "ext4"),
        ("/ab", "overlay"),
    ],
)
def test_file_system_is_that_of_the_innermost_mount(path: str, expected: str) -> None:
    assert prefetch.file_system(Path(path), MOUNTS) == expected


def test_file_system_reads_the_mounts_of_this_machine() -> None:
    assert prefetch.file_system(Path("/proc/self")) == "proc"


def sparse_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> list[Path]:
    """Two files of 64 MiB."""
    return [sparse_file(tmp_path / name, 64 * MIB) for name in ("1.safetensors", "2.safetensors")]


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "file_system", lambda _: "nfs4")


def reader() -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == "prefetch"), None)


def read_bytes() -> int:
    """Return how much this process has read from files."""
    return int(psutil.Process().io_counters().read_chars)


@pytest.mark.usefixtures("remote")
def test_remote_files_are_read_to_the_end(weights: list[Path]) -> None:
    before = read_bytes()
    with prefetch.prefetch_files(weights, 128 * MIB):
        if thread := reader():
            thread.join(HANG_SECONDS)
    assert read_bytes() - before >= 128 * MIB


@pytest.mark.usefixtures("remote")
def test_prefetch_stops_at_the_end_of_the_block(tmp_path: Path) -> None:
    with prefetch.prefetch_files([sparse_file(tmp_path / "large.safetensors", TIB)], 2 * TIB):
        assert reader() is not None
    assert reader() is None


@pytest.mark.parametrize(
    ("file_system", "free_bytes"), [("fuse", 100 * MIB), ("ext4", 2 * TIB)], ids=["too-large", "local"]
)
def test_files_that_are_local_or_exceed_the_page_cache_are_not_read(
    weights: list[Path], monkeypatch: pytest.MonkeyPatch, file_system: str, free_bytes: int
) -> None:
    monkeypatch.setattr(prefetch, "file_system", lambda _: file_system)
    with prefetch.prefetch_files(weights, free_bytes):
        assert reader() is None


@pytest.mark.usefixtures("remote")
def test_unreadable_file_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with prefetch.prefetch_files([tmp_path / "a.safetensors"], TIB):
        pass
    assert "prefetch of weights failed" in caplog.text
