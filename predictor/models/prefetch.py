"""Weights across a network come into the page cache in the order in which they lie in their files.

They are mapped, and what is mapped is fetched in small pieces, when each is first touched. A disk does that well; a
file system in user space or across a network takes a round trip for each piece: a thread reads it from start to end.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

REMOTE = ("nfs", "fuse", "cifs", "smb", "9p", "virtiofs", "ceph", "lustre", "gpfs", "beegfs", "afs")
"""How the names of such file systems begin. EFS is nfs4; buckets are mounted by fuse."""

_PIECE_BYTES = 8 << 20


def file_system(path: Path, mounts: Sequence[tuple[str, str]] | None = None) -> str:
    """The name of the file system that a path lies on; empty where that is not known.

    Args:
        path: of something that exists.
        mounts: where file systems are mounted, and their names; None: as they are.
    """
    if mounts is None:
        mounts = [(mount.mountpoint, mount.fstype) for mount in psutil.disk_partitions(all=True)]
    # Of two at one place, the later one is seen.
    of_path = [mount for mount in reversed(mounts) if path.resolve().is_relative_to(mount[0])]
    return max(of_path, key=lambda mount: len(mount[0]), default=("", ""))[1]


@contextmanager
def ahead(files: Sequence[Path], free_bytes: int) -> Iterator[None]:
    """Have files of a remote file system read while the block runs; at its end no longer.

    Args:
        files: in the order in which they will be touched.
        free_bytes: what the page cache can take. Files that are larger together are left alone: they would push
            each other out.
    """
    remote = bool(files) and file_system(files[0]).startswith(REMOTE)
    if not remote or sum(file.stat().st_size for file in files) > free_bytes:
        yield
        return
    left = threading.Event()
    reader = threading.Thread(target=_read, args=(files, left), name="reading-ahead", daemon=True)
    reader.start()
    try:
        yield
    finally:
        left.set()
        reader.join()


def _read(files: Sequence[Path], left: threading.Event) -> None:
    piece = bytearray(_PIECE_BYTES)
    try:
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while not left.is_set() and opened.readinto(piece):
                    pass
    except OSError as error:  # whoever needs what could not be read will fail, and say so
        logger.warning("weights are not read ahead any more: %s", error)
