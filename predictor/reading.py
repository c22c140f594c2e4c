"""Weights come into the page cache in the order in which they lie in their files, before they are asked for.

They are mapped, and what is mapped is fetched in small pieces, when each is first touched. A disk is told what will be
read, and goes on by itself. A file system in user space or across a network takes a round trip for each piece: a thread
reads it from start to end instead, and is soon ahead of who touches.
"""

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

REMOTE = ("nfs", "fuse", "cifs", "smb", "9p", "virtiofs", "ceph", "lustre", "gpfs", "beegfs", "afs")
"""How the names of such file systems begin. EFS is nfs4; buckets are mounted by fuse."""

_PIECE_BYTES = 8 << 20


def is_remote(path: Path, mounts: Sequence[tuple[str, str]] | None = None) -> bool:
    """Whether a path lies on such a file system.

    Args:
        path: of something that exists.
        mounts: where file systems are mounted, and their names; None: as they are.
    """
    if mounts is None:
        mounts = [(mount.mountpoint, mount.fstype) for mount in psutil.disk_partitions(all=True)]
    of_path = [mount for mount in mounts if path.resolve().is_relative_to(mount[0])]
    return max(of_path, key=lambda mount: len(mount[0]), default=("", ""))[1].startswith(REMOTE)


@contextmanager
def ahead(files: Sequence[Path], free_bytes: int) -> Iterator[None]:
    """Have files read while the block runs; at its end no longer.

    Args:
        files: in the order in which they will be touched.
        free_bytes: what the page cache can take. Files that are larger together are left alone: they would push
            each other out.
    """
    if not files or sum(file.stat().st_size for file in files) > free_bytes:
        yield
        return
    if not is_remote(files[0]):
        for file in files:
            _announce(file)
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


def _announce(file: Path) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _read(files: Sequence[Path], left: threading.Event) -> None:
    piece = bytearray(_PIECE_BYTES)
    try:
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while not left.is_set() and opened.readinto(piece):
                    pass
    except OSError as error:  # whoever needs what could not be read will fail, and say so
        logger.warning("weights are not read ahead any more: %s", error)
