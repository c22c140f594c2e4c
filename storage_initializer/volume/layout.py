"""The only writer of the volume: staging, publishing, refs, free space, removal.

`snapshot_format.layout` defines the paths. Of a staging directory, only this program reads the content:

    <root>/.staging/demo--arithmetic@4f0a…c1.9d3e…/
        .partial/model.safetensors                an incomplete file, resumed by the next run

Readers see a complete snapshot or none: the record is written last into staging, then one rename publishes the whole
directory. A published snapshot is never modified.
"""

import contextlib
import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from snapshot_format.layout import STAGING, SnapshotLocation, read_ref, ref_path
from snapshot_format.record import RECORD, Record
from storage_initializer.errors import InitializerError, NoSpace, RefusedVolume, VolumeFailed, VolumeNotWritable
from storage_initializer.formatting import format_bytes
from storage_initializer.volume.permissions import chmod_and_fsync, fsync, make_shared_directory
from storage_initializer.volume.record import read

_PARTIAL = ".partial"
_ADOPTED = ".adopted"

log = logging.getLogger(__name__)


def find(location: SnapshotLocation) -> Record | None:
    """Return the record of a published snapshot, or None.

    Raises:
        RefusedVolume: the directory is not a snapshot, or has another format version.
    """
    return read(location.directory) if location.directory.is_dir() else None


def resolve_ref(root: Path, slug: str, revision: str) -> str | None:
    """Return the commit that a revision was last resolved to, if its snapshot is still published."""
    try:
        commit = read_ref(root, slug, revision)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return commit if commit and SnapshotLocation(root, slug, commit).directory.is_dir() else None


def write_ref(location: SnapshotLocation, revision: str) -> None:
    """Point a revision to this snapshot; an up-to-date ref is not touched."""
    path = ref_path(location.root, location.slug, revision)
    content = f"{location.commit}\n"
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == content:
            return
    make_shared_directory(path.parent)
    draft = make_shared_directory(location.root / STAGING) / f"{location.key}.{secrets.token_hex(8)}.ref"
    draft.write_text(content)
    chmod_and_fsync(draft)
    draft.replace(path)
    fsync(path.parent)


def delete_refs(location: SnapshotLocation, revisions: Iterable[str]) -> None:
    """Delete the refs of revisions."""
    for revision in revisions:
        ref_path(location.root, location.slug, revision).unlink(missing_ok=True)


def stage(location: SnapshotLocation, token: str, *, resume: bool = True) -> Path:
    """Return the staging directory of a lease, with the files of earlier interrupted runs if it may resume.

    Files of another user are removed as far as permitted and fetched again, because their modes cannot be changed.
    """
    staging = make_shared_directory(location.root / STAGING)
    own = staging / f"{location.key}.{token}"
    prefix = f"{location.key}."
    for path in sorted(path for path in staging.iterdir() if path.name.startswith(prefix) and path.is_dir()):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_uid != os.geteuid():
                # Rename first, so that a writer that is still alive loses the directory.
                shutil.rmtree(path.rename(f"{own}.{secrets.token_hex(8)}"), ignore_errors=True)
            elif not resume or own.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(own)
                log.info("resuming from the files of an earlier run")
    make_shared_directory(own)
    remove_bookkeeping(own, keep_partial=True)
    _adopt_partial(own)
    return own


def partial_path(staging: Path, path: str) -> Path:
    """Return the path of an incomplete file; its directory is created."""
    incomplete = staging / _PARTIAL / path
    incomplete.parent.mkdir(parents=True, exist_ok=True)
    return incomplete


def partial_bytes(staging: Path, path: str) -> int:
    """Return the size of an incomplete file, 0 if there is none."""
    try:
        return (staging / _PARTIAL / path).stat().st_size
    except FileNotFoundError:
        return 0


def complete(staging: Path, path: str) -> None:
    """Move a complete file from its partial path to its place in staging."""
    target = staging / path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_path(staging, path).replace(target)


def remove_bookkeeping(staging: Path, *, keep_partial: bool = False) -> None:
    """Remove hidden entries at the top of staging; they are not part of the snapshot."""
    for path in staging.iterdir():
        if path.name.startswith(".") and not (keep_partial and path.name in (_PARTIAL, _ADOPTED)):
            remove_path(path)


def discard(staging: Path, paths: Iterable[str]) -> None:
    """Remove files from staging."""
    for path in paths:
        (staging / path).unlink(missing_ok=True)


