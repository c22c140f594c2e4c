"""List the snapshots on a volume; remove old snapshots and stale files of dead initializers.

Removal is safe next to other initializers, because it happens under the lease of each snapshot. Readers mount the
volume read-only and leave no trace, so the administrator must know which snapshots are being served.
"""

import contextlib
import datetime
import itertools
import logging
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from snapshot_format.layout import LEASE_SUFFIX, LOCKS, REFS, STAGING, SnapshotLocation, lease_path
from snapshot_format.record import Record
from snapshot_format.reference import ModelReference
from storage_initializer.errors import LeaseTimeout, NotFound, RefusedVolume
from storage_initializer.volume import layout, lease, record

_STALE_FILE_SECONDS = 3600.0
"""Draft refs and lease clocks exist for milliseconds; older ones were left behind."""

_KEY = re.compile(r"(?P<slug>[^@]+)@(?P<commit>[0-9a-f]{40})(-[\w-]+)?\.")
"""Prefix of all staging and lock files of a snapshot and its variants."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A published snapshot."""

    location: SnapshotLocation
    record: Record | None
    """None if it is unreadable; such a snapshot is never removed."""
    revisions: tuple[str, ...]
    """The revisions whose refs point to it."""

    @property
    def name(self) -> str:
        """Its directory, relative to the root of the volume."""
        return f"{self.location.slug}/{self.location.name}"

    @property
    def age_seconds(self) -> float:
        """Time since it was published."""
        if self.record is None:
            return 0.0
        return time.time() - datetime.datetime.fromisoformat(self.record.published_at).timestamp()


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules for the removal of snapshots."""

    keep: int | None = None
    """Number of latest snapshots of each model to keep. Default: 1, or 0 if `reference` is a commit."""
    reference: ModelReference | None = None
    """Limits the removal to one model, or to one commit."""
    force: bool = False
    """Also remove snapshots that refs point to."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on a snapshot that the policy selects."""

    snapshot: Snapshot
    remove: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Removal:
    """A path that was removed, or would be removed in a dry run."""

    path: str
    size_bytes: int


def list_snapshots(root: Path) -> tuple[Snapshot, ...]:
    """List all snapshots on a volume by model, the latest first.

    Raises:
        NotFound: the directory does not exist.
    """
    if not root.is_dir():
        raise NotFound(f"{root} does not exist. Specify the root of a volume.")
    with layout.translate_os_errors(root):
        snapshots = [
            _snapshot(_location(root, path)) for path in root.glob("*--*/*") if path.name != REFS and path.is_dir()
        ]
    return tuple(sorted(snapshots, key=lambda snapshot: (snapshot.location.slug, snapshot.age_seconds)))


def select_removable(snapshots: Iterable[Snapshot], policy: Policy) -> list[Verdict]:
    """Decide which snapshots to remove.

    Selected are all but the latest `keep` originals of each model, and variants whose original no longer exists.
    Selected snapshots without a readable record are kept, and those with refs unless the policy forces their removal.
    Variants of an existing original are not listed: they are removed together with it.

    Args:
        snapshots: the snapshots of a volume, by model, the latest first.
        policy: the rules.
    """
    keep = 1 if policy.keep is None else policy.keep
    if reference := policy.reference:
        snapshots = [snapshot for snapshot in snapshots if snapshot.location.slug == reference.slug]
        if reference.is_commit:
            snapshots = [snapshot for snapshot in snapshots if snapshot.location.commit == reference.revision]
            keep = policy.keep or 0
    snapshots = tuple(snapshots)
    originals = [snapshot for snapshot in snapshots if not snapshot.location.variant]
    locations = {snapshot.location for snapshot in originals}
    selected = [
        (snapshot, "its original no longer exists")
        for snapshot in snapshots
        if snapshot.location.variant and replace(snapshot.location, variant="") not in locations
    ]
    for _, group in itertools.groupby(originals, key=lambda snapshot: snapshot.location.slug):
        selected += [(snapshot, f"not among the latest {keep}") for snapshot in list(group)[keep:]]
    return [_verdict(snapshot, reason, policy.force) for snapshot, reason in selected]


def _verdict(snapshot: Snapshot, reason: str, force: bool) -> Verdict:
    if snapshot.record is None:
        return Verdict(snapshot, remove=False, reason="its record is unreadable")
    if snapshot.revisions and not force:
        return Verdict(snapshot, remove=False, reason=f"refs/{', refs/'.join(snapshot.revisions)} points to it")
    return Verdict(snapshot, remove=True, reason=reason)


