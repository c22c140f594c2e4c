"""What lies on a volume, and the only writer of it: staging, publishing, refs, free space, removing.

    <root>/
        demo--arithmetic/                             one directory per model: the reference's slug
            4f0a…c1/                                  one directory per snapshot: the commit
                config.json  model.safetensors  …     as on the Hub
                .snapshot.json                        the record, see `record.py`
            4f0a…c1-int8-cpu/                         what was prepared of it, with a record of its own
            refs/
                main                                  holds the commit and a line feed
                refs%2Fpr%2F4                         a revision is percent-encoded, see `reference.py`
        .staging/demo--arithmetic@4f0a…c1.9d3e…/      a snapshot being fetched; the suffix is the lease's token
            .partial/model.safetensors                a file whose end is still missing; gone on with after a kill
        .locks/demo--arithmetic@4f0a…c1.lease         who fetches or prepares it, see `lease.py`

Readers look at `<slug>/` only, and see no snapshot or a complete one: the record is written last into staging, then one
rename publishes the whole directory. Nothing is ever written into a published snapshot.

The group of the volume (`fsGroup`) may be all that two initializers have in common: `<slug>/`, `refs/`, `.staging/`,
`.locks/` and the leases are group-writable, so that each can publish beside the other, move its refs and take over from
it. Published snapshots are for the group to read only. The root's own mode is up to whoever made it.
"""

import contextlib
import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from snapshot_format.reference import escape
from storage_initializer.errors import InitializerError, NoSpace, RefusedVolume, VolumeFailed
from storage_initializer.sources.file_selection import readable
from storage_initializer.volume.record import RECORD, Record, read

REFS = "refs"
STAGING = ".staging"
LOCKS = ".locks"
LEASE = ".lease"
_PARTIAL = ".partial"
_LEFT = ".left"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one snapshot belongs."""

    root: Path
    slug: str
    commit: str
    form: str = ""
    """What was made of the snapshot of that commit, `int8-cpu` say; empty for the snapshot itself."""

    @property
    def name(self) -> str:
        """Of the directory."""
        return f"{self.commit}-{self.form}" if self.form else self.commit

    @property
    def directory(self) -> Path:
        """The published snapshot."""
        return self.root / self.slug / self.name

    @property
    def key(self) -> str:
        """The name of this snapshot in staging; no slug holds an `@`."""
        return f"{self.slug}@{self.name}"


def find(place: Place) -> Record | None:
    """The record of a published snapshot, or None where nothing is published.

    Raises:
        RefusedVolume: something else lies there, or a tool with another format wrote it.
    """
    return read(place.directory) if place.directory.is_dir() else None


def resolved(root: Path, slug: str, revision: str) -> str | None:
    """The commit that a revision was resolved to the last time, if that is published still."""
    try:
        commit = (root / slug / REFS / escape(revision)).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return commit if commit and Place(root, slug, commit).directory.is_dir() else None


def point(place: Place, revision: str) -> None:
    """Write down that a revision leads to this snapshot; touches nothing where that is already so."""
    path = place.root / place.slug / REFS / escape(revision)
    content = f"{place.commit}\n"
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == content:
            return
    _make(path.parent)
    draft = _make(place.root / STAGING) / f"{place.key}.{secrets.token_hex(8)}.ref"
    draft.write_text(content)
    settle(draft)
    draft.replace(path)
    _sync(path.parent)


def unpoint(place: Place, revisions: Iterable[str]) -> None:
    """Forget what these revisions were resolved to."""
    for revision in revisions:
        (place.root / place.slug / REFS / escape(revision)).unlink(missing_ok=True)


def lease_path(place: Place, *, make: bool = True) -> Path:
    """Where the lease of a snapshot and of all that is made of it lies; makes the directory, if it shall."""
    locks = place.root / LOCKS
    return (_make(locks) if make else locks) / f"{place.slug}@{place.commit}{LEASE}"


def stage(place: Place, token: str, *, afresh: bool = False) -> Path:
    """The staging directory of a lease, by its token, with all that earlier ones left behind for the same snapshot.

    What another user left there is removed as far as this one may, and fetched anew; so is all of it, if it is to be
    begun afresh.
    """
    staging = _make(place.root / STAGING)
    own = staging / f"{place.key}.{token}"
    for left in sorted(path for path in staging.iterdir() if path.name.startswith(f"{place.key}.") and path.is_dir()):
        with contextlib.suppress(FileNotFoundError):
            if left.stat().st_uid != os.geteuid():
                # Its modes cannot be set by this user, so it cannot be published. Renamed first: its author loses it.
                shutil.rmtree(left.rename(f"{own}.{secrets.token_hex(8)}"), ignore_errors=True)
            elif afresh or own.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(own)
                log.info("going on with what an earlier run has fetched")
    _make(own)
    tidy(own, keep_partial=True)
    _adopt_partial(own)
    return own


@contextlib.contextmanager
def created_with(umask: int) -> Iterator[None]:
    """Whatever is created meanwhile lacks these rights."""
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def partial(staging: Path, path: str) -> Path:
    """Where a file of a snapshot lies as long as its end is missing; the directory is made."""
    unfinished = staging / _PARTIAL / path
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    return unfinished


def partial_bytes(staging: Path, path: str) -> int:
    """How many bytes of a file are there already, of those whose end is missing."""
    try:
        return (staging / _PARTIAL / path).stat().st_size
    except FileNotFoundError:
        return 0


def complete(staging: Path, path: str) -> None:
    """Put a file whose end is there in its place."""
    target = staging / path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial(staging, path).replace(target)


def tidy(staging: Path, *, keep_partial: bool = False) -> None:
    """Remove bookkeeping from staging: whatever is hidden at its top is no part of a snapshot."""
    for path in staging.iterdir():
        if path.name.startswith(".") and not (keep_partial and path.name in (_PARTIAL, _LEFT)):
            clear(path)


def discard(staging: Path, paths: Iterable[str]) -> None:
    """Remove files from staging that must be fetched again, or not be there at all."""
    for path in paths:
        (staging / path).unlink(missing_ok=True)


def write(staging: Path, path: str, chunks: Iterable[bytes], advance: Callable[[int], None]) -> None:
    """Write a file into staging; `advance` gets the number of bytes of every chunk. Half a file does not stay."""
    unfinished = partial(staging, path)
    try:
        with unfinished.open("wb") as into:
            for chunk in chunks:
                into.write(chunk)
                advance(len(chunk))
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    complete(staging, path)


def require_space(place: Place, needed_bytes: int) -> None:
    """Check that the volume has room.

    Raises:
        NoSpace: fewer bytes are free than needed; names both numbers.
    """
    space = os.statvfs(place.root)
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < needed_bytes:
        raise NoSpace(
            f"{place.slug} needs {readable(needed_bytes)}, {readable(free_bytes)} free on {place.root}: "
            "enlarge it, or remove snapshots that nobody serves (gc)"
        )


def publish(place: Place, staging: Path, record: Record) -> None:
    """Make a verified staging directory the published snapshot: record, fsync, one rename."""
    (staging / RECORD).write_text(record.to_json())
    for folder, _, names in os.walk(staging, topdown=False):
        for name in names:
            settle(Path(folder, name))
        settle(Path(folder))
    parent = _make(place.directory.parent)
    try:
        staging.rename(place.directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Whoever took over while this process was thought dead was faster, with the same verified content.
        shutil.rmtree(staging)
    _sync(parent)
    _sync(place.root)


def remove(place: Place, token: str) -> None:
    """Take a snapshot away from readers with one rename, then remove it; under its lease, of that token."""
    gone = _make(place.root / STAGING) / f"{place.key}.{token}"
    place.directory.rename(gone)
    _sync(place.directory.parent)
    shutil.rmtree(gone)


def clear(path: Path) -> None:
    """Remove something that was left in staging or among the leases."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_bytes(path: Path) -> int:
    """Of a file, or of all files below a directory."""
    if path.is_dir():
        return sum(below.lstat().st_size for below in path.rglob("*") if not below.is_dir())
    return path.lstat().st_size


