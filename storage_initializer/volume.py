"""What lies on a volume, and the only writer of it: staging, publishing, records, refs, free space.

    <root>/
        demo--arithmetic/                             one directory per model: the reference's slug
            4f0a…c1/                                  one directory per snapshot: the commit
                config.json  model.safetensors  …     as on the Hub
                .snapshot.json                        the record: what this is and what every file must be
            refs/
                main                                  holds the commit and a line feed
                refs%2Fpr%2F4                         a revision is percent-encoded, see `reference.py`
        .staging/demo--arithmetic@4f0a…c1.9d3e…/      a snapshot being fetched; the suffix is the lease's token
        .locks/demo--arithmetic@4f0a…c1.lease         who fetches it, see `lease.py`

Readers look at `<slug>/` only, and see no snapshot or a complete one: the record is written last into staging, then one
rename publishes the whole directory. Nothing is ever written into a published snapshot.

The group of the volume (`fsGroup`) may be all that two initializers have in common: `<slug>/`, `refs/`, `.staging/`,
`.locks/` and the leases are group-writable, so that each can publish beside the other, move its refs and take over from
it. Published snapshots are for the group to read only. The root's own mode is up to whoever made it.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from storage_initializer.errors import (
    InitializerError,
    NoSpace,
    RefusedVolume,
    VolumeFailed,
)
from storage_initializer.plan import File, readable
from storage_initializer.reference import escape

FORMAT_VERSION = 1
"""Of the record and of the layout. A reader refuses what is newer, and ignores fields it does not know."""

RECORD = ".snapshot.json"
REFS = "refs"
STAGING = ".staging"
LOCKS = ".locks"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one snapshot belongs."""

    root: Path
    slug: str
    commit: str

    @property
    def directory(self) -> Path:
        """The published snapshot."""
        return self.root / self.slug / self.commit

    @property
    def key(self) -> str:
        """The name of this snapshot in staging and among the leases; no slug holds an `@`."""
        return f"{self.slug}@{self.commit}"


@dataclass(frozen=True, slots=True)
class Record:
    """What a published snapshot says about itself in `.snapshot.json`."""

    reference: str
    commit: str
    files: tuple[File, ...]
    tool: str
    published_at: str
    """UTC, RFC 3339."""
    duration_seconds: float
    """From the start of the program to the rename."""

    @property
    def size_bytes(self) -> int:
        """Of all files, the record itself not counted."""
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> str:
        """The record as it lies on the volume."""
        fields = {
            "format_version": FORMAT_VERSION,
            "reference": self.reference,
            "commit": self.commit,
            "files": [{"path": file.path, "size": file.size_bytes, "sha256": file.sha256} for file in self.files],
            "tool": self.tool,
            "published_at": self.published_at,
            "duration_seconds": self.duration_seconds,
        }
        return json.dumps(fields, indent=2) + "\n"


def find(place: Place) -> Record | None:
    """The record of a published snapshot, or None where nothing is published.

    Raises:
        RefusedVolume: something else lies there, or a newer tool wrote it.
    """
    if not place.directory.is_dir():
        return None
    path = place.directory / RECORD
    try:
        fields = json.loads(path.read_bytes())
        version = int(fields["format_version"])
        if version == FORMAT_VERSION:
            return Record(
                reference=str(fields["reference"]),
                commit=str(fields["commit"]),
                files=tuple(File(file["path"], int(file["size"]), file["sha256"]) for file in fields["files"]),
                tool=str(fields["tool"]),
                published_at=str(fields["published_at"]),
                duration_seconds=float(fields["duration_seconds"]),
            )
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise RefusedVolume(
            f"{place.directory} has no readable {RECORD}, so nobody knows what it holds: remove it and run again"
        ) from error
    raise RefusedVolume(f"{path} has format version {version}, newer than {FORMAT_VERSION}: update this program")


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
    _settle(draft)
    draft.replace(path)
    _sync(path.parent)


def lease_path(place: Place) -> Path:
    """Where the lease of a snapshot lies; makes the directory."""
    return _make(place.root / LOCKS) / f"{place.key}.lease"


def stage(place: Place, token: str) -> Path:
    """The staging directory of a lease, by its token, with all that earlier ones left behind for the same commit.

    What another user left there is removed as far as this one may, and fetched anew.
    """
    staging = _make(place.root / STAGING)
    own = staging / f"{place.key}.{token}"
    for left in sorted(path for path in staging.iterdir() if path.name.startswith(f"{place.key}.") and path.is_dir()):
        with contextlib.suppress(FileNotFoundError):
            if left.stat().st_uid != os.geteuid():
                # Its modes cannot be set by this user, so it cannot be published. Renamed first: its author loses it.
                shutil.rmtree(left.rename(f"{own}.{secrets.token_hex(8)}"), ignore_errors=True)
            elif own.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(own)
                log.info("going on with what an earlier run has fetched")
    _make(own)
    tidy(own)
    return own


@contextlib.contextmanager
def left_to_the_group() -> Iterator[None]:
    """Whatever is put into staging meanwhile can be removed by others of the group, should this program die."""
    before = os.umask(0o077)
    os.umask(before & ~0o070)
    try:
        yield
    finally:
        os.umask(before)


def tidy(staging: Path) -> None:
    """Remove bookkeeping from staging: whatever is hidden at its top is no part of a snapshot."""
    for path in staging.iterdir():
        if path.name.startswith("."):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def discard(staging: Path, paths: Iterable[str]) -> None:
    """Remove files from staging that must be fetched again, or not be there at all."""
    for path in paths:
        (staging / path).unlink(missing_ok=True)


def write(target: Path, chunks: Iterable[bytes], advance: Callable[[int], None]) -> None:
    """Write a file into staging; `advance` gets the number of bytes of every chunk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as into:
        for chunk in chunks:
            into.write(chunk)
            advance(len(chunk))


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
            "enlarge the volume or remove snapshots that nobody serves"
        )


def publish(place: Place, staging: Path, record: Record) -> None:
    """Make a verified staging directory the published snapshot: record, fsync, one rename."""
    (staging / RECORD).write_text(record.to_json())
    for folder, _, names in os.walk(staging, topdown=False):
        for name in names:
            _settle(Path(folder, name))
        _settle(Path(folder))
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
            case errno.ENOSPC | errno.EDQUOT:
                raise NoSpace(f"no space left on {root}: enlarge the volume, then run again") from error
            case errno.EACCES | errno.EPERM | errno.EROFS:
                raise RefusedVolume(
                    f"{where} cannot be used ({error.strerror}): mount {root} writable for user {os.getuid()} "
                    f"or group {os.getgid()} (fsGroup)"
                ) from error
            case errno.ENOTDIR | errno.EEXIST | errno.ENAMETOOLONG:
                raise RefusedVolume(f"{where} is no directory: give the root of a volume") from error
            case _:
                raise VolumeFailed(f"{where} failed ({error.strerror}): check the volume, then run again") from error


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


def _settle(path: Path) -> None:
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
