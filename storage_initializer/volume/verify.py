"""Comparison of a directory with a list of files; issues are returned as values, all at once."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from snapshot_format.record import File
from storage_initializer.errors import RefusedSnapshot


@dataclass(frozen=True, slots=True)
class Issue:
    """A difference between a file and its description."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


@dataclass(frozen=True, slots=True)
class Result:
    """The verified files, each with its sha256, and the issues of all others."""

    files: tuple[File, ...]
    issues: tuple[Issue, ...]


def check(directory: Path, expected: Iterable[File], *, fast: bool = False) -> Result:
    """Compare every expected file and report unexpected ones; `fast` compares sizes only.

    Hidden files are bookkeeping and ignored.
    """
    files: list[File] = []
    issues: list[Issue] = []
    unexpected = set(_paths(directory))
    for file in expected:
        unexpected.discard(file.path)
        compared = compare(directory, file, fast=fast)
        if isinstance(compared, Issue):
            issues.append(compared)
        else:
            files.append(compared)
    issues += [Issue(path, "is unexpected") for path in sorted(unexpected)]
    return Result(tuple(files), tuple(issues))


def list_files(directory: Path) -> tuple[File, ...]:
    """List the visible files of a directory with their sizes, like a repository on the Hub.

    Raises:
        RefusedSnapshot: the directory contains a link or a device.
        OSError: a directory is unreadable; `filename` is its path.
    """
    files = []
    for path in sorted(_paths(directory)):
        status = (directory / path).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise RefusedSnapshot(f"{directory / path} is a link or a device. Replace it with a copy (cp -rL).")
        files.append(File(path, status.st_size))
    return tuple(files)


def measure(directory: Path, path: str) -> File:
    """Return the size and sha256 of a file."""
    return File(path, (directory / path).stat().st_size, _sha256(directory / path))


def compare(directory: Path, file: File, *, fast: bool = False) -> File | Issue:
    """Return the file with its sha256, or the issue; `fast` compares sizes only."""
    path = directory / file.path
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return Issue(file.path, "is a link, a device or a directory")
        size_bytes = status.st_size
        if size_bytes != file.size_bytes:
            return Issue(file.path, f"has {size_bytes} bytes instead of {file.size_bytes}")
        if fast:
            return file
        if file.git_sha1 is not None and (git_sha1 := _git_sha1(path, size_bytes)) != file.git_sha1:
            return Issue(file.path, f"has git blob id {git_sha1} instead of {file.git_sha1}")
        sha256 = _sha256(path)
    except FileNotFoundError:
        return Issue(file.path, "is missing")
    if file.sha256 is not None and sha256 != file.sha256:
        return Issue(file.path, f"has sha256 {sha256} instead of {file.sha256}")
    return replace(file, sha256=sha256)


def matches(content: bytes, file: File) -> bool:
    """Return whether a content in memory has the size and the checksums of a file."""
    blob = b"blob %d\0" % len(content) + content
    return (
        len(content) == file.size_bytes
        and file.sha256 in (None, hashlib.sha256(content).hexdigest())
        and file.git_sha1 in (None, hashlib.sha1(blob, usedforsecurity=False).hexdigest())
    )


def _paths(directory: Path) -> Iterator[str]:
    """Iterate over the relative paths of all visible files in a directory tree."""
    for folder, folders, names in os.walk(directory, onerror=_raise_unless_missing):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *names):
            path = Path(folder, name)
            if not name.startswith(".") and not stat.S_ISDIR(path.lstat().st_mode):
                yield path.relative_to(directory).as_posix()


def _raise_unless_missing(error: OSError) -> None:
    """Raise errors that `os.walk` would treat as an empty directory."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _git_sha1(path: Path, size_bytes: int) -> str:
    """Return git's blob id; only small files have one, so reading them twice is cheap."""
    with path.open("rb") as content:
        digest = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
        return hashlib.file_digest(content, lambda: digest).hexdigest()
