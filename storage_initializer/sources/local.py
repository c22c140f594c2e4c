"""Local sources of snapshots, for clusters without a Hub: a directory, or a tar archive of one.

The fingerprint of the content replaces the commit, so every run reads the whole source. Errors of the source are
translated here; errors of the volume pass through.
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
from dataclasses import replace
from pathlib import Path
from typing import cast

from snapshot_format.model_files import CONFIG, INDEX_SUFFIX
from snapshot_format.record import File, FileSelection
from snapshot_format.reference import DirectoryReference
from storage_initializer.errors import AccessDenied, NotFound, RefusedSnapshot, SourceFailed
from storage_initializer.sources import file_selection
from storage_initializer.volume import layout, verify

_CHUNK_BYTES = 1 << 20

_Content = io.BufferedReader
"""A file of a directory or of an archive, open for reading."""


class Directory:
    """The visible files of a directory."""

    def __init__(self, reference: DirectoryReference, selection: FileSelection) -> None:
        self._reference = reference
        self._selection = selection
        self._files: tuple[File, ...] = ()

    def resolve(self, *, retry: bool = True) -> str:  # noqa: ARG002 - local sources need no retry
        """Return the fingerprint of the files that would be published.

        Raises:
            NotFound: the directory does not exist.
            AccessDenied: this user may not read it completely.
            SourceFailed: a temporary failure.
            RefusedSnapshot: it contains files that must not be served.
        """
        with _translated_errors(self._reference):
            self._files = self._list()
        plan = file_selection.make_plan(
            self._files, str(self._reference), self._selection, lambda file: self.read("", file)
        )
        with _translated_errors(self._reference):
            measured = {file.path: self._measure(file) for file in plan.files}
        self._files = tuple(measured.get(file.path, file) for file in self._files)
        return replace(plan, files=tuple(measured.values())).fingerprint

    def list_files(self, _commit: str) -> tuple[File, ...]:
        """Return the files that `resolve` has listed; those to publish have their checksums."""
        return self._files

    def read(self, _commit: str, file: File) -> bytes:
        """Return the content of a small file."""
        with _translated_errors(self._reference):
            return (self._reference.path / file.path).read_bytes()

    def fetch(
        self,
        _commit: str,
        files: Iterable[File],
        staging: Path,
        advance: Callable[[int], None],
        finished: Callable[[File], None],
    ) -> None:
        """Copy files into `staging`.

        Raises:
            AccessDenied, SourceFailed: see above.
        """
        for file, content in self._open(files):
            layout.write(staging, file.path, _chunks(self._reference, content), advance)
            finished(file)

    def _list(self) -> tuple[File, ...]:
        return verify.list_files(self._reference.path)

    def _measure(self, file: File) -> File:
        return verify.measure(self._reference.path, file.path)

    def _open(self, files: Iterable[File]) -> Iterator[tuple[File, _Content]]:
        for file in files:
            with _translated_errors(self._reference):
                content = (self._reference.path / file.path).open("rb")
            with content:
                yield file, content


class Archive(Directory):
    """The visible files of a tar archive, compressed or not, read sequentially.

    The model's files are at its top, or all in one directory, as in `tar cf model.tar my-model`.
    """

    _top = ""
    """That directory with a slash, if there is one."""

    def __init__(self, reference: DirectoryReference, selection: FileSelection) -> None:
        super().__init__(reference, selection)
        self._indexes: dict[str, bytes] = {}

    def read(self, _commit: str, file: File) -> bytes:
        """Return the content of an index, kept while listing: reading it again would read the whole archive."""
        return self._indexes[self._top + file.path]

    def _list(self) -> tuple[File, ...]:
        files: dict[str, File] = {}
        for name, content in self._members():
            file_selection.check_safe_path(name, str(self._reference))
            if name in files:
                raise RefusedSnapshot(f"{self._reference} contains {name} twice. Create the archive again.")
            size_bytes, sha256 = 0, hashlib.sha256()
            index = io.BytesIO()
            for chunk in _chunks(self._reference, content):
                size_bytes += len(chunk)
                sha256.update(chunk)
                if name.endswith(INDEX_SUFFIX) and size_bytes <= file_selection.MAX_INDEX_BYTES:
                    index.write(chunk)
            if name.endswith(INDEX_SUFFIX):
                self._indexes[name] = index.getvalue()
            files[name] = File(name, size_bytes, sha256.hexdigest())
        tops = {name.partition("/")[0] + "/" for name in files}
        if CONFIG not in files and len(tops) == 1:
            self._top = tops.pop()
        return tuple(
            File(name.removeprefix(self._top), file.size_bytes, file.sha256) for name, file in sorted(files.items())
        )

    def _measure(self, file: File) -> File:
        return file

    def _open(self, files: Iterable[File]) -> Iterator[tuple[File, _Content]]:
        pending = {self._top + file.path: file for file in files}
        for name, content in self._members():
            if name in pending:
                yield pending.pop(name), content
        if pending:
            raise SourceFailed(f"{self._reference} has changed, {', '.join(pending)} no longer exists. Run again.")

    def _members(self) -> Iterator[tuple[str, _Content]]:
        """Iterate over the visible files; each is open until the next one is requested."""
        members = self._unpacked()
        while True:
            # Exceptions that the consumer raises between two members are not errors of this archive.
            with _translated_errors(self._reference):
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
                        f"{self._reference} contains {name}, a link or a device. Create it again with copies (tar -h)."
                    )
                yield name, cast(_Content, content)


def open_source(reference: DirectoryReference, selection: FileSelection) -> Directory:
    """Return the source of a directory or archive.

    Raises:
        NotFound, AccessDenied, SourceFailed: it does not exist or is not accessible.
    """
    with _translated_errors(reference):
        mode = reference.path.stat().st_mode
    return Directory(reference, selection) if stat.S_ISDIR(mode) else Archive(reference, selection)


def _chunks(reference: DirectoryReference, content: _Content) -> Iterator[bytes]:
    """Iterate over the content of a file; exceptions of the consumer are not translated."""
    while True:
        with _translated_errors(reference):
            chunk = content.read(_CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


@contextlib.contextmanager
def _translated_errors(reference: DirectoryReference) -> Iterator[None]:
    """Translate errors of the operating system into errors of this source."""
    path = reference.path
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _not_an_archive(reference, error) from error
    except OSError as error:
        where = error.filename or path
        match error.errno:
            case None:
                raise _not_an_archive(reference, error) from error
            case errno.EACCES | errno.EPERM:
                raise AccessDenied(
                    f"{reference} is not readable ({where}: {error.strerror}). Let user {os.getuid()} "
                    f"or group {os.getgid()} read it (chmod -R a+rX)."
                ) from error
            case errno.ENOENT | errno.ENOTDIR if where in (path, str(path)):
                raise NotFound(f"{reference} does not exist. Check the path.") from error
            case _:
                raise SourceFailed(
                    f"{reference} failed ({where}: {error.strerror}). Check it, then run again."
                ) from error


def _not_an_archive(reference: DirectoryReference, error: Exception) -> RefusedSnapshot:
    return RefusedSnapshot(
        f"{reference} is neither a directory nor a complete tar archive ({error or type(error).__name__}). "
        "Copy it again."
    )
