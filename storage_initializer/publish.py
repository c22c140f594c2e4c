"""Publishing of a snapshot: resolve, plan, stage, fetch, verify, publish."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from snapshot_format import model_files
from snapshot_format.layout import SnapshotLocation, lease_path
from snapshot_format.record import File, FileSelection, Record
from snapshot_format.reference import DirectoryReference, ModelReference
from storage_initializer.errors import HubUnavailable, NotFound, RefusedSnapshot, RefusedVolume, VerificationFailed
from storage_initializer.formatting import format_bytes
from storage_initializer.settings import Settings
from storage_initializer.sources import file_selection
from storage_initializer.volume import layout, lease, permissions, record, verify
from storage_initializer.volume.lease import Lease

_LOGGED_PATHS = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A published snapshot."""

    reference: ModelReference
    location: SnapshotLocation
    record: Record
    fresh: bool
    """Whether this run published it."""


class Source(Protocol):
    """A source of snapshots. It translates its own errors; an `OSError` of `fetch` comes from the volume."""

    def resolve(self, *, retry: bool = True) -> str:
        """Return the current commit of the reference, 40 hex digits."""

    def list_files(self, commit: str) -> tuple[File, ...]:
        """List all files of a commit."""

    def read(self, commit: str, file: File) -> bytes:
        """Return the content of a small file of a commit."""

    def fetch(
        self,
        commit: str,
        files: Iterable[File],
        staging: Path,
        advance: Callable[[int], None],
        finished: Callable[[File], None],
    ) -> None:
        """Put files into staging; call `advance` with numbers of bytes and `finished` with files, from any thread."""


class Progress(Protocol):
    """A progress display."""

    def begin(self, total_bytes: int) -> None:
        """Start with the number of expected bytes."""

    def advance(self, size_bytes: int) -> None:
        """Add a number of bytes, negative if they must be fetched again. Called from several threads."""

    def end(self) -> None:
        """Display the final state."""


def initialize(reference: ModelReference, root: Path, settings: Settings, progress: Progress) -> Outcome:
    """Publish the snapshot of a reference on the volume at `root`, unless it is there already.

    Raises:
        InitializerError: readers see no incomplete snapshot.
    """
    publication = _Publication(reference, root, settings, progress, time.monotonic())
    with permissions.umask(settings.umask):
        return publication.run()


