"""The story: resolve, plan, stage, fetch, verify, publish.

Composes the modules below and owns the order of the steps, nothing else.
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from snapshot_format.reference import DirectoryReference, ModelReference
from storage_initializer.errors import HubUnavailable, NotFound, RefusedVolume, VerificationFailed
from storage_initializer.settings import Settings
from storage_initializer.sources import file_selection
from storage_initializer.sources.file_selection import Choice, File
from storage_initializer.volume import layout, lease, record, verify
from storage_initializer.volume.lease import Lease
from storage_initializer.volume.record import Record

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is on the volume now."""

    reference: ModelReference
    place: layout.Place
    record: Record
    fresh: bool
    """Whether this run published it; otherwise it was there already."""


class Source(Protocol):
    """Where snapshots come from. An `OSError` of `fetch` is the volume's; a source explains its own."""

    def resolve(self, *, patient: bool = True) -> str:
        """The commit, 40 hex digits, that the reference stands for now; without patience, nobody is asked twice."""

    def listing(self, commit: str) -> tuple[File, ...]:
        """All files of a commit."""

    def fetch(
        self,
        commit: str,
        files: Iterable[File],
        staging: Path,
        advance: Callable[[int], None],
        finished: Callable[[File], None],
    ) -> None:
        """Put files into staging; `advance` gets numbers of bytes and `finished` whole files, from any thread."""


class Progress(Protocol):
    """Who is told how the work goes."""

    def begin(self, total_bytes: int) -> None:
        """So many bytes are to come."""

    def advance(self, size_bytes: int) -> None:
        """So many more are here, or must come again if negative. Called from several threads."""

    def end(self) -> None:
        """No more will come."""


def initialize(reference: ModelReference, root: Path, settings: Settings, progress: Progress) -> Outcome:
    """Make sure that the volume at `root` holds the snapshot that a reference stands for.

    Raises:
        InitializerError: one sentence says why not; nothing half-done is visible to readers.
    """
    work = _Work(reference, root, settings, progress, time.monotonic())
    with layout.created_with(settings.umask):
        return work.outcome()


