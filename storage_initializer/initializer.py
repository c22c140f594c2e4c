"""The story: resolve, plan, stage, fetch, verify, publish.

Composes the modules below and owns the order of the steps, nothing else.
"""

import contextlib
import datetime
import errno
import importlib.metadata
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage_initializer import lease, plan, verify, volume
from storage_initializer.errors import AccessDenied, NotFound, SourceFailed, VerificationFailed
from storage_initializer.hub import Hub
from storage_initializer.lease import Lease
from storage_initializer.plan import File
from storage_initializer.reference import DirectoryReference, ModelReference
from storage_initializer.settings import Settings

_CHUNK_BYTES = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is on the volume now."""

    reference: ModelReference
    place: volume.Place
    record: volume.Record
    fresh: bool
    """Whether this run published it; otherwise it was there already."""


class Source(Protocol):
    """Where snapshots come from. An `OSError` of `fetch` is the volume's; a source explains its own."""

    def resolve(self) -> str:
        """The commit, 40 hex digits, that the reference stands for now."""

    def listing(self, commit: str) -> tuple[File, ...]:
        """All files of a commit."""

    def fetch(self, commit: str, files: Iterable[File], staging: Path, advance: Callable[[int], None]) -> None:
        """Put files into staging; `advance` gets numbers of bytes, maybe from several threads."""


class Progress(Protocol):
    """Who is told how the fetching goes."""

    def begin(self, total_bytes: int) -> None:
        """So many bytes are to be fetched."""

    def advance(self, size_bytes: int) -> None:
        """So many more are here, or must be fetched again if negative. Called from several threads."""

    def end(self) -> None:
        """No more will come."""


def initialize(reference: ModelReference, root: Path, settings: Settings, progress: Progress) -> Outcome:
    """Make sure that the volume at `root` holds the snapshot that a reference stands for.

    Raises:
        InitializerError: one sentence says why not; nothing half-done is visible to readers.
    """
    started = time.monotonic()
    source = _source(reference, settings)
    commit = source.resolve()
    place = volume.Place(root, reference.slug, commit)
    with volume.explained(root):
        record = volume.find(place)
    fresh = record is None
    if record is None:
        log.info("%s is commit %s", reference, commit)
        # Planned before the lease, so that a repository that must be refused is refused without waiting.
        chosen = plan.make(source.listing(commit), str(reference))
        log.info("%d files, %s%s", len(chosen.files), plan.readable(chosen.size_bytes), _left_out(chosen))
        with (
            volume.explained(root),
            lease.hold(volume.lease_path(place), settings.lock_stale_seconds, settings.lock_timeout_seconds) as held,
        ):
            # Whoever held the lease before may have published meanwhile.
            record = volume.find(place)
            fresh = record is None
            if record is None:
                record = _publish(reference, source, place, chosen, held, progress, started)
    if not reference.is_commit:
        with volume.explained(root):
            volume.point(place, reference.revision)
    return Outcome(reference, place, record, fresh)


def _publish(
    reference: ModelReference,
    source: Source,
    place: volume.Place,
    chosen: plan.Plan,
    held: Lease,
    progress: Progress,
    started: float,
) -> volume.Record:
    """Stage, fetch, verify and publish, under a lease."""
    staging = volume.stage(place, held.token)
    # What an earlier run left is kept for its content only: whatever does not verify is fetched again.
    staged = verify.check(staging, chosen.files)
    volume.discard(staging, [issue.path for issue in staged.issues])
    kept = {file.path for file in staged.files}
    missing = [file for file in chosen.files if file.path not in kept]

    missing_bytes = sum(file.size_bytes for file in missing)
    volume.require_space(place, missing_bytes)

    def advance(size_bytes: int) -> None:
        held.check()
        progress.advance(size_bytes)

    progress.begin(missing_bytes)
    try:
        with volume.left_to_the_group():
            source.fetch(place.commit, missing, staging, advance)
    finally:
        progress.end()
    volume.tidy(staging)

    held.check()
    found = verify.check(staging, chosen.files)
    if found.issues:
        volume.discard(staging, [issue.path for issue in found.issues])
        problems = "; ".join(str(issue) for issue in found.issues)
        raise VerificationFailed(
            f"{reference} was not published, {len(found.issues)} of {len(chosen.files)} files are wrong: {problems}; "
            "run again to fetch these anew"
        )
    for index in plan.indexes(chosen):
        plan.require_shards(chosen, index.path, (staging / index.path).read_bytes(), str(reference))
    log.info("verified %d files", len(found.files))

    record = volume.Record(
        reference=str(reference),
        commit=place.commit,
        files=found.files,
        tool=f"kserve-llm {importlib.metadata.version('kserve-llm')}",
        published_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        duration_seconds=round(time.monotonic() - started, 3),
    )
    held.check()
    volume.publish(place, staging, record)
    return record


def _source(reference: ModelReference, settings: Settings) -> Source:
    if isinstance(reference, DirectoryReference):
        return _Directory(reference)
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    return Hub(reference, settings.hf_endpoint, token, settings.parallel_files)


def _left_out(chosen: plan.Plan) -> str:
    return f", leaving out {', '.join(chosen.left_out)}" if chosen.left_out else ""


class _Directory:
    """A directory of this machine as a source: its content stands for the commit, so every run reads it whole."""

    def __init__(self, reference: DirectoryReference) -> None:
        self._reference = reference
        self._files: tuple[File, ...] = ()

    def resolve(self) -> str:
        """The fingerprint of the files that would be published.

        Raises:
            NotFound: no such directory.
            AccessDenied: this user may not read it, or something in it.
            SourceFailed: it cannot be read for now.
            RefusedSnapshot: it holds what must not be served.
        """
        path = self._reference.path
        with self._explained():
            if not stat.S_ISDIR(path.stat().st_mode):
                raise NotFound(f"{self._reference} is a file: unpack it and give the directory")
            self._files = verify.describe(path)
        return plan.make(self._files, str(self._reference)).fingerprint

    def listing(self, _commit: str) -> tuple[File, ...]:
        """The files as `resolve` has found them."""
        return self._files

    def fetch(self, _commit: str, files: Iterable[File], staging: Path, advance: Callable[[int], None]) -> None:
        """Copy the files.

        Raises:
            AccessDenied, SourceFailed: as above.
        """
        for file in files:
            volume.write(staging / file.path, self._chunks(file), advance)

    def _chunks(self, file: File) -> Iterator[bytes]:
        """The content of a file. Errors of whoever takes the chunks do not pass through here."""
        with self._explained(), (self._reference.path / file.path).open("rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                yield chunk

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = self._reference.path
            where = error.filename or path
            match error.errno:
                case errno.EACCES | errno.EPERM:
                    raise AccessDenied(
                        f"{self._reference} cannot be read ({where}: {error.strerror}): let user {os.getuid()} "
                        f"or group {os.getgid()} read it (chmod -R a+rX)"
                    ) from error
                case errno.ENOENT | errno.ENOTDIR if where in (path, str(path)):
                    raise NotFound(f"{self._reference} does not exist: check the path") from error
                case _:
                    raise SourceFailed(
                        f"{self._reference} failed ({where}: {error.strerror}): check it, then run again"
                    ) from error