def write(staging: Path, path: str, chunks: Iterable[bytes], advance: Callable[[int], None]) -> None:
    """Write a file into staging and report the size of every chunk; an incomplete file is removed."""
    incomplete = partial_path(staging, path)
    try:
        with incomplete.open("wb") as into:
            for chunk in chunks:
                into.write(chunk)
                advance(len(chunk))
    except BaseException:
        incomplete.unlink(missing_ok=True)
        raise
    complete(staging, path)


def require_space(location: SnapshotLocation, needed_bytes: int) -> None:
    """Check the free space of the volume.

    Raises:
        NoSpace: fewer bytes are free than needed.
    """
    space = os.statvfs(location.root)
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < needed_bytes:
        raise NoSpace(
            f"{location.slug} needs {format_bytes(needed_bytes)}, {format_bytes(free_bytes)} free on {location.root}. "
            "Enlarge the volume, or remove unused snapshots (gc)."
        )


def publish(location: SnapshotLocation, staging: Path, record: Record) -> None:
    """Publish a verified staging directory: write the record, fsync everything, rename once."""
    (staging / RECORD).write_text(record.to_json())
    for folder, _, names in os.walk(staging, topdown=False):
        for name in names:
            chmod_and_fsync(Path(folder, name))
        chmod_and_fsync(Path(folder))
    parent = make_shared_directory(location.directory.parent)
    try:
        staging.rename(location.directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another initializer took over and has published the same verified content.
        shutil.rmtree(staging)
    fsync(parent)
    fsync(location.root)


def remove(location: SnapshotLocation, token: str) -> None:
    """Hide a snapshot from readers with one rename, then remove it; the caller holds its lease."""
    removed = make_shared_directory(location.root / STAGING) / f"{location.key}.{token}"
    location.directory.rename(removed)
    fsync(location.directory.parent)
    shutil.rmtree(removed)


def remove_path(path: Path) -> None:
    """Remove a file or a directory tree."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a directory tree."""
    if path.is_dir():
        return sum(below.lstat().st_size for below in path.rglob("*") if not below.is_dir())
    return path.lstat().st_size


def is_full(error: OSError) -> bool:
    """Return whether the volume or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def translate_os_errors(root: Path) -> Iterator[None]:
    """Translate errors of the operating system into errors of the volume at `root`.

    Raises:
        NoSpace: the volume or its quota is full.
        RefusedVolume: the volume is mounted read-only.
        VolumeNotWritable: this user may not write to it.
        VolumeFailed: any other error.
    """
    try:
        yield
    except InitializerError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        where = error.filename or root
        match error.errno:
            case _ if is_full(error):
                raise NoSpace(
                    f"No space left on {root}. Enlarge it, or remove unused snapshots (gc), then run again."
                ) from error
            case errno.EROFS:
                raise RefusedVolume(f"{where} is not usable ({error.strerror}). Mount {root} writable.") from error
            case errno.EACCES | errno.EPERM:
                raise VolumeNotWritable(
                    f"{where} is not usable ({error.strerror}). Mount {root} writable for user {os.getuid()} or group "
                    f"{os.getgid()}: with fsGroup, unless another pod without it has mounted the volume on this node "
                    f"before, or with the owner of its directory (chown {os.getuid()}:{os.getgid()})."
                ) from error
            case errno.ENOTDIR | errno.EEXIST | errno.ENAMETOOLONG:
                raise RefusedVolume(f"{where} is not a directory. Specify the root of a volume.") from error
            case _:
                raise VolumeFailed(f"{where} failed ({error.strerror}). Check the volume, then run again.") from error


def _adopt_partial(staging: Path) -> None:
    """Replace incomplete files by copies: the process that started them may still be alive and write to them."""
    adopted = staging / _ADOPTED
    # An earlier run was killed while it copied: these files have not been copied completely.
    for source, path in _files(adopted):
        source.replace(partial_path(staging, path))
    shutil.rmtree(adopted, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        (staging / _PARTIAL).rename(adopted)
    for source, path in _files(adopted):
        try:
            shutil.copyfile(source, partial_path(staging, path))
        except OSError as error:
            # Without space for both files, the incomplete copy is resumed.
            if not is_full(error):
                raise
        source.unlink()
    shutil.rmtree(adopted, ignore_errors=True)


def _files(directory: Path) -> Iterator[tuple[Path, str]]:
    """Iterate over all files in a directory tree with their relative paths."""
    for folder, _, names in os.walk(directory):
        for name in names:
            yield Path(folder, name), Path(folder, name).relative_to(directory).as_posix()