def is_full(error: OSError) -> bool:
    """Whether the volume, or the quota of this user, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def explained(root: Path) -> Iterator[None]:
    """Tell what an error of the operating system means for the volume at `root`.

    Raises:
        NoSpace: the volume or its quota is full.
        RefusedVolume: the volume cannot be written.
        VolumeFailed: anything else.
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
                    f"no space left on {root}: enlarge it, or remove snapshots that nobody serves (gc), then run again"
                ) from error
            case errno.EACCES | errno.EPERM | errno.EROFS:
                raise RefusedVolume(
                    f"{where} cannot be used ({error.strerror}): mount {root} writable for user {os.getuid()} "
                    f"or group {os.getgid()} (fsGroup)"
                ) from error
            case errno.ENOTDIR | errno.EEXIST | errno.ENAMETOOLONG:
                raise RefusedVolume(f"{where} is no directory: give the root of a volume") from error
            case _:
                raise VolumeFailed(f"{where} failed ({error.strerror}): check the volume, then run again") from error


def _adopt_partial(staging: Path) -> None:
    """Go on with copies of unfinished files: who began them may be alive still, and write to those it has opened."""
    left = staging / _LEFT
    # Killed while it copied, an earlier run has left what it had not copied to the end.
    for begun, path in _files(left):
        begun.replace(partial(staging, path))
    shutil.rmtree(left, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        (staging / _PARTIAL).rename(left)
    for begun, path in _files(left):
        try:
            shutil.copyfile(begun, partial(staging, path))
        except OSError as error:
            # Without room for both, what was copied is gone on with.
            if not is_full(error):
                raise
        begun.unlink()
    shutil.rmtree(left, ignore_errors=True)


def _files(directory: Path) -> Iterator[tuple[Path, str]]:
    """All files below a directory, each with its path relative to it; none where there is no directory."""
    for folder, _, names in os.walk(directory):
        for name in names:
            yield Path(folder, name), Path(folder, name).relative_to(directory).as_posix()


def _make(directory: Path) -> Path:
    """Create a directory that its group can write, with parents that it can read; leaves what exists as it is."""
    if directory.is_dir():
        return directory
    missing = [parent for parent in directory.parents if not parent.is_dir()]
    for each, rights in (*((parent, 0o050) for parent in reversed(missing)), (directory, 0o070)):
        with contextlib.suppress(FileExistsError):
            each.mkdir()
            _set_mode(each, add=rights)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    return directory


def settle(path: Path) -> None:
    """Let the group read a file or directory and not write it, whatever the umask says, and bring it to the disk."""
    _set_mode(path, add=0o050 if path.is_dir() else 0o040, remove=0o022)
    _sync(path)


def _set_mode(path: Path, add: int, remove: int = 0) -> None:
    mode = path.stat().st_mode
    wanted = mode & ~remove | add
    if wanted != mode:
        try:
            path.chmod(wanted)
        except OSError:
            # Some volumes have fixed modes: rights that are missing matter, rights in excess do not.
            if mode | add != mode:
                raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
