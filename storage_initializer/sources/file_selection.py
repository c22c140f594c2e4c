"""Selection of the files of a snapshot from a listing; pure.

Prefers safetensors, excludes other weight formats and hidden files, and applies the patterns. It also contains the only
check for paths that would leave the snapshot's directory.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from snapshot_format.record import File, FileSelection
from storage_initializer.errors import RefusedSnapshot

CONFIG = "config.json"
WEIGHTS = ".safetensors"
INDEX = ".index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Weights that can run code when opened: selected only if allowed and without alternative."""
FOREIGN_WEIGHTS = (".h5", ".msgpack", ".onnx", ".gguf")
"""Weights of other engines, never selected."""

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


def make_plan(listing: Iterable[File], name: str, selection: FileSelection) -> Plan:
    """Select the files to publish; `name` is the reference for error messages.

    Patterns are applied last, so they do not affect whether a repository can be served at all.

    Raises:
        RefusedSnapshot: an unsafe path, no config.json, no permitted weights, or no file that matches the patterns.
    """
    visible: list[File] = []
    for file in sorted(listing, key=lambda file: file.path):
        check_safe_path(file.path, name)
        if not _is_hidden(file.path):
            visible.append(file)
    weights = (WEIGHTS, *(PICKLES if selection.pickle else ()))
    if any(file.path.endswith(WEIGHTS) for file in visible):
        weights = (WEIGHTS,)
    elif not any(file.path.endswith(weights) for file in visible):
        raise RefusedSnapshot(_no_weights(visible, name))
    if not any(file.path == CONFIG for file in visible):
        raise RefusedSnapshot(f"{name} has no {CONFIG} at its top. Use a repository in the transformers format.")
    selected = tuple(
        file for file in visible if not _is_other_weights(file.path, weights) and selection.accepts(file.path)
    )
    if not selected:
        raise RefusedSnapshot(f"{name} has no file that matches the patterns. Check --allow and --ignore.")
    return Plan(selected, tuple(file.path for file in visible if file not in selected))


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


def is_weights(file: File) -> bool:
    """Return whether a file contains weights in any format, or is an index of weights."""
    return _is_other_weights(file.path, ())


def is_index(file: File) -> bool:
    """Return whether a file maps tensors to shards."""
    return file.path.endswith(tuple(suffix + INDEX for suffix in (WEIGHTS, *PICKLES)))


def require_shards(plan: Plan, index_path: str, index: bytes, name: str) -> None:
    """Check that the plan contains every shard of an index.

    Raises:
        RefusedSnapshot: a shard is missing, or the index is unreadable.
    """
    try:
        shards = sorted(set(json.loads(index)["weight_map"].values()))
        paths = [posixpath.join(posixpath.dirname(index_path), shard) for shard in shards]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RefusedSnapshot(f"{name} has an unreadable {index_path}. Use another revision.") from error
    missing = sorted(set(paths) - {file.path for file in plan.files})
    if missing:
        raise RefusedSnapshot(f"{name} misses {', '.join(missing)} of its {index_path}. Use a complete revision.")


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _is_other_weights(path: str, weights: tuple[str, ...]) -> bool:
    """Return whether a file contains or indexes weights in another format than `weights`."""
    plain = path.lower().removesuffix(INDEX)
    return plain.endswith((WEIGHTS, *PICKLES, *FOREIGN_WEIGHTS)) and not plain.endswith(weights)


def _no_weights(files: Iterable[File], name: str) -> str:
    others = [file.path for file in files if _is_other_weights(file.path, ())]
    instead = f"only {', '.join(others[:3])}" if others else "no weights at all"
    fix = "Use a revision or repository that offers them"
    if any(path.lower().endswith(PICKLES) for path in others):
        fix += (
            ", or, if you trust its owner, set STORAGE_INITIALIZER_ALLOW_PICKLE=true (pickles can run code when opened)"
        )
    return f"{name} has no weights as safetensors ({instead}). {fix}."
