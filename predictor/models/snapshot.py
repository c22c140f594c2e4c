"""Find the snapshot to serve: a directory as given, or the one that a reference names on a volume.

The volume's layout is the contract with the storage initializer, which alone writes it:

    <root>/<owner>--<model>/<commit>/                 the files of the snapshot
    <root>/<owner>--<model>/<commit>/.snapshot.json   the record, part of the one rename that publishes it
    <root>/<owner>--<model>/<commit>-int8-cpu/        what was prepared of it; its record says by which recipe
    <root>/<owner>--<model>/refs/<revision>           a file that holds the commit; the revision percent-encoded

A `file:///some/dir/NAME` reference lies under `file--NAME`, percent-encoded too. Only names and sizes are read here;
what the weights mean is not known.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from predictor.errors import InvalidSettings, SnapshotMissing

RECORD = ".snapshot.json"
FORMAT_VERSION = 1
DEFAULT_REVISION = "main"
POLL_SECONDS = 1.0
PREPARED = "int8-cpu"
"""What the storage initializer calls linear layers that it has rounded for `linear.Int8Linear`."""
RECIPE_VERSION = 1
"""Version of the recipe that equals `gemm.quantize_per_channel_int8`; another version makes other weights."""

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_REFERENCE = re.compile(r"hf://(?P<owner>[\w.-]+)/(?P<model>[\w.-]+)(?:[:@](?P<revision>.+))?")
_FILE_REFERENCE = re.compile(r"file:///(?:.*/)?(?P<name>[^/]+)/?")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A directory of weights that is complete, and the commit it was published as, where known."""

    directory: Path
    commit: str | None = None


def find(model_dir: Path, reference: str | None) -> Snapshot:
    """The snapshot in `model_dir`: the directory itself, or the one that `reference` names below it.

    Raises:
        InvalidSettings: the reference is malformed.
        SnapshotMissing: there is none, or it is not complete.
    """
    if not model_dir.is_dir():
        raise SnapshotMissing(f"{model_dir} is not a directory; point --model_dir to a snapshot or a volume's root.")
    if reference is None:
        if not (model_dir / "config.json").is_file():
            raise SnapshotMissing(
                f"{model_dir} has no config.json; point --model_dir to a directory of weights, "
                "or name the model with --model_reference if it is a volume's root."
            )
        return _checked(Snapshot(model_dir))
    folder, revision = _locate(reference)
    if _COMMIT.fullmatch(revision):
        commit = revision
    else:
        ref = model_dir / folder / "refs" / quote(revision, safe="")
        try:
            commit = ref.read_text().strip()
        except FileNotFoundError:
            raise SnapshotMissing(
                f"{reference} is not published in {model_dir}; run `python -m storage_initializer {reference} "
                f"{model_dir}` first, or wait for it with --snapshot_wait_seconds."
            ) from None
    return _checked(Snapshot(model_dir / folder / commit, commit))


def wait(
    model_dir: Path, reference: str | None, timeout_seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Snapshot:
    """As `find`, but asks again for `timeout_seconds` while the snapshot is missing."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return find(model_dir, reference)
        except SnapshotMissing:
            if time.monotonic() >= deadline:
                raise
        sleep(POLL_SECONDS)


def prepared(directory: Path, dtype: str, keep: Sequence[str]) -> Path | None:
    """The snapshot that was prepared of the one in `directory`, if its weights are what rounding them now would make.

    Args:
        directory: a published snapshot, or any other one, beside which there is none.
        dtype: in which its weights would be rounded, "bfloat16" say.
        keep: patterns of layers that would not be.
    """
    directory = directory.resolve()
    beside = directory.parent / f"{directory.name}-{PREPARED}"
    if not beside.is_dir():
        return None
    try:
        _checked(Snapshot(beside, directory.name))
        differs = _difference(json.loads((beside / RECORD).read_text()), directory.name, dtype, keep)
    except (SnapshotMissing, ValueError, KeyError, TypeError, AttributeError) as error:
        differs = str(error) or type(error).__name__
    if differs:
        logger.warning("not using %s, but rounding weights while they load: %s", beside, differs)
        return None
    return beside


def _difference(record: Any, commit: str, dtype: str, keep: Sequence[str]) -> str:
    """Why prepared weights are not those that this predictor would make; empty if they are."""
    origin = record["derived_from"]
    recipe = f"{origin['recipe']} version {origin['version']}"
    if recipe != (known := f"{PREPARED} version {RECIPE_VERSION}"):
        return f"it was made by {recipe}, and this predictor knows {known}; use both programs of one release"
    if origin["commit"] != commit:
        return f"it was made of {origin['commit']}"
    if origin["dtype"] != dtype:
        return f"it was rounded from {origin['dtype']}, and this predictor would from {dtype}; use --dtype auto"
    if sorted(origin["keep"]) != sorted(keep):
        return f"layers kept as they were are {origin['keep']}, and this predictor would keep {list(keep)}"
    return ""


def _locate(reference: str) -> tuple[str, str]:
    """The folder on the volume and the revision, of a reference."""
    if hub := _HUB_REFERENCE.fullmatch(reference):
        return f"{hub['owner']}--{hub['model']}", hub["revision"] or DEFAULT_REVISION
    if file := _FILE_REFERENCE.fullmatch(reference):
        return f"file--{quote(unquote(file['name']), safe='')}", DEFAULT_REVISION
    raise InvalidSettings(
        f"--model_reference is {reference!r}: expected hf://owner/model, hf://owner/model:revision or file:///dir."
    )


def _checked(snapshot: Snapshot) -> Snapshot:
    """The snapshot, if every file that its record names is there in full; one without a record is taken as it is."""
    directory = snapshot.directory
    try:
        record = json.loads((directory / RECORD).read_text())
        version = record["format_version"]
        commit = str(record["commit"])
        sizes = {str(file["path"]): int(file["size"]) for file in record["files"]}
    except FileNotFoundError:
        if snapshot.commit is None:
            return snapshot
        raise SnapshotMissing(
            f"{directory} has no {RECORD}, so it was not published by the storage initializer; run it again."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotMissing(f"{directory / RECORD} is not a record ({error}); publish the model again.") from None
    if version != FORMAT_VERSION:
        raise SnapshotMissing(
            f"{directory / RECORD} has format version {version}, and this predictor reads {FORMAT_VERSION}; "
            "use a predictor and a storage initializer of one release."
        )
    for name, size in sizes.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} of {size} bytes"
            raise SnapshotMissing(
                f"{file} {state}; move {directory} away and run the storage initializer again to repair it."
            )
    return Snapshot(directory, commit)
