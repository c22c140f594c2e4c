"""File modes and durability on a volume that several users share.

The group of the volume (`fsGroup`) may be all that two initializers have in common. Shared directories and leases are
group-writable; published snapshots are read-only for the group. The root keeps its mode.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    """Set the process's umask within the block."""
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def make_shared_directory(directory: Path) -> Path:
    """Create a group-writable directory with group-readable parents; keep the mode of existing ones."""
    if directory.is_dir():
        return directory
    missing = [parent for parent in directory.parents if not parent.is_dir()]
    for path, rights in (*((parent, 0o050) for parent in reversed(missing)), (directory, 0o070)):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            _set_mode(path, add=rights)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    return directory


def chmod_and_fsync(path: Path) -> None:
    """Make a file or directory group-readable and not group-writable, whatever the umask, and fsync it."""
    _set_mode(path, add=0o050 if path.is_dir() else 0o040, remove=0o022)
    fsync(path)


def fsync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support fsync of a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _set_mode(path: Path, add: int, remove: int = 0) -> None:
    mode = path.stat().st_mode
    wanted = mode & ~remove | add
    if wanted != mode:
        try:
            path.chmod(wanted)
        except OSError:
            # Some volumes have fixed modes: missing rights matter, excess rights do not.
            if mode | add != mode:
                raise
