"""Which files make a snapshot, and how many bytes: pure, from a listing to a plan.

Prefers safetensors, leaves out every other format of weights and all hidden files, narrows the rest by patterns, and
holds the one guard against paths that would leave the snapshot's directory. Knows neither network nor disk.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from storage_initializer.errors import RefusedSnapshot

CONFIG = "config.json"
WEIGHTS = ".safetensors"
INDEX = ".index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Weights that can run code when opened: left out unless they are allowed and there are no others."""
FOREIGN_WEIGHTS = (".h5", ".msgpack", ".onnx", ".gguf")
"""Weights of other engines, always left out."""

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
class Choice:
    """What to take of a listing; by default everything that can be served."""

    allow: tuple[str, ...] = ()
    """Patterns as of `fnmatch`, on whole paths; a path must match one of them, if there are any. `a/` means `a/*`."""
    ignore: tuple[str, ...] = ()
    """A path that matches one of these is left out."""
    pickle: bool = False
    """Whether pickled weights may stand in for safetensors."""

    def takes(self, path: str) -> bool:
        """Whether the patterns let a path through."""
        return (not self.allow or _matches(path, self.allow)) and not _matches(path, self.ignore)

    def taken(self, plan: "Plan") -> "Choice":
        """The choice that a plan shows: pickles count if there are any."""
        return replace(self, pickle=any(file.path.endswith(PICKLES) for file in plan.files))

    def agrees_with(self, taken: "Choice") -> bool:
        """Whether this choice, from the same listing, would have taken the same files."""
        return (self.allow, self.ignore) == (taken.allow, taken.ignore) and (self.pickle or not taken.pickle)

    def __str__(self) -> str:
        patterns = (("allow", self.allow), ("ignore", self.ignore))
        words = [f"--{flag} {pattern}" for flag, group in patterns for pattern in group]
        return " ".join(words + ["--allow-pickle"] * self.pickle) or "no patterns"


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


def make(listing: Iterable[File], name: str, choice: Choice = Choice()) -> Plan:
    """Choose from a listing what to publish; `name` is the reference, for the sentences.

    Patterns are asked last: whether a repository can be served at all does not depend on them.

    Raises:
        RefusedSnapshot: a path that leaves the directory, no config.json, no weights that are allowed, or patterns that
            leave nothing.
    """
    visible: list[File] = []
    for file in sorted(listing, key=lambda file: file.path):
        guard(file.path, name)
        if not _is_hidden(file.path):
            visible.append(file)
    weights = (WEIGHTS, *(PICKLES if choice.pickle else ()))
    if any(file.path.endswith(WEIGHTS) for file in visible):
        weights = (WEIGHTS,)
    elif not any(file.path.endswith(weights) for file in visible):
        raise RefusedSnapshot(_no_weights(visible, name))
    if not any(file.path == CONFIG for file in visible):
        raise RefusedSnapshot(f"{name} has no {CONFIG} at its top: choose a repository in the transformers format")
    chosen = tuple(file for file in visible if not _is_other_weights(file.path, weights) and choice.takes(file.path))
    if not chosen:
        raise RefusedSnapshot(f"{name} has no file that the patterns let through: check --allow and --ignore")
    return Plan(chosen, tuple(file.path for file in visible if file not in chosen))


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


def holds_weights(file: File) -> bool:
    """Whether a file holds weights, or is an index of weights, in whatever format."""
    return _is_other_weights(file.path, ())


def is_index(file: File) -> bool:
    """Whether a file says which shard holds which tensor."""
    return file.path.endswith(tuple(suffix + INDEX for suffix in (WEIGHTS, *PICKLES)))


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


def _is_other_weights(path: str, weights: tuple[str, ...]) -> bool:
    """Whether a file holds weights, or is an index of weights, in another format than `weights`."""
    plain = path.lower().removesuffix(INDEX)
    return plain.endswith((WEIGHTS, *PICKLES, *FOREIGN_WEIGHTS)) and not plain.endswith(weights)


def _no_weights(files: Iterable[File], name: str) -> str:
    others = [file.path for file in files if _is_other_weights(file.path, ())]
    instead = f"its weights are only {', '.join(others[:3])}" if others else "it has none"
    remedy = "choose a revision or a repository that offers them"
    if any(path.lower().endswith(PICKLES) for path in others):
        remedy += (
            ", or, if you trust its owner, set STORAGE_INITIALIZER_ALLOW_PICKLE=true (pickles can run code when opened)"
        )
    return f"{name} has no weights as safetensors ({instead}): {remedy}"


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)
