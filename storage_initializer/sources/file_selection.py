"""Selection of the files of a snapshot from a listing.

Selects what a predictor needs: the weights that transformers loads, the configuration and the tokenizer. Patterns of
the user come first. It also contains the only check for paths that would leave the snapshot's directory.
"""

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from snapshot_format import model_files
from snapshot_format.model_files import CONFIG, INDEX_SUFFIX, PICKLES
from snapshot_format.record import File, FileSelection
from storage_initializer.errors import RefusedSnapshot

MAX_INDEX_BYTES = 1 << 28
"""Maximum size of an index, which is read into memory. The largest models have about 20 MiB."""

_PICKLE = "pytorch_model.bin"
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_PART_BYTES = 240
"""Maximum length of a path component: the file system's 255 bytes, minus the suffix of a temporary name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The files to publish and the excluded paths, both ordered by path."""

    files: tuple[File, ...]
    excluded: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Total size of the files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Replacement for a commit: 40 hex digits of the sha256 over paths, sizes and checksums.

        The hashed text has one line `<path> NUL <size in bytes> NUL <sha256> LF` per file, ordered by path, in UTF-8.
        """
        lines = "".join(f"{file.path}\0{file.size_bytes}\0{file.sha256}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()[:40]


def make_plan(listing: Iterable[File], name: str, selection: FileSelection, read: Callable[[File], bytes]) -> Plan:
    """Select the files to publish.

    Without `allow` patterns these are the weights, the configuration, the tokenizer and the model card. With them,
    every file that matches, except weights that would not be loaded. `ADAPTER_FILES` as patterns select an adapter.

    Args:
        listing: all files of the source.
        name: the reference, for error messages.
        selection: patterns of the user. They restrict the listing first, so they also choose between weights.
        read: returns the content of a file, called for the index of sharded weights.

    Raises:
        RefusedSnapshot: an unsafe path, no config.json, no permitted weights, a missing shard, or no file that matches
            the patterns.
    """
    visible: dict[str, File] = {}
    for file in sorted(listing, key=lambda file: file.path):
        check_safe_path(file.path, name)
        if not _is_hidden(file.path):
            visible[file.path] = file
    accepted = {path: file for path, file in visible.items() if selection.accepts(path)}
    if selection.allow == model_files.ADAPTER_FILES:
        return _adapter_plan(visible, accepted, name)
    entry = _find_entry(visible, accepted, name, selection)
    if CONFIG not in visible:
        raise RefusedSnapshot(f"{name} has no {CONFIG} at its top. Use a repository in the transformers format.")
    weights = frozenset[str]() if entry is None else _weights(entry, accepted, name, read)
    is_needed = model_files.is_auxiliary if not selection.allow else lambda path: not model_files.is_weights(path)
    selected = tuple(file for path, file in accepted.items() if path in weights or is_needed(path))
    if not selected:
        raise RefusedSnapshot(f"{name} has no file that matches the patterns. Check --allow and --ignore.")
    return Plan(selected, tuple(file.path for file in visible.values() if file not in selected))


def _adapter_plan(visible: Mapping[str, File], accepted: Mapping[str, File], name: str) -> Plan:
    """Select the files of a PEFT adapter.

    Raises:
        RefusedSnapshot: a file is missing.
    """
    missing = [path for path in model_files.ADAPTER_FILES if path not in accepted]
    if missing:
        fix = "Use a PEFT adapter that was saved with save_pretrained"
        if any(model_files.is_adapter(path) and path.endswith(PICKLES) for path in visible):
            fix = "Its weights are pickled, which can run code: load it with PEFT and save it again as safetensors"
        raise RefusedSnapshot(f"{name} is not a usable adapter: it has no {' and no '.join(missing)}. {fix}.")
    return Plan(tuple(accepted.values()), tuple(path for path in visible if path not in accepted))


def effective_selection(selection: FileSelection, plan: Plan) -> FileSelection:
    """Return the selection to record: `pickle` only if the plan contains pickles."""
    return replace(selection, pickle=any(file.path.endswith(PICKLES) for file in plan.files))


def check_safe_path(path: str, name: str) -> None:
    """Reject a path that could lead outside the directory it is joined to; the only such check in this program.

    Raises:
        RefusedSnapshot: the path is absolute, has an empty, `.` or `..` component, a backslash, a drive or an
            unprintable character, or a component longer than a file system allows.
    """
    parts = path.split("/")
    if (
        any(part in ("", ".", "..") or len(part.encode(errors="replace")) > _MAX_PART_BYTES for part in parts)
        or any(_DRIVE.match(part) for part in parts)
        or "\\" in path
        or _UNPRINTABLE.search(path)
    ):
        raise RefusedSnapshot(f"{name} contains a file with the unsafe path {path!r}. Rename it at its source.")


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _find_entry(visible: Iterable[str], accepted: Iterable[str], name: str, selection: FileSelection) -> str | None:
    """Return the file from which the weights are loaded; None if the patterns exclude all weights."""

    def find(paths: Iterable[str]) -> str | None:
        entry = model_files.find_weights(paths)
        if entry is None and selection.pickle:
            entry = model_files.find_weights(paths, _PICKLE, PICKLES)
        return entry

    entry = find(accepted)
    if entry is None:
        if find(visible) is None:
            raise RefusedSnapshot(_no_weights(visible, name))
        if any(path.endswith(model_files.SAFETENSORS) and "/" not in path for path in accepted):
            raise RefusedSnapshot(f"{_no_weights(accepted, name)} The patterns exclude the rest: check --allow.")
    return entry


def _weights(entry: str, files: Mapping[str, File], name: str, read: Callable[[File], bytes]) -> frozenset[str]:
    """Return the paths of all files of the weights.

    Raises:
        RefusedSnapshot: a shard is missing, or the index is unreadable.
    """
    if not entry.endswith(INDEX_SUFFIX):
        return frozenset((entry,))
    try:
        if files[entry].size_bytes > MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {MAX_INDEX_BYTES} bytes")
        suffix = posixpath.splitext(entry.removesuffix(INDEX_SUFFIX))[1]
        shards = model_files.read_index(read(files[entry]), suffix)
    except ValueError as error:
        raise RefusedSnapshot(f"{name} has an unreadable {entry} ({error}). Use another revision.") from error
    if missing := [shard for shard in shards if shard not in files]:
        raise RefusedSnapshot(f"{name} misses {', '.join(missing)} of its {entry}. Use a complete revision.")
    return frozenset((entry, *shards))


def _no_weights(paths: Iterable[str], name: str) -> str:
    paths = list(paths)
    fix = ""
    if model_files.find_weights(paths, _PICKLE, PICKLES):
        fix = (
            ", or, if you trust its owner, set STORAGE_INITIALIZER_ALLOW_PICKLE=true (pickles can run code when opened)"
        )
    return f"{name} {model_files.describe_missing_weights(paths)}{fix}."