@dataclass(frozen=True, slots=True)
class _Publication:
    """The publication of one reference on one volume."""

    reference: ModelReference
    root: Path
    settings: Settings
    progress: Progress
    started: float
    """By the monotonic clock."""

    @property
    def selection(self) -> FileSelection:
        return FileSelection(self.settings.allow_patterns, self.settings.ignore_patterns, self.settings.allow_pickle)

    def run(self) -> Outcome:
        source = self._source()
        commit = self._resolve(source)
        location = SnapshotLocation(self.root, self.reference.slug, commit)
        published = self._find(location)
        fresh = published is None
        if published is None:
            if self._is_offline:
                raise NotFound(f"{self.reference} is not published on {self.root}. Run once without --offline.")
            log.info("%s is commit %s", self.reference, commit)
            # Planned before the lease, so that a repository is rejected without waiting.
            plan = file_selection.make_plan(
                source.list_files(commit), str(self.reference), self.selection, partial(source.read, commit)
            )
            log.info("%d files, %s%s", len(plan.files), format_bytes(plan.size_bytes), _excluded(plan))
            with layout.translate_os_errors(self.root), self._lease(location) as held:
                # The previous holder of the lease may have published it in the meantime.
                published = self._find(location)
                fresh = published is None
                if published is None:
                    published = self._publish(source, location, plan, held)
        if not self.reference.is_commit:
            with layout.translate_os_errors(self.root):
                layout.write_ref(location, self.reference.revision)
        return Outcome(self.reference, location, published, fresh)

    @property
    def _is_offline(self) -> bool:
        return self.settings.offline and not isinstance(self.reference, DirectoryReference)

    def _source(self) -> Source:
        # Imported here, because imports dominate the time to check a published snapshot.
        if isinstance(self.reference, DirectoryReference):
            from storage_initializer.sources import local

            return local.open_source(self.reference, self.selection)
        from storage_initializer.sources.hub import Hub

        return Hub(self.reference, self.settings)

    def _lease(self, location: SnapshotLocation) -> contextlib.AbstractContextManager[Lease]:
        return lease.hold(lease_path(location), self.settings.lock_stale_seconds, self.settings.lock_timeout_seconds)

    def _resolve(self, source: Source) -> str:
        """Return the commit, or the last known one if the Hub is unreachable or offline mode is set."""
        if self.reference.is_commit:
            return self.reference.revision
        with layout.translate_os_errors(self.root):
            last = layout.resolve_ref(self.root, self.reference.slug, self.reference.revision)
        if self._is_offline:
            if last is None:
                raise NotFound(f"{self.reference} was never resolved on {self.root}. Run once without --offline.")
            log.warning("offline: using commit %s of %s, which may be outdated", last, self.reference)
            return last
        try:
            # With a fallback, a pod should not wait for an unavailable Hub.
            return source.resolve(retry=last is None)
        except HubUnavailable as error:
            if last is None:
                raise
            log.warning("using commit %s, the last known one of %s: %s", last, self.reference, error)
            return last

    def _find(self, location: SnapshotLocation) -> Record | None:
        """Return the record of the published snapshot.

        Raises:
            RefusedVolume: it was published with another selection of files.
        """
        with layout.translate_os_errors(self.root):
            published = layout.find(location)
        if published is not None and not self.selection.agrees_with(published.selection):
            raise RefusedVolume(
                f"{location.directory} was published with {published.selection}, not with {self.selection}. "
                f"Use the same patterns, or remove it first "
                f"(gc {self.root} --reference {self.reference.name}:{location.commit} --force)."
            )
        return published

    def _publish(self, source: Source, location: SnapshotLocation, plan: file_selection.Plan, held: Lease) -> Record:
        """Stage, fetch, verify and publish, under a lease."""
        staging = layout.stage(location, held.token)
        files = self._fetch(source, location, plan, staging, held)
        layout.remove_bookkeeping(staging)
        # Checksums were compared when each file was complete. Now check that no file is missing or unexpected.
        self._require(verify.check(staging, files, fast=True).issues, staging)
        log.info("verified %d files", len(files))
        seconds = time.monotonic() - self.started
        selection = file_selection.effective_selection(self.selection, plan)
        published = record.make(str(self.reference), location.commit, files, selection, seconds)
        held.check()
        layout.publish(location, staging, published)
        return published

    def _fetch(
        self, source: Source, location: SnapshotLocation, plan: file_selection.Plan, staging: Path, held: Lease
    ) -> tuple[File, ...]:
        """Fetch the files of the plan into staging and verify them."""
        # Files of an earlier run are kept only if their content verifies.
        staged = verify.check(staging, plan.files)
        layout.discard(staging, [issue.path for issue in staged.issues])
        for file in staged.files:
            self._require_loadable(staging, file)
        verified = {file.path: file for file in staged.files}
        missing = [file for file in plan.files if file.path not in verified]
        missing_bytes = sum(max(0, file.size_bytes - layout.partial_bytes(staging, file.path)) for file in missing)
        layout.require_space(location, missing_bytes)
        issues: list[verify.Issue] = []

        def advance(size_bytes: int) -> None:
            held.check()
            self.progress.advance(size_bytes)

        def finished(file: File) -> None:
            # In the thread that has fetched it, while others still wait for the network.
            compared = verify.compare(staging, file)
            if isinstance(compared, verify.Issue):
                issues.append(compared)
            else:
                self._require_loadable(staging, file)
                verified[file.path] = compared
                permissions.chmod_and_fsync(staging / file.path)

        self.progress.begin(missing_bytes)
        try:
            # Group-writable, so that other users of the group can remove the files if this program dies.
            with permissions.umask(self.settings.umask & ~0o070):
                source.fetch(location.commit, missing, staging, advance, finished)
                self._require(issues, staging)
        except OSError as error:
            if layout.is_full(error):
                layout.remove_bookkeeping(staging, keep_partial=True)
            raise
        finally:
            self.progress.end()
        return tuple(verified[file.path] for file in plan.files)

    def _require_loadable(self, staging: Path, file: File) -> None:
        """Check that the content can be loaded: the checksums of a source are also those of damaged content.

        Raises:
            RefusedSnapshot: the file is a Git LFS pointer, or its weights are empty or truncated.
        """
        fix = "Replace it at its source, or use another revision"
        if problem := model_files.find_problem(staging / file.path, fix):
            raise RefusedSnapshot(f"{file.path} of {self.reference} {problem}.")

    def _require(self, issues: Sequence[verify.Issue], staging: Path) -> None:
        """Remove wrong files from staging and report all of them.

        Raises:
            VerificationFailed: there are issues.
        """
        if not issues:
            return
        layout.discard(staging, [issue.path for issue in issues])
        problems = "; ".join(str(issue) for issue in sorted(issues, key=str))
        raise VerificationFailed(
            f"{self.reference} was not published, {len(issues)} of its files are wrong: {problems}. "
            "Run again to fetch them again."
        )


def _excluded(plan: file_selection.Plan) -> str:
    """Return the first excluded paths for the log: a repository may contain a whole data set."""
    if not plan.excluded:
        return ""
    more = f" and {len(plan.excluded) - _LOGGED_PATHS} more" if plan.excluded[_LOGGED_PATHS:] else ""
    return f", excluding {', '.join(plan.excluded[:_LOGGED_PATHS])}{more}"