@dataclass(frozen=True, slots=True)
class _Work:
    """One reference on its way to one volume."""

    reference: ModelReference
    root: Path
    settings: Settings
    progress: Progress
    started: float
    """By the monotonic clock."""

    @property
    def choice(self) -> Choice:
        return Choice(self.settings.allow_patterns, self.settings.ignore_patterns, self.settings.allow_pickle)

    def outcome(self) -> Outcome:
        source = self._source()
        commit = self._resolve(source)
        place = layout.Place(self.root, self.reference.slug, commit)
        published = self._find(place)
        fresh = published is None
        if published is None:
            if self._must_not_ask:
                raise NotFound(f"{self.reference} is not published on {self.root}: run once without --offline")
            log.info("%s is commit %s", self.reference, commit)
            # Planned before the lease, so that a repository that must be refused is refused without waiting.
            chosen = file_selection.make(source.listing(commit), str(self.reference), self.choice)
            left_out = f", leaving out {', '.join(chosen.left_out)}" if chosen.left_out else ""
            log.info("%d files, %s%s", len(chosen.files), file_selection.readable(chosen.size_bytes), left_out)
            with layout.explained(self.root), self._lease(place) as held:
                # Whoever held the lease before may have published meanwhile.
                published = self._find(place)
                fresh = published is None
                if published is None:
                    published = self._publish(source, place, chosen, held)
        if not self.reference.is_commit:
            with layout.explained(self.root):
                layout.point(place, self.reference.revision)
        return Outcome(self.reference, place, published, fresh)

    @property
    def _must_not_ask(self) -> bool:
        return self.settings.offline and not isinstance(self.reference, DirectoryReference)

    def _source(self) -> Source:
        # Each is imported when it is needed: what a published snapshot costs is mostly imports.
        if isinstance(self.reference, DirectoryReference):
            from storage_initializer.sources import local

            return local.source(self.reference, self.choice)
        from storage_initializer.sources.hub import Hub

        return Hub(self.reference, self.settings)

    def _lease(self, place: layout.Place) -> contextlib.AbstractContextManager[Lease]:
        return lease.hold(
            layout.lease_path(place), self.settings.lock_stale_seconds, self.settings.lock_timeout_seconds
        )

    def _resolve(self, source: Source) -> str:
        """The commit, or the last known one where the Hub may not be asked or does not answer."""
        if self.reference.is_commit:
            return self.reference.revision
        with layout.explained(self.root):
            last = layout.resolved(self.root, self.reference.slug, self.reference.revision)
        if self._must_not_ask:
            if last is None:
                raise NotFound(f"{self.reference} was never resolved on {self.root}: run once without --offline")
            log.warning("offline: %s may have moved since it was commit %s", self.reference, last)
            return last
        try:
            # With something to fall back on, a pod should not wait for a Hub that is away.
            return source.resolve(patient=last is None)
        except HubUnavailable as error:
            if last is None:
                raise
            log.warning("%s; going on with commit %s, which %s was the last time", error, last, self.reference)
            return last

    def _find(self, place: layout.Place) -> Record | None:
        """What is published there.

        Raises:
            RefusedVolume: other files of that commit than those that are wanted now.
        """
        with layout.explained(self.root):
            published = layout.find(place)
        if published is not None and not self.choice.agrees_with(published.choice):
            raise RefusedVolume(
                f"{place.directory} was published with {published.choice}, not with {self.choice}: ask for the same, "
                f"or remove it first (gc {self.root} --reference {self.reference.name}:{place.commit} --force)"
            )
        return published

    def _publish(self, source: Source, place: layout.Place, chosen: file_selection.Plan, held: Lease) -> Record:
        """Stage, fetch, verify and publish, under a lease."""
        staging = layout.stage(place, held.token)
        files = self._fetch(source, place, chosen, staging, held)
        layout.tidy(staging)
        # Every checksum was compared when the file came; now nothing may be missing, and nothing else be there.
        self._require(verify.check(staging, files, fast=True).issues, staging)
        log.info("verified %d files", len(files))
        seconds = time.monotonic() - self.started
        published = record.make(str(self.reference), place.commit, files, self.choice.taken(chosen), seconds)
        held.check()
        layout.publish(place, staging, published)
        return published

    def _fetch(
        self, source: Source, place: layout.Place, chosen: file_selection.Plan, staging: Path, held: Lease
    ) -> tuple[File, ...]:
        """The files of the plan, verified, in staging."""
        # What an earlier run left is kept for its content only: whatever does not verify is fetched again.
        staged = verify.check(staging, chosen.files)
        layout.discard(staging, [issue.path for issue in staged.issues])
        verified = {file.path: file for file in staged.files}
        missing = [file for file in chosen.files if file.path not in verified]
        missing_bytes = sum(max(0, file.size_bytes - layout.partial_bytes(staging, file.path)) for file in missing)
        layout.require_space(place, missing_bytes)
        issues: list[verify.Issue] = []

        def advance(size_bytes: int) -> None:
            held.check()
            self.progress.advance(size_bytes)

        def finished(file: File) -> None:
            # In the thread that has fetched it, while others still wait for the network.
            found = verify.compare(staging, file)
            if isinstance(found, verify.Issue):
                issues.append(found)
            else:
                verified[file.path] = found
                layout.settle(staging / file.path)

        self.progress.begin(missing_bytes)
        try:
            # Others of the group can remove what is left, should this program die.
            with layout.created_with(self.settings.umask & ~0o070):
                # Indexes first: that a shard is missing should not come out after hours.
                source.fetch(place.commit, filter(file_selection.is_index, missing), staging, advance, finished)
                self._require(issues, staging)
                for index in filter(file_selection.is_index, chosen.files):
                    file_selection.require_shards(
                        chosen, index.path, (staging / index.path).read_bytes(), str(self.reference)
                    )
                others = itertools.filterfalse(file_selection.is_index, missing)
                source.fetch(place.commit, others, staging, advance, finished)
                self._require(issues, staging)
        except OSError as error:
            if layout.is_full(error):
                layout.tidy(staging, keep_partial=True)
            raise
        finally:
            self.progress.end()
        return tuple(verified[file.path] for file in chosen.files)

    def _require(self, issues: Sequence[verify.Issue], staging: Path) -> None:
        """Leave out of staging what is wrong, and tell all of it at once.

        Raises:
            VerificationFailed: anything is.
        """
        if not issues:
            return
        layout.discard(staging, [issue.path for issue in issues])
        problems = "; ".join(str(issue) for issue in sorted(issues, key=str))
        raise VerificationFailed(
            f"{self.reference} was not published, {len(issues)} of its files are wrong: {problems}; "
            "run again to fetch these anew"
        )
