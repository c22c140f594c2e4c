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

_CHUNK_BYTES = 1 << 20

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
    """The staging directory of a lease, by its token, with all that earlier ones left behind for the same commit."""
    staging = _make(place.root / STAGING)
    own = staging / f"{place.key}.{token}"
    for left in sorted(path for path in staging.iterdir() if path.name.startswith(f"{place.key}.") and path.is_dir()):
        if own.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                left.rename(own)
                log.info("going on with what an earlier run has fetched")
    own.mkdir(exist_ok=True)
    tidy(own)
    return own


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


def copy(source: Path, files: Iterable[File], staging: Path, advance: Callable[[int], None]) -> None:
    """Copy files of a directory into staging; `advance` gets the number of bytes of every chunk."""
    for file in files:
        target = staging / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with (source / file.path).open("rb") as content, target.open("wb") as into:
            while chunk := content.read(_CHUNK_BYTES):
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
    """Create a directory that a group can read, with its parents; leaves an existing one as it is."""
    if not directory.is_dir():
        _make(directory.parent)
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            directory.chmod(directory.stat().st_mode | 0o050)
    return directory


def _settle(path: Path) -> None:
    """Let the group read a file or directory, whatever the umask says, and bring it to the disk."""
    status = path.stat()
    wanted = status.st_mode | (0o050 if path.is_dir() else 0o040)
    if wanted != status.st_mode:
        path.chmod(wanted)
    _sync(path)


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
