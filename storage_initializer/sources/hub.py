"""Source of snapshots: a repository on the Hub.

Resolves revisions, lists commits, downloads files with resume and retries, and translates errors.
"""

import contextlib
import http
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from snapshot_format.record import File
from snapshot_format.reference import HubReference
from storage_initializer.errors import (
    AccessDenied,
    HubUnavailable,
    InitializerError,
    NotFound,
    Stopped,
    TransientHubError,
)
from storage_initializer.settings import Settings
from storage_initializer.sources.hub_client import HubClient, retry_after_seconds
from storage_initializer.sources.retry import RetryPolicy
from storage_initializer.sources.worker_pool import run_in_threads
from storage_initializer.volume import layout, verify

_Result = TypeVar("_Result")


class Hub:
    """A repository on the Hub."""

    def __init__(self, reference: HubReference, settings: Settings) -> None:
        self._reference = reference
        self._endpoint = settings.hf_endpoint.rstrip("/")
        self._settings = settings
        self._retry = RetryPolicy(settings.attempts, settings.retry_wait_seconds)
        self._xet_paths: frozenset[str] = frozenset()

    @cached_property
    def _client(self) -> HubClient:
        return HubClient(self._settings)

    def resolve(self, *, retry: bool = True) -> str:
        """Return the current commit of the reference's revision; a commit is returned without a request.

        Raises:
            NotFound: the repository or revision does not exist.
            AccessDenied: the repository is gated, or the token is rejected.
            HubUnavailable: no response, after retries if enabled.
        """
        if self._reference.is_commit:
            return self._reference.revision
        client, repository, revision = self._client, self._reference.repository, self._reference.revision
        commit = self._call(lambda: client.commit(repository, revision), self._retry if retry else RetryPolicy(1, 1.0))
        if commit is None or not replace(self._reference, revision=commit).is_commit:
            raise HubUnavailable(f"{self._endpoint} returned no commit for {self._reference}. Check HF_ENDPOINT.")
        return commit

    def list_files(self, commit: str) -> tuple[File, ...]:
        """List all files of a commit with sizes and checksums.

        Raises:
            NotFound: the repository or commit does not exist.
            AccessDenied: the repository is gated, or the token is rejected.
            HubUnavailable: no response after retries.
        """
        client, repository = self._client, self._reference.repository

        def list_entries() -> list[tuple[File, bool]]:
            entries = client.tree(repository, commit)
            return [(_file(entry), bool(entry.get("xetHash"))) for entry in entries if entry["type"] == "file"]

        entries = self._call(list_entries, self._retry)
        if client.uses_xet:
            self._xet_paths = frozenset(file.path for file, uses_xet in entries if uses_xet)
        return tuple(file for file, _ in entries)

    def read(self, commit: str, file: File) -> bytes:
        """Return the content of a small file of a commit.

        Raises:
            NotFound, AccessDenied, HubUnavailable: see above.
        """
        client, repository = self._client, self._reference.repository

        def download() -> bytes:
            with client.stream(repository, commit, file.path, 0) as response:
                content = b"".join(self._enforce_min_throughput(response.iter_bytes()))
            if not verify.matches(content, file):
                raise TransientHubError(f"{self._reference} sent wrong bytes of {file.path}. Run again.")
            return content

        return self._call(download, self._retry)

    def fetch(
        self,
        commit: str,
        files: Iterable[File],
        staging: Path,
        advance: Callable[[int], None],
        finished: Callable[[File], None],
    ) -> None:
        """Download files of a commit in parallel; each file appears in `staging` when it is complete.

        `advance` gets numbers of bytes and `finished` complete files, both from several threads. Their exceptions end
        the download.

        Raises:
            NotFound, AccessDenied, HubUnavailable: see above.
        """
        # Imported by the calling thread, so that its errors are reported as usage errors.
        client = self._client
        stopped = threading.Event()

        def advance_or_stop(size_bytes: int) -> None:
            if stopped.is_set():
                raise Stopped("Download stopped.")
            advance(size_bytes)

        def download(file: File) -> None:
            if file.path in self._xet_paths:
                client.download_over_xet(self._reference.repository, commit, file.path, staging, advance_or_stop)
            else:
                self._download(commit, file, staging, advance_or_stop)

        def fetch_one(file: File) -> None:
            def attempt() -> None:
                with self._translated_errors(staging):
                    download(file)

            self._retry.call(attempt, stopped)
            finished(file)

        run_in_threads(files, fetch_one, self._settings.parallel_files, stopped)

    def _download(self, commit: str, file: File, staging: Path, advance: Callable[[int], None]) -> None:
        """Download the missing bytes of a file over plain HTTP."""
        with layout.partial_path(staging, file.path).open("ab") as into:
            offset = into.tell()
            if offset > file.size_bytes:
                into.truncate(0)
                offset = 0
            if offset < file.size_bytes:
                with self._client.stream(self._reference.repository, commit, file.path, offset) as response:
                    if offset and response.status_code != http.HTTPStatus.PARTIAL_CONTENT:
                        # The server does not support ranges and sends the whole file.
                        into.truncate(0)
                        advance(-offset)
                    for chunk in self._enforce_min_throughput(response.iter_bytes()):
                        into.write(chunk)
                        advance(len(chunk))
        layout.complete(staging, file.path)

    def _enforce_min_throughput(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield chunks while enough bytes arrive; the client's read timeout detects silence."""
        window_seconds, min_bytes_per_second = self._settings.stall_seconds, self._settings.stall_bytes_per_second
        started, size_bytes = time.monotonic(), 0
        for chunk in chunks:
            yield chunk
            size_bytes += len(chunk)
            seconds = time.monotonic() - started
            if seconds >= window_seconds:
                if size_bytes < min_bytes_per_second * seconds:
                    raise TransientHubError(
                        f"{self._reference} at {self._endpoint} stalled at {size_bytes / seconds:.0f} bytes/s. "
                        "Check the network, then run again."
                    )
                started, size_bytes = time.monotonic(), 0

    def _call(self, request: Callable[[], _Result], retry: RetryPolicy) -> _Result:
        """Return the result of a request that runs in a thread, so that signals interrupt the wait."""
        stopped = threading.Event()

        def attempt() -> _Result:
            with self._translated_errors():
                return request()

        [result] = run_in_threads([attempt], lambda call: retry.call(call, stopped), stopped=stopped)
        return result

    @contextlib.contextmanager
    def _translated_errors(self, staging: Path | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, InitializerError) or (staging and _is_disk_error(error, staging)):
                raise
            raise self._translate_error(error) from error

    def _translate_error(self, error: Exception) -> InitializerError:
        """Return this program's error for an exception of the library."""
        import httpx2
        from huggingface_hub import errors

        source = f"{self._reference} at {self._endpoint}"
        page = f"{self._endpoint}/{self._reference.repository}"
        fix_token = "check HF_TOKEN" if self._settings.hf_token else "set HF_TOKEN"
        match error:
            case errors.LocalEntryNotFoundError(__cause__=Exception() as cause):
                return self._translate_error(cause)
            case errors.GatedRepoError():
                return AccessDenied(f"{source} is gated. Accept its license at {page} and {fix_token} of that account.")
            case errors.RevisionNotFoundError():
                return NotFound(f"{self._reference.name} has no revision {self._reference.revision}. See {page}.")
            case errors.RepositoryNotFoundError():
                return NotFound(f"{source} does not exist or is private. Check the name, or {fix_token}.")
            case errors.OfflineModeIsEnabled():
                return HubUnavailable(f"{source} was not requested, because HF_HUB_OFFLINE is set. Unset it.")
            case errors.RemoteEntryNotFoundError():
                return HubUnavailable(f"{source} does not have a file of its own listing. Run again later.")
            case errors.HfHubHTTPError():
                status = error.response.status_code
                if status in (401, 403):
                    return AccessDenied(f"{source} rejected this token with status {status}: {fix_token}.")
                if status < 500 and status not in (408, 429):
                    return NotFound(f"{source} returned status {status}, unlike a Hub. Check HF_ENDPOINT.")
                return TransientHubError(
                    f"{source} returned {status} {error.response.reason_phrase}. Run again later.",
                    retry_after_seconds(error.response.headers),
                )
            case httpx2.ReadTimeout():
                return TransientHubError(f"{source} stalled. Check the network, then run again.")
            case httpx2.HTTPError():
                return TransientHubError(
                    f"{source} is unreachable ({error}). Check the network, proxy and HF_ENDPOINT."
                )
        return HubUnavailable(f"{source} failed ({error}). Run again later.")


def _is_disk_error(error: Exception, staging: Path) -> bool:
    """Return whether an error comes from writing into staging, not from the network or files elsewhere."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    # gaierror and SSLError have their own error numbers.
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
        return False
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(staging)


def _file(entry: dict[str, Any]) -> File:
    if lfs := entry.get("lfs"):
        return File(entry["path"], lfs["size"], sha256=lfs["oid"])
    return File(entry["path"], entry["size"], git_sha1=entry["oid"])
