"""Holds a directory against a list of files: issues as values, all at once.

Reads only. What an issue means (fetch again, refuse, report) is for the caller to say.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from storage_initializer.errors import RefusedSnapshot
from storage_initializer.sources.file_selection import File


@dataclass(frozen=True, slots=True)
class Issue:
    """One thing that is wrong with one path."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


@dataclass(frozen=True, slots=True)
class Findings:
    """The files that are as promised, each with its sha256, and everything that is not."""

    files: tuple[File, ...]
    issues: tuple[Issue, ...]


def check(directory: Path, expected: Iterable[File], *, fast: bool = False) -> Findings:
    """Compare every expected file, or only its size if it shall be fast; report files that nobody expects.

    Hidden files are bookkeeping, and not looked at.
    """
    files: list[File] = []
    issues: list[Issue] = []
    unexpected = set(_paths(directory))
    for file in expected:
        unexpected.discard(file.path)
        found = compare(directory, file, fast=fast)
        if isinstance(found, Issue):
            issues.append(found)
        else:
            files.append(found)
    issues += [Issue(path, "is not part of the plan") for path in sorted(unexpected)]
    return Findings(tuple(files), tuple(issues))


def describe(directory: Path) -> tuple[File, ...]:
    """List a directory as the Hub lists a repository, with the sha256 of every file that is not hidden.

    Raises:
        RefusedSnapshot: a link or a device among the files.
        OSError: something cannot be read; `filename` says what.
    """
    paths = sorted(_paths(directory))
    for path in paths:
        if not stat.S_ISREG((directory / path).lstat().st_mode):
            raise RefusedSnapshot(f"{directory / path} is a link or a device: replace it with a copy (cp -rL)")
    return tuple(measure(directory, path) for path in paths)


def measure(directory: Path, path: str) -> File:
    """One file of a directory, as it is."""
    return File(path, (directory / path).stat().st_size, _sha256(directory / path))


def _paths(directory: Path) -> Iterator[str]:
    """The paths of everything below but directories, relative to the directory; what is hidden is skipped."""
    for folder, folders, names in os.walk(directory, onerror=_raise_unless_missing):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *names):
            path = Path(folder, name)
            if not name.startswith(".") and not stat.S_ISDIR(path.lstat().st_mode):
                yield path.relative_to(directory).as_posix()


def _raise_unless_missing(error: OSError) -> None:
    """A folder that cannot be read is not an empty one, as `os.walk` would have it."""
    if not isinstance(error, FileNotFoundError):
        raise error


def compare(directory: Path, file: File, *, fast: bool = False) -> File | Issue:
    """The file with its sha256, or what is wrong with it; if it shall be fast, only its size is looked at."""
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
        if file.git_sha1 is not None and (found := _git_sha1(path, size_bytes)) != file.git_sha1:
            return Issue(file.path, f"has git blob id {found} instead of {file.git_sha1}")
        sha256 = _sha256(path)
    except FileNotFoundError:
        return Issue(file.path, "is missing")
    if file.sha256 is not None and sha256 != file.sha256:
        return Issue(file.path, f"has sha256 {sha256} instead of {file.sha256}")
    return replace(file, sha256=sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _git_sha1(path: Path, size_bytes: int) -> str:
    """The id that git gives to this content as a blob; for small files, since it reads the file once more."""
    with path.open("rb") as content:
        begun = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
        return hashlib.file_digest(content, lambda: begun).hexdigest()
