"""Locate the snapshot to serve: a directory of weights, or the snapshot of a reference on a volume.

The storage initializer writes the volume; `snapshot_format` defines its layout. Only paths, records and file
sizes are read here.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from predictor.errors import InvalidSettings, SnapshotMissing
from predictor.models.snapshot_wait import WaitLog
from snapshot_format import layout, record
from snapshot_format.model_files import CONFIG
from snapshot_format.recipe import RECIPE_VERSIONS, Variant
from snapshot_format.record import FORMAT_VERSION, RECORD, InvalidRecord, QuantizationRecipe, UnsupportedFormatVersion
from snapshot_format.reference import MalformedReference, ModelReference, parse

POLL_SECONDS = 1.0
MODEL, ADAPTER = "model_reference", "adapter_reference"
"""Settings that have references."""
_COMMANDS = {
    MODEL: "python -m storage_initializer {}",
    ADAPTER: "ADAPTER_REFERENCE={} python -m storage_initializer MODEL",
}
"""Commands that publish a reference, without the volume."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete directory of weights, and its commit if it was published."""

    directory: Path
    commit: str | None = None


def find(model_dir: Path, reference: str | None, setting: str = MODEL) -> Snapshot:
    """Return the snapshot in `model_dir`: the directory itself, or the one of `reference` on that volume.

    Errors name the setting that has the reference.

    Raises:
        InvalidSettings: the reference is malformed.
        SnapshotMissing: the snapshot does not exist or is incomplete.
    """
    if not model_dir.is_dir():
        raise SnapshotMissing(f"{model_dir} is not a directory. Set --model_dir to a snapshot or a volume's root.")
    if reference is None:
        if not (model_dir / CONFIG).is_file():
            raise SnapshotMissing(
                f"{model_dir} has no config.json. Set --model_dir to a directory of weights, "
                "or set --model_reference if it is a volume's root."
            )
        return _checked(Snapshot(model_dir))
    parsed = _parse(reference, setting)
    try:
        commit = parsed.revision if parsed.is_commit else layout.read_ref(model_dir, parsed.slug, parsed.revision)
    except FileNotFoundError:
        raise SnapshotMissing(
            f"{reference} is not published in {model_dir}. Run `{_COMMANDS[setting].format(reference)} {model_dir}` "
            "first, or wait for it with --snapshot_wait_seconds."
        ) from None
    return _checked(Snapshot(layout.SnapshotLocation(model_dir, parsed.slug, commit).directory, commit))


def wait(
    model_dir: Path,
    reference: str | None,
    timeout_seconds: float,
    report: Callable[[str], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
    setting: str = MODEL,
) -> Snapshot:
    """Poll `find` until the snapshot exists, and log what the wait is for.

    Args:
        model_dir: as for `find`.
        reference: as for `find`.
        timeout_seconds: maximum time to wait.
        report: called with the state of the wait whenever it is logged.
        sleep: called between two polls.
        setting: as for `find`.

    Raises:
        InvalidSettings: the reference is malformed.
        SnapshotMissing: the time is over; the message has the last error of the storage initializer.
    """
    started = time.monotonic()
    log = WaitLog(model_dir, _parse(reference, setting) if reference else None, timeout_seconds, report)
    while True:
        try:
            return find(model_dir, reference, setting)
        except SnapshotMissing as error:
            waited = time.monotonic() - started
            if waited >= timeout_seconds:
                if failure := log.last_failure():
                    raise SnapshotMissing(f"{error} The last error on the volume: {failure}") from error
                raise
            log.update(str(error), waited)
        sleep(POLL_SECONDS)


def _parse(reference: str, setting: str) -> ModelReference:
    try:
        return parse(reference)
    except MalformedReference as error:
        raise InvalidSettings(f"--{setting}: {error}") from error


def prequantized(directory: Path, variant: Variant, dtype: str, skip_modules: Sequence[str]) -> Path | None:
    """Return the directory of a snapshot's variant, if its weights equal those that quantizing now would give.

    `dtype` is that of the weights before quantization, such as "bfloat16".
    """
    directory = directory.resolve()
    derived = directory.with_name(f"{directory.name}-{variant}") if directory.name else directory
    if derived == directory or not derived.is_dir():
        return None
    try:
        _checked(Snapshot(derived, directory.name))
        published = record.read(derived)
        difference = _difference(published.recipe, variant, dtype, skip_modules)
        if published.commit != directory.name:
            difference = f"it was derived from {published.commit}"
    except SnapshotMissing as error:
        difference = str(error)
    if difference:
        logger.warning("not using prequantized weights in %s, quantizing while loading: %s", derived, difference)
        return None
    return derived


def _difference(recipe: QuantizationRecipe | None, variant: Variant, dtype: str, skip_modules: Sequence[str]) -> str:
    """Return why a recipe gives other weights than this predictor; empty if they are equal."""
    if recipe is None:
        return "it has no recipe"
    version = RECIPE_VERSIONS[variant]
    if (recipe.name, recipe.version) != (variant, version):
        return (
            f"it uses recipe {recipe.name} version {recipe.version} instead of {variant} version {version}; "
            "use both programs of one release"
        )
    if recipe.dtype != dtype:
        return f"it was quantized from {recipe.dtype} instead of {dtype}; use --dtype auto"
    if sorted(recipe.skip_modules) != sorted(skip_modules):
        return f"it skips modules {list(recipe.skip_modules)} instead of {list(skip_modules)}"
    return ""


def _checked(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot if every file in its record has its full size; a local directory needs no record."""
    directory = snapshot.directory
    try:
        published = record.read(directory)
    except (FileNotFoundError, NotADirectoryError):
        if snapshot.commit is None:
            return snapshot
        raise SnapshotMissing(
            f"{directory} has no {RECORD}, so it was not published by the storage initializer. Run it again."
        ) from None
    except UnsupportedFormatVersion as error:
        raise SnapshotMissing(
            f"{directory / RECORD} has format version {error.version}, and this predictor reads {FORMAT_VERSION}. "
            "Use a predictor and a storage initializer of one release."
        ) from None
    except InvalidRecord as error:
        raise SnapshotMissing(f"{directory / RECORD} is not a record ({error}). Publish the model again.") from None
    for file in published.files:
        path = directory / file.path
        size = path.stat().st_size if path.is_file() else None
        if size != file.size_bytes:
            state = "is missing" if size is None else f"has {size} of {file.size_bytes} bytes"
            raise SnapshotMissing(
                f"{path} {state}. Move {directory} away and run the storage initializer again to repair it."
            )
    return Snapshot(directory, published.commit)
