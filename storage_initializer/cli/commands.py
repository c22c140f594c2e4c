"""What each command of the command line does, and what it says on stdout when it is done."""

import contextlib
import functools
import shutil
import sys
import time
from collections.abc import Callable

from storage_initializer.cli.arguments import Collect, Command, List, Publish, Verify
from storage_initializer.cli.output import Progress, say
from storage_initializer.errors import DamagedSnapshot, NotFound
from storage_initializer.prepare import pipeline
from storage_initializer.publish import Outcome, initialize
from storage_initializer.settings import Settings
from storage_initializer.sources.file_selection import readable
from storage_initializer.volume import garbage_collection, layout, record, verify
from storage_initializer.volume.garbage_collection import Snapshot


def run(command: Command, settings: Settings) -> None:
    """Do what was asked for.

    Raises:
        InitializerError: it could not be done.
    """
    match command:
        case Publish():
            _publish(command, settings)
        case Verify():
            _verify(command, settings)
        case List():
            _list(command, settings)
        case Collect():
            _collect(command, settings)


def _publish(command: Publish, settings: Settings) -> None:
    pipeline.require(settings)
    for reference, root in command.pairs:
        initialized = functools.partial(initialize, reference, root, settings, Progress(settings))
        outcome = _told(settings, "published", initialized)
        if settings.prepare:
            progress = Progress(settings, "prepared")
            _told(settings, "prepared", functools.partial(pipeline.prepare, outcome, settings, progress))


def _told(settings: Settings, verb: str, work: Callable[[], Outcome]) -> Outcome:
    """Do a piece of work and say what came of it."""
    started = time.monotonic()
    # Whatever a library prints belongs to the log: stdout is for the summaries.
    with contextlib.redirect_stdout(sys.stderr):
        outcome = work()
    seconds = time.monotonic() - started
    say(
        settings,
        _summary(verb, outcome, seconds),
        path=str(outcome.place.directory),
        reference=str(outcome.reference),
        commit=outcome.place.commit,
        form=outcome.place.form,
        files=len(outcome.record.files),
        size_bytes=outcome.record.size_bytes,
        fresh=outcome.fresh,
        seconds=round(seconds, 3),
    )
    return outcome


def _summary(verb: str, outcome: Outcome, seconds: float) -> str:
    what = f"{outcome.reference.name}@{outcome.place.commit[:12]}"
    size = f"{len(outcome.record.files)} files, {readable(outcome.record.size_bytes)}"
    if outcome.fresh:
        return f"{verb} {what} at {outcome.place.directory}: {size} in {seconds:.1f} s"
    return f"already {verb} {what} at {outcome.place.directory}: {size}, nothing to do ({seconds:.2f} s)"


def _verify(command: Verify, settings: Settings) -> None:
    directory = command.directory
    if not directory.is_dir():
        raise NotFound(f"{directory} does not exist: give the directory of a published snapshot")
    with layout.explained(directory):
        published = record.read(directory)
        issues = verify.check(directory, published.files, fast=command.fast).issues
    if issues:
        raise DamagedSnapshot(
            f"{directory} is damaged, {len(issues)} files are wrong: {'; '.join(map(str, issues))}; "
            f"remove it and publish {published.reference} again"
        )
    how = "names and sizes" if command.fast else "sizes and checksums"
    say(
        settings,
        f"verified {directory}: {how} of {len(published.files)} files, {readable(published.size_bytes)}",
        path=str(directory),
        files=len(published.files),
        size_bytes=published.size_bytes,
    )


def _list(command: List, settings: Settings) -> None:
    snapshots = garbage_collection.take(command.root)
    for snapshot in snapshots:
        published = snapshot.record
        size_bytes = published.size_bytes if published else 0
        reference = published.reference if published else "(no readable record)"
        revisions = ", ".join(f"refs/{revision}" for revision in snapshot.revisions) or snapshot.place.form or "-"
        say(
            settings,
            f"{snapshot.name}  {readable(size_bytes):>10}  {_age(snapshot):>10}  {revisions}  {reference}",
            path=str(snapshot.place.directory),
            reference=reference,
            form=snapshot.place.form,
            size_bytes=size_bytes,
            age_seconds=round(snapshot.age_seconds),
            revisions=snapshot.revisions,
        )
    size_bytes = sum(snapshot.record.size_bytes for snapshot in snapshots if snapshot.record)
    free_bytes = shutil.disk_usage(command.root).free
    say(
        settings,
        f"{len(snapshots)} snapshots, {readable(size_bytes)}, {readable(free_bytes)} free on {command.root}",
        size_bytes=size_bytes,
        free_bytes=free_bytes,
    )


def _age(snapshot: Snapshot) -> str:
    """In the largest unit that fits."""
    minutes = max(0, int(snapshot.age_seconds)) // 60
    for unit, size in (("d", 1440), ("h", 60)):
        if minutes >= size:
            return f"{minutes // size} {unit}"
    return f"{minutes} min"


def _collect(command: Collect, settings: Settings) -> None:
    verb = "would remove" if command.dry_run else "removed"
    count = size_bytes = 0
    for removal in garbage_collection.collect(command, settings.lock_stale_seconds):
        say(settings, f"{verb} {removal.what}: {readable(removal.size_bytes)}", path=str(command.root / removal.what))
        count += 1
        size_bytes += removal.size_bytes
    say(settings, f"{verb} {count} in all: {readable(size_bytes)}", size_bytes=size_bytes)
