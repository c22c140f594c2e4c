"""Which files make a snapshot, and how many bytes: pure, from a listing to a plan.

Prefers safetensors, leaves out every other format of weights and all hidden files, and holds the one guard against
paths that would leave the snapshot's directory. Knows neither network nor disk.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass

from storage_initializer.errors import RefusedSnapshot

CONFIG = "config.json"
WEIGHTS = ".safetensors"
INDEX = ".safetensors.index.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
"""Weights the predictor does not load: pickles can run code when opened, the others belong to other engines."""

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_DRIVE = re.compile(r"[A-Za-z]:")
_LONGEST_PART = 240
"""Bytes in one component of a path: what file systems allow (255), less the suffix of a temporary name."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a snapshot: its path relative to the snapshot, with `/`, and what its content must be.

    The Hub promises a sha256 for large files (LFS) and git's sha1 of the blob for small ones: exactly one of them is
    known before verification, which adds the sha256 to every file.
    """

    path: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The files to publish, ordered by path, and the paths that were left out."""

    files: tuple[File, ...]
    left_out: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Stands for the commit where there is none: 40 hex digits of the sha256 over paths, sizes and checksums.

        The hashed text has one line `<path> NUL <size in bytes> NUL <sha256> LF` per file, ordered by path, in UTF-8.
        """
        lines = "".join(f"{file.path}\0{file.size_bytes}\0{file.sha256}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()[:40]


def make(listing: Iterable[File], name: str) -> Plan:
    """Choose from a listing what the predictor needs; `name` is the reference, for the sentences.

    Raises:
        RefusedSnapshot: a path that leaves the directory, no config.json, or no weights as safetensors.
    """
    chosen: list[File] = []
    left_out: list[str] = []
    for file in sorted(listing, key=lambda file: file.path):
        guard(file.path, name)
        if _is_hidden(file.path):
            continue
        if _is_other_weights(file.path):
            left_out.append(file.path)
        else:
            chosen.append(file)
    if not any(file.path.endswith(WEIGHTS) for file in chosen):
        instead = f"its weights are only {', '.join(left_out[:3])}" if left_out else "it has none"
        raise RefusedSnapshot(
            f"{name} has no weights as safetensors ({instead}): choose a revision or a repository that offers them"
        )
    if not any(file.path == CONFIG for file in chosen):
        raise RefusedSnapshot(f"{name} has no {CONFIG} at its top: choose a repository in the transformers format")
    return Plan(tuple(chosen), tuple(left_out))


def guard(path: str, name: str) -> None:
    """Refuse a path that could lead outside the directory it is joined to; the only such check in this program.

    Raises:
        RefusedSnapshot: the path is absolute, has an empty, `.` or `..` component, a backslash, a drive or an
            unprintable character, or a component longer than a file system allows.
    """
    parts = path.split("/")
    if (
        any(part in ("", ".", "..") or len(part.encode(errors="replace")) > _LONGEST_PART for part in parts)
        or any(_DRIVE.match(part) for part in parts)
        or "\\" in path
        or _UNPRINTABLE.search(path)
    ):
        raise RefusedSnapshot(f"{name} holds a file with the unsafe path {path!r}: ask its owner to rename it")


def indexes(plan: Plan) -> tuple[File, ...]:
    """The files of a plan that say which shard holds which tensor."""
    return tuple(file for file in plan.files if file.path.endswith(INDEX))


def require_shards(plan: Plan, index_path: str, index: bytes, name: str) -> None:
    """Check that every shard that an index names is in the plan.

    Raises:
        RefusedSnapshot: a shard is missing, or the index is not one.
    """
    try:
        shards = sorted(set(json.loads(index)["weight_map"].values()))
        named = [posixpath.join(posixpath.dirname(index_path), shard) for shard in shards]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RefusedSnapshot(f"{name} has an unreadable {index_path}: ask its owner to repair it") from error
    missing = sorted(set(named) - {file.path for file in plan.files})
    if missing:
        raise RefusedSnapshot(
            f"{name} lacks {', '.join(missing)}, which its {index_path} names: choose a complete revision"
        )


def readable(size_bytes: float) -> str:
    """A number of bytes for people: `3.6 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _is_other_weights(path: str) -> bool:
    return path.lower().removesuffix(".index.json").endswith(OTHER_WEIGHTS)