def collect(root: Path, policy: Policy, stale_seconds: float, *, dry_run: bool = False) -> Iterator[Removal]:
    """Remove the selected snapshots, each right after its variants, and stale files; nothing in a dry run.

    Snapshots that are being written, or that a variant is being derived from, are kept.

    Raises:
        NotFound, RefusedVolume, VolumeFailed: the volume does not exist, or its files cannot be removed.
    """
    for verdict in select_removable(list_snapshots(root), policy):
        snapshot = verdict.snapshot
        log.info("%s %s: %s", "selected" if verdict.remove else "keeping", snapshot.name, verdict.reason)
        if not verdict.remove:
            continue
        with _leased(snapshot.location, stale_seconds, dry_run=dry_run) as token:
            if token is None:
                log.info("keeping %s: it is being written", snapshot.name)
            elif policy.force or _revisions(snapshot.location) == snapshot.revisions:
                if token:
                    layout.delete_refs(snapshot.location, snapshot.revisions)
                for removable in (*_derived_snapshots(snapshot.location), snapshot):
                    if token:
                        layout.remove(removable.location, token)
                    yield Removal(removable.name, removable.record.size_bytes if removable.record else 0)
    if policy.reference is None:
        yield from _collect_stale_files(root, stale_seconds, dry_run=dry_run)


def _derived_snapshots(original: SnapshotLocation) -> Iterator[Snapshot]:
    """Iterate over the readable variants of a snapshot."""
    for directory in sorted(original.directory.parent.glob(f"{original.name}-*")):
        snapshot = _snapshot(_location(original.root, directory))
        if snapshot.record is None:
            log.warning("keeping %s: its record is unreadable", snapshot.name)
        else:
            yield snapshot


def _collect_stale_files(root: Path, stale_seconds: float, *, dry_run: bool) -> Iterator[Removal]:
    """Remove staging directories, leases and draft refs of dead initializers."""
    stale: dict[SnapshotLocation, list[Path]] = {}
    for folder in (STAGING, LOCKS):
        with layout.translate_os_errors(root), contextlib.suppress(FileNotFoundError):
            for path in sorted((root / folder).iterdir()):
                if match := _KEY.match(path.name):
                    stale.setdefault(SnapshotLocation(root, match["slug"], match["commit"]), []).append(path)
    for location, paths in stale.items():
        with _leased(location, stale_seconds, dry_run=dry_run) as token:
            if token is None:
                log.info("keeping files of %s: it is being written", location.key)
                continue
            for path in paths:
                # The old lease is replaced by the one held here, and disappears with it.
                is_lease = path.suffix == LEASE_SUFFIX
                if path.is_dir() or is_lease or _is_older_than(path, _STALE_FILE_SECONDS):
                    yield Removal(path.relative_to(root).as_posix(), layout.size_bytes(path))
                    if token and not is_lease:
                        layout.remove_path(path)


@contextlib.contextmanager
def _leased(location: SnapshotLocation, stale_seconds: float, *, dry_run: bool) -> Iterator[str | None]:
    """Yield the token of a snapshot's lease, empty in a dry run; None if another initializer holds it."""
    path = lease_path(location)
    if dry_run:
        yield None if lease.seems_held(path, stale_seconds) else ""
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(layout.translate_os_errors(location.root))
        try:
            held = stack.enter_context(lease.hold(path, stale_seconds, timeout_seconds=0.0))
        except LeaseTimeout:
            yield None
        else:
            yield held.token


def _location(root: Path, directory: Path) -> SnapshotLocation:
    commit, _, variant = directory.name.partition("-")
    return SnapshotLocation(root, directory.parent.name, commit, variant)


def _revisions(location: SnapshotLocation) -> tuple[str, ...]:
    """Return the revisions that point to a snapshot; variants have none."""
    if location.variant:
        return ()
    refs = sorted(path.name for path in (location.root / location.slug / REFS).glob("*"))
    revisions = (unquote(name) for name in refs)
    return tuple(
        revision
        for revision in revisions
        if layout.resolve_ref(location.root, location.slug, revision) == location.commit
    )


def _snapshot(location: SnapshotLocation) -> Snapshot:
    try:
        published = record.read(location.directory)
    except RefusedVolume as error:
        log.warning("%s", error)
        published = None
    return Snapshot(location, published, _revisions(location))


def _is_older_than(path: Path, seconds: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > seconds
    return False
