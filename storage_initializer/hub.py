"""The Hub: what a revision is, what a commit holds, and its files; the only importer of huggingface_hub.

Turns that library's exceptions into ours. The library is imported when the first question is asked, since that takes
longer than finding a published snapshot. Knows nothing of leases or publishing: it writes where it is told to.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from storage_initializer.errors import (
    AccessDenied,
    HubUnavailable,
    InitializerError,
    NotFound,
    Stopped,
)
from storage_initializer.plan import File
from storage_initializer.reference import HubReference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ANSWER_SECONDS = 30.0
_CHUNK_BYTES = 1 << 20
"""Progress and a request to stop are noticed once per chunk; the library's own 10 MiB take long on a slow line."""


class Hub:
    """One repository as seen with one token through one endpoint."""

    def __init__(self, reference: HubReference, endpoint: str, token: str | None, parallel_files: int) -> None:
        self._reference = reference
        self._endpoint = endpoint.rstrip("/")
        self._token = token
        self._parallel_files = parallel_files

    def resolve(self) -> str:
        """The commit that the reference's revision names now; asks nobody when it is a commit already.

        Raises:
            NotFound: no such repository or revision.
            AccessDenied: the repository is gated, or the token is not accepted.
            HubUnavailable: no answer, or none for now.
        """
        if self._reference.is_commit:
            return self._reference.revision
        with self._errors_explained():
            found = self._api().model_info(
                self._reference.repository, revision=self._reference.revision, expand=["sha"], timeout=_ANSWER_SECONDS
            )
        if found.sha is None or not replace(self._reference, revision=found.sha).is_commit:
            raise HubUnavailable(f"{self._endpoint} names no commit for {self._reference}: check HF_ENDPOINT")
        return found.sha

    def listing(self, commit: str) -> tuple[File, ...]:
        """All files of a commit, with size and checksum.

        Raises:
            NotFound: no such repository or commit.
            AccessDenied: the repository is gated, or the token is not accepted.
            HubUnavailable: no answer, or none for now.
        """
        from huggingface_hub import RepoFile

        with self._errors_explained():
            tree = self._api().list_repo_tree(self._reference.repository, revision=commit, recursive=True)
            return tuple(_file(entry) for entry in tree if isinstance(entry, RepoFile))

    def fetch(self, commit: str, files: Iterable[File], staging: Path, advance: Callable[[int], None]) -> None:
        """Put files of a commit into a directory, several at a time; a file appears there when it is complete.

        Leaves the library's bookkeeping in `staging/.cache`. `advance` gets numbers of bytes, from several threads;
        what it raises ends the fetching.

        Raises:
            NotFound, AccessDenied, HubUnavailable: as above.
        """
        from huggingface_hub import hf_hub_download

        self._api()
        stopped = threading.Event()

        def advance_or_stop(size_bytes: int) -> None:
            if stopped.is_set():
                raise Stopped("fetching was stopped")
            advance(size_bytes)

        def fetch_one(file: File) -> None:
            hf_hub_download(
                self._reference.repository,
                file.path,
                revision=commit,
                local_dir=staging,
                # Nowhere: what lies in the cache of this machine was not verified, and must not be copied.
                cache_dir=staging / ".cache" / "none",
                endpoint=self._endpoint,
                token=self._token,
                tqdm_class=_bar(advance_or_stop),
            )

        with self._errors_explained(), ThreadPoolExecutor(self._parallel_files, thread_name_prefix="fetch") as pool:
            try:
                for done in as_completed([pool.submit(fetch_one, file) for file in files]):
                    done.result()
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _api(self) -> "HfApi":
        """The library, told to be quiet: no telemetry, no bars, no log handler of its own."""
        from huggingface_hub import HfApi, constants

        constants.HF_HUB_DISABLE_TELEMETRY = True
        constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
        logging.getLogger("huggingface_hub").handlers.clear()
        return HfApi(endpoint=self._endpoint, token=self._token)

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            explained = self._explained(error)
            if explained is error:
                raise
            raise explained from error

    def _explained(self, error: Exception) -> Exception:
        """What an exception of the library means; errors of the disk and our own come back as they are."""
        import httpx2
        from huggingface_hub import errors

        where = f"{self._reference} at {self._endpoint}"
        page = f"{self._endpoint}/{self._reference.repository}"
        hint = "check HF_TOKEN" if self._token else "set HF_TOKEN"
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            return self._explained(error.__cause__)
        if isinstance(error, errors.GatedRepoError):
            return AccessDenied(f"{where} is gated: accept its licence at {page} and {hint} of that account")
        if isinstance(error, errors.RevisionNotFoundError):
            return NotFound(f"{self._reference.name} has no revision {self._reference.revision}: see {page}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return NotFound(f"{where} does not exist or is private: check the name, or {hint}")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return HubUnavailable(f"{where} was not asked, since HF_HUB_OFFLINE is set: unset it")
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                return AccessDenied(f"{where} may not be read with this token ({status}): {hint}")
            if isinstance(error, errors.RemoteEntryNotFoundError):
                return HubUnavailable(f"{where} lacks a file that it listed a moment ago: run again later")
            if status < 500 and status not in (408, 429):
                return NotFound(f"{where} answered {status}, as no Hub does: check HF_ENDPOINT")
            return HubUnavailable(f"{where} answered {status} {error.response.reason_phrase}: run again later")
        if isinstance(error, httpx2.HTTPError):
            return HubUnavailable(f"{where} cannot be reached ({error}): check the network, proxy and HF_ENDPOINT")
        if isinstance(error, InitializerError) or (isinstance(error, OSError) and error.errno is not None):
            return error
        return HubUnavailable(f"{where} failed ({error}): run again later")


def _file(entry: Any) -> File:
    if entry.lfs is not None:
        return File(entry.path, entry.lfs.size, sha256=entry.lfs.sha256)
    return File(entry.path, entry.size, git_sha1=entry.blob_id)


def _bar(advance: Callable[[int], None]) -> type[Any]:
    """What the library takes for a tqdm class: passes numbers of bytes on and shows nothing.

    Over Xet the library reports bytes twice, as received and as written to the file; `update_transfer` takes the
    former, so that every byte counts once.
    """

    class Bar:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_postfix_str(self, *_: object, **__: object) -> None:
            pass

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
            pass

        def close(self) -> None:
            pass

    return Bar
