"""What lies on a volume, and what of it may go: snapshots, and the leavings of initializers that died.

Removing is safe for other initializers, since it happens under the lease of each snapshot. Readers leave no trace on a
volume that they mount read-only: that nobody serves a snapshot any more is for the administrator to know.
"""

import contextlib
import datetime
import itertools
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from storage_initializer.cli.arguments import Collect
from storage_initializer.errors import LeaseTimeout, NotFound, RefusedVolume
from storage_initializer.volume import layout, lease, record
from storage_initializer.volume.layout import Place
from storage_initializer.volume.record import Record

_FORGOTTEN_SECONDS = 3600.0
"""A draft of a ref, or a clock of a lease, lives for milliseconds: what is so old was left behind."""

_KEY = re.compile(r"(?P<slug>[^@]+)@(?P<commit>[0-9a-f]{40})(-[\w-]+)?\.")
"""What begins the name of anything that belongs to a lease: that of a snapshot, and of all that is made of it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One published snapshot."""

    place: Place
    record: Record | None
    """None where it cannot be read: such a snapshot is listed, and never removed."""
    revisions: tuple[str, ...]
    """The entries of `refs/` that lead to it."""

    @property
    def name(self) -> str:
        """Its directory, relative to the root of the volume."""
        return f"{self.place.slug}/{self.place.name}"

    @property
    def age_seconds(self) -> float:
        """Since it was published."""
        if self.record is None:
            return 0.0
        return time.time() - datetime.datetime.fromisoformat(self.record.published_at).timestamp()


@dataclass(frozen=True, slots=True)
class Removal:
    """Something that went, or would go."""

    what: str
    size_bytes: int


def take(root: Path) -> tuple[Snapshot, ...]:
    """All snapshots on a volume, by model, the latest first.

    Raises:
        NotFound: there is no such directory.
    """
    if not root.is_dir():
        raise NotFound(f"{root} does not exist: give the root of a volume")
    with layout.explained(root):
        found = [_snapshot(place) for place in _places(root)]
    return tuple(sorted(found, key=lambda snapshot: (snapshot.place.slug, snapshot.age_seconds)))


def collect(command: Collect, stale_seconds: float) -> Iterator[Removal]:
    """Remove what a command says, one thing after the other; nothing on a dry run.

    What a `refs/` entry leads to stays unless the command is to be forced, and then the entry goes first. What was made
    of a snapshot goes right before it. What an initializer is writing, or is making something of, stays.

    Raises:
        InvalidReference: the command names no reference.
        NotFound, RefusedVolume, VolumeFailed: the volume is not there, or nothing may be removed from it.
    """
    for snapshot in _superfluous(take(command.root), command):
        with _leased(snapshot.place, command, stale_seconds) as token:
            if token is not None and (command.force or _revisions(snapshot.place) == snapshot.revisions):
                if token:
                    layout.unpoint(snapshot.place, snapshot.revisions)
                for one in (*_made_of(snapshot.place), snapshot):
                    if token:
                        layout.remove(one.place, token)
                    yield Removal(one.name, one.record.size_bytes if one.record else 0)
    if command.reference is None:
        yield from _collect_leavings(command, stale_seconds)


def _superfluous(snapshots: tuple[Snapshot, ...], command: Collect) -> Iterator[Snapshot]:
    keep = 1 if command.keep is None else command.keep
    if command.reference is not None:
        reference = command.reference
        snapshots = tuple(one for one in snapshots if one.place.slug == reference.slug)
        if reference.is_commit:
            snapshots = tuple(one for one in snapshots if one.place.commit == reference.revision)
            keep = command.keep or 0
    there = {snapshot.place for snapshot in snapshots}
    outlived = [one for one in snapshots if one.place.form and replace(one.place, form="") not in there]
    snapshots = tuple(one for one in snapshots if not one.place.form)
    groups = itertools.groupby(snapshots, key=lambda snapshot: snapshot.place.slug)
    for group in (outlived, *(list(group)[keep:] for _, group in groups)):
        for snapshot in group:
            if snapshot.record is None:
                log.warning("keeping %s, whose record cannot be read", snapshot.name)
            elif snapshot.revisions and not command.force:
                log.info("keeping %s, since refs/%s leads to it", snapshot.name, ", refs/".join(snapshot.revisions))
            else:
                yield snapshot


def _made_of(source: Place) -> Iterator[Snapshot]:
    """What was made of a snapshot, and can be made again."""
    for directory in sorted(source.directory.parent.glob(f"{source.name}-*")):
        snapshot = _snapshot(_place(source.root, directory))
        if snapshot.record is None:
            log.warning("keeping %s, whose record cannot be read", snapshot.name)
        else:
            yield snapshot


def _collect_leavings(command: Collect, stale_seconds: float) -> Iterator[Removal]:
    """Staging, leases and drafts of initializers that are dead."""
    left: dict[Place, list[Path]] = {}
    for folder in (layout.STAGING, layout.LOCKS):
        with layout.explained(command.root), contextlib.suppress(FileNotFoundError):
            for path in sorted((command.root / folder).iterdir()):
                if match := _KEY.match(path.name):
                    left.setdefault(Place(command.root, match["slug"], match["commit"]), []).append(path)
    for place, paths in left.items():
        with _leased(place, command, stale_seconds) as token:
            if token is None:
                log.info("keeping what belongs to %s, since it is being written", place.key)
                continue
            for path in paths:
                # A lease goes with the one that was taken over it.
                if path.is_dir() or path.suffix == layout.LEASE or _is_forgotten(path):
                    yield Removal(path.relative_to(command.root).as_posix(), layout.size_bytes(path))
                    if token and path.suffix != layout.LEASE:
                        layout.clear(path)


@contextlib.contextmanager
def _leased(place: Place, command: Collect, stale_seconds: float) -> Iterator[str | None]:
    """The token of a snapshot's lease, empty on a dry run; None where somebody else holds it."""
    if command.dry_run:
        yield None if lease.seems_held(layout.lease_path(place, make=False), stale_seconds) else ""
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(layout.explained(command.root))
        try:
            held = stack.enter_context(lease.hold(layout.lease_path(place), stale_seconds, timeout_seconds=0.0))
        except LeaseTimeout:
            yield None
        else:
            yield held.token


def _places(root: Path) -> Iterator[Place]:
    for directory in root.glob("*--*/*"):
        if directory.name != layout.REFS and directory.is_dir():
            yield _place(root, directory)


def _place(root: Path, directory: Path) -> Place:
    commit, _, form = directory.name.partition("-")
    return Place(root, directory.parent.name, commit, form)


def _revisions(place: Place) -> tuple[str, ...]:
    """The revisions that lead to a snapshot; none to what was made of it."""
    if place.form:
        return ()
    refs = sorted(path.name for path in (place.root / place.slug / layout.REFS).glob("*"))
    revisions = (unquote(name) for name in refs)
    return tuple(one for one in revisions if layout.resolved(place.root, place.slug, one) == place.commit)


def _snapshot(place: Place) -> Snapshot:
    try:
        found = record.read(place.directory)
    except RefusedVolume as error:
        log.warning("%s", error)
        found = None
    return Snapshot(place, found, _revisions(place))


def _is_forgotten(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS
    return False
