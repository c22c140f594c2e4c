"""Sources of this machine, for clusters without a Hub: a directory, or a tar archive of one.

Their content stands for the commit, so every run reads it whole. They write where they are told to, through
`volume.write`, and explain what is wrong with themselves; what is wrong with the volume is left to others.
"""

import contextlib
import errno
import hashlib
import io
import lzma
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

from snapshot_format.reference import DirectoryReference
from storage_initializer.errors import AccessDenied, NotFound, RefusedSnapshot, SourceFailed
from storage_initializer.sources import file_selection
from storage_initializer.sources.file_selection import Choice, File
from storage_initializer.volume import layout, verify

_CHUNK_BYTES = 1 << 20

_Content = io.BufferedReader
"""A file of a directory or of an archive, open for reading."""


class Directory:
    """The visible files of a directory."""

    def __init__(self, reference: DirectoryReference, choice: Choice) -> None:
        self._reference = reference
        self._choice = choice
        self._files: tuple[File, ...] = ()

    def resolve(self, *, patient: bool = True) -> str:  # noqa: ARG002 - nobody has to be asked twice
        """The fingerprint of the files that would be published.

        Raises:
            NotFound: no such directory.
            AccessDenied: this user may not read it, or something in it.
            SourceFailed: it cannot be read for now.
            RefusedSnapshot: it holds what must not be served.
        """
        with _explained(self._reference):
            self._files = self._describe()
        return file_selection.make(self._files, str(self._reference), self._choice).fingerprint

    def listing(self, _commit: str) -> tuple[File, ...]:
        """The files as `resolve` has found them."""
        return self._files

    def fetch(
        self,
        _commit: str,
        files: Iterable[File],
        staging: Path,
        advance: Callable[[int], None],
        finished: Callable[[File], None],
    ) -> None:
        """Copy the files.

        Raises:
            AccessDenied, SourceFailed: as above.
        """
        for file, content in self._open(files):
            layout.write(staging, file.path, _chunks(self._reference, content), advance)
            finished(file)

    def _describe(self) -> tuple[File, ...]:
        return verify.describe(self._reference.path)

    def _open(self, files: Iterable[File]) -> Iterator[tuple[File, _Content]]:
        for file in files:
            with _explained(self._reference):
                content = (self._reference.path / file.path).open("rb")
            with content:
                yield file, content


class Archive(Directory):
    """The visible files of a tar archive, compressed or not, read from its beginning to its end without seeking.

    A model's files lie at its top, or all of them in one directory there, as `tar cf model.tar my-model` puts them.
    """

    _top = ""
    """That directory with a slash, if there is one."""

    def _describe(self) -> tuple[File, ...]:
        found: dict[str, File] = {}
        for name, content in self._members():
            file_selection.guard(name, str(self._reference))
            if name in found:
                raise RefusedSnapshot(f"{self._reference} holds {name} twice: make the archive anew")
            size_bytes, sha256 = 0, hashlib.sha256()
            for chunk in _chunks(self._reference, content):
                size_bytes += len(chunk)
                sha256.update(chunk)
            found[name] = File(name, size_bytes, sha256.hexdigest())
        tops = {name.partition("/")[0] + "/" for name in found}
        if file_selection.CONFIG not in found and len(tops) == 1:
            self._top = tops.pop()
        return tuple(
            File(name.removeprefix(self._top), file.size_bytes, file.sha256) for name, file in sorted(found.items())
        )

    def _open(self, files: Iterable[File]) -> Iterator[tuple[File, _Content]]:
        wanted = {self._top + file.path: file for file in files}
        for name, content in self._members():
            if name in wanted:
                yield wanted.pop(name), content
        if wanted:
            raise SourceFailed(f"{self._reference} has changed, {', '.join(wanted)} is gone: run again")

    def _members(self) -> Iterator[tuple[str, _Content]]:
        """Every visible file, by its name in the archive, open until the next one is asked for."""
        members = self._unpacked()
        while True:
            # What the consumer raises between two members is no matter of this archive.
            with _explained(self._reference):
                member = next(members, None)
            if member is None:
                return
            yield member

    def _unpacked(self) -> Iterator[tuple[str, _Content]]:
        with tarfile.open(self._reference.path, "r|*") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isdir() or any(part.startswith(".") and part != ".." for part in name.split("/")):
                    continue
                content = archive.extractfile(member) if member.isfile() else None
                if content is None:
                    raise RefusedSnapshot(
                        f"{self._reference} holds {name}, a link or a device: make it anew with copies (tar -h)"
                    )
                yield name, cast(_Content, content)


def source(reference: DirectoryReference, choice: Choice) -> Directory:
    """A directory or an archive, as it lies there.

    Raises:
        NotFound, AccessDenied, SourceFailed: nothing does, or it cannot be reached.
    """
    with _explained(reference):
        mode = reference.path.stat().st_mode
    return Directory(reference, choice) if stat.S_ISDIR(mode) else Archive(reference, choice)


def _chunks(reference: DirectoryReference, content: _Content) -> Iterator[bytes]:
    """The content of a file. Errors of whoever takes the chunks do not pass through here."""
    while True:
        with _explained(reference):
            chunk = content.read(_CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


@contextlib.contextmanager
def _explained(reference: DirectoryReference) -> Iterator[None]:
    """Tell what an error means for the directory or archive of a reference."""
    path = reference.path
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _no_archive(reference, error) from error
    except OSError as error:
        where = error.filename or path
        match error.errno:
            case None:
                raise _no_archive(reference, error) from error
            case errno.EACCES | errno.EPERM:
                raise AccessDenied(
                    f"{reference} cannot be read ({where}: {error.strerror}): let user {os.getuid()} "
                    f"or group {os.getgid()} read it (chmod -R a+rX)"
                ) from error
            case errno.ENOENT | errno.ENOTDIR if where in (path, str(path)):
                raise NotFound(f"{reference} does not exist: check the path") from error
            case _:
                raise SourceFailed(
                    f"{reference} failed ({where}: {error.strerror}): check it, then run again"
                ) from error


def _no_archive(reference: DirectoryReference, error: Exception) -> RefusedSnapshot:
    return RefusedSnapshot(
        f"{reference} is neither a directory nor a whole tar archive ({error or type(error).__name__}): copy it again"
    )
