"""Commands of the command line, and their summaries on stdout."""

import contextlib
import functools
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from snapshot_format.model_files import ADAPTER_FILES
from snapshot_format.reference import ModelReference
from storage_initializer.cli import arguments
from storage_initializer.cli.arguments import Collect, Command, List, Publish, Verify
from storage_initializer.cli.output import Progress, write_result
from storage_initializer.errors import DamagedSnapshot, NotFound
from storage_initializer.formatting import format_bytes
from storage_initializer.prepare import pipeline
from storage_initializer.publish import Outcome, initialize
from storage_initializer.settings import Settings
from storage_initializer.volume import garbage_collection, layout, record, status, verify
from storage_initializer.volume.garbage_collection import Snapshot


def run(command: Command, settings: Settings) -> None:
    """Run a command.

    Raises:
        InitializerError: the command failed.
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
    adapter = arguments.parse_reference(settings.adapter_reference) if settings.adapter_reference else None
    if adapter:
        # First, because it is small: a missing one fails before the model is downloaded.
        selection = {"allow_patterns": ADAPTER_FILES, "ignore_patterns": (), "allow_pickle": False, "prepare": None}
        for root in dict.fromkeys(root for _, root in command.pairs):
            _publish_one(adapter, root, settings.model_copy(update=selection))
    for reference, root in command.pairs:
        _publish_one(reference, root, settings)


def _publish_one(reference: ModelReference, root: Path, settings: Settings) -> None:
    with status.kept(reference, root, settings):
        publish = functools.partial(initialize, reference, root, settings, Progress(settings))
        outcome = _reported(settings, "published", publish)
        if settings.prepare:
            progress = Progress(settings, "prepared")
            prepare = functools.partial(pipeline.prepare, outcome, settings.prepare, settings, progress)
            _reported(settings, "prepared", prepare)


def _reported(settings: Settings, verb: str, work: Callable[[], Outcome]) -> Outcome:
    """Run a piece of work and write its summary."""
    started = time.monotonic()
    # Output of libraries belongs to the log: stdout is for the summaries.
    with contextlib.redirect_stdout(sys.stderr):
        outcome = work()
    seconds = time.monotonic() - started
    write_result(
        settings,
        _summary(verb, outcome, seconds),
        path=str(outcome.location.directory),
        reference=str(outcome.reference),
        commit=outcome.location.commit,
        variant=outcome.location.variant,
        files=len(outcome.record.files),
        size_bytes=outcome.record.size_bytes,
        fresh=outcome.fresh,
        seconds=round(seconds, 3),
    )
    return outcome


def _summary(verb: str, outcome: Outcome, seconds: float) -> str:
    name = f"{outcome.reference.name}@{outcome.location.commit[:12]}"
    size = f"{len(outcome.record.files)} files, {format_bytes(outcome.record.size_bytes)}"
    if outcome.fresh:
        return f"{verb} {name} at {outcome.location.directory}: {size} in {seconds:.1f} s"
    return f"already {verb} {name} at {outcome.location.directory}: {size}, nothing to do ({seconds:.2f} s)"


def _verify(command: Verify, settings: Settings) -> None:
    directory = command.directory
    if not directory.is_dir():
        raise NotFound(f"{directory} does not exist. Specify the directory of a published snapshot.")
    with layout.translate_os_errors(directory):
        published = record.read(directory)
        issues = verify.check(directory, published.files, fast=command.fast).issues
    if issues:
        raise DamagedSnapshot(
            f"{directory} is damaged, {len(issues)} files differ: {'; '.join(map(str, issues))}. "
            f"Remove it and publish {published.reference} again."
        )
    checked = "names and sizes" if command.fast else "sizes and checksums"
    write_result(
        settings,
        f"verified {directory}: {checked} of {len(published.files)} files, {format_bytes(published.size_bytes)}",
        path=str(directory),
        files=len(published.files),
        size_bytes=published.size_bytes,
    )


def _list(command: List, settings: Settings) -> None:
    snapshots = garbage_collection.list_snapshots(command.root)
    for snapshot in snapshots:
        published = snapshot.record
        size_bytes = published.size_bytes if published else 0
        reference = published.reference if published else "(no readable record)"
        revisions = ", ".join(f"refs/{revision}" for revision in snapshot.revisions) or snapshot.location.variant or "-"
        write_result(
            settings,
            f"{snapshot.name}  {format_bytes(size_bytes):>10}  {_age(snapshot):>10}  {revisions}  {reference}",
            path=str(snapshot.location.directory),
            reference=reference,
            variant=snapshot.location.variant,
            size_bytes=size_bytes,
            age_seconds=round(snapshot.age_seconds),
            revisions=snapshot.revisions,
        )
    size_bytes = sum(snapshot.record.size_bytes for snapshot in snapshots if snapshot.record)
    free_bytes = shutil.disk_usage(command.root).free
    write_result(
        settings,
        f"{len(snapshots)} snapshots, {format_bytes(size_bytes)}, {format_bytes(free_bytes)} free on {command.root}",
        size_bytes=size_bytes,
        free_bytes=free_bytes,
    )


def _age(snapshot: Snapshot) -> str:
    """Return the age in the largest unit that fits."""
    minutes = max(0, int(snapshot.age_seconds)) // 60
    for unit, size in (("d", 1440), ("h", 60)):
        if minutes >= size:
            return f"{minutes // size} {unit}"
    return f"{minutes} min"


def _collect(command: Collect, settings: Settings) -> None:
    verb = "would remove" if command.dry_run else "removed"
    count = size_bytes = 0
    for removal in garbage_collection.collect(
        command.root, command.policy, settings.lock_stale_seconds, dry_run=command.dry_run
    ):
        write_result(
            settings,
            f"{verb} {removal.path}: {format_bytes(removal.size_bytes)}",
            path=str(command.root / removal.path),
        )
        count += 1
        size_bytes += removal.size_bytes
    write_result(settings, f"{verb} {count} in all: {format_bytes(size_bytes)}", size_bytes=size_bytes)
