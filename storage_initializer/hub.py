"""The Hub: what a revision is, what a commit holds, and its files; the only importer of huggingface_hub.

Turns that library's exceptions into ours. The library is imported when the first question is asked, since that takes
longer than finding a published snapshot. Knows nothing of leases or publishing: it writes where it is told to.
"""

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from storage_initializer.errors import (
    AccessDenied,
    HubUnavailable,
    InitializerError,
    InvalidUsage,
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
_LEAVING_SECONDS = 0.5
"""How long threads may take to notice that they should stop. A slow one is left behind: see `_in_threads`."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


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
        api = self._api()

        def ask(revision: str) -> str | None:
            repository = self._reference.repository
            return api.model_info(repository, revision=revision, expand=["sha"], timeout=_ANSWER_SECONDS).sha

        with self._errors_explained():
            (commit,) = _in_threads(ask, [self._reference.revision])
        if commit is None or not replace(self._reference, revision=commit).is_commit:
            raise HubUnavailable(f"{self._endpoint} names no commit for {self._reference}: check HF_ENDPOINT")
        return commit

    def listing(self, commit: str) -> tuple[File, ...]:
        """All files of a commit, with size and checksum.

        Raises:
            NotFound: no such repository or commit.
            AccessDenied: the repository is gated, or the token is not accepted.
            HubUnavailable: no answer, or none for now.
        """
        api = self._api()
        from huggingface_hub import RepoFile

        def ask(revision: str) -> list[Any]:
            return list(api.list_repo_tree(self._reference.repository, revision=revision, recursive=True))

        with self._errors_explained():
            (tree,) = _in_threads(ask, [commit])
            return tuple(_file(entry) for entry in tree if isinstance(entry, RepoFile))

    def fetch(self, commit: str, files: Iterable[File], staging: Path, advance: Callable[[int], None]) -> None:
        """Put files of a commit into a directory, several at a time; a file appears there when it is complete.

        Leaves the library's bookkeeping in `staging/.cache`. `advance` gets numbers of bytes, from several threads;
        what it raises ends the fetching.

        Raises:
            NotFound, AccessDenied, HubUnavailable: as above.
        """
        self._api()
        from huggingface_hub import hf_hub_download

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

        with self._errors_explained(staging):
            _in_threads(fetch_one, files, self._parallel_files, stopped)

    def _api(self) -> "HfApi":
        """The library, told to be quiet: no telemetry, no bars, no log handler of its own.

        Raises:
            InvalidUsage: it cannot be imported, as with a variable of its own that it does not understand.
        """
        try:
            from huggingface_hub import HfApi, constants
        except Exception as error:
            raise InvalidUsage(f"huggingface_hub cannot be loaded ({error}): check the HF_* variables") from error

        constants.HF_HUB_DISABLE_TELEMETRY = True
        constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
        logging.getLogger("huggingface_hub").handlers.clear()
        return HfApi(endpoint=self._endpoint, token=self._token)

    @contextlib.contextmanager
    def _errors_explained(self, staging: Path | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, InitializerError) or (staging and _is_of_the_disk(error, staging)):
                raise
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> InitializerError:
        """What an exception of the library means."""
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
        return HubUnavailable(f"{where} failed ({error}): run again later")


def _in_threads(
    work: Callable[[_Item], _Result], items: Iterable[_Item], width: int = 1, stopped: threading.Event | None = None
) -> list[_Result]:
    """The results of work on every item, in threads; the first failure, or a signal, sets `stopped` and ends it.

    The calling thread only waits, so that a signal reaches it at once. A thread that hangs in a lookup or a read cannot
    be stopped, and is not waited for: it is a daemon, and ends with the program. (An executor's threads are joined when
    the program ends, and a Hub that sends a byte now and then keeps them for ever.)
    """
    stopped = stopped or threading.Event()
    tasks = deque((item, Future[_Result]()) for item in items)
    futures = [future for _, future in tasks]

    def go_on() -> None:
        while tasks and not stopped.is_set():
            with contextlib.suppress(IndexError):
                _complete(work, *tasks.popleft())

    threads = [threading.Thread(target=go_on, name=f"hub-{n}", daemon=True) for n in range(min(width, len(tasks)))]
    try:
        for thread in threads:
            thread.start()
        for done in as_completed(futures):
            done.result()
    except BaseException:
        stopped.set()
        until = time.monotonic() + _LEAVING_SECONDS
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))
        raise
    return [future.result() for future in futures]


def _complete(work: Callable[[_Item], _Result], item: _Item, future: "Future[_Result]") -> None:
    try:
        future.set_result(work(item))
    except BaseException as error:  # noqa: BLE001 - whatever it is, nobody else would tell
        # The library's Rust parts panic with what is no Exception, and must not end the program without a sentence.
        future.set_exception(
            error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
        )


def _is_of_the_disk(error: Exception, staging: Path) -> bool:
    """Whether an error comes from writing into staging, rather than from the network or files elsewhere."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    # gaierror and SSLError count errors in ways of their own.
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
        return False
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(staging)


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
