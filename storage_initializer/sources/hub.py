"""The Hub: what a revision is, what a commit holds, and its files; the only importer of huggingface_hub.

Uses that library's session, headers and Xet downloads, and turns its exceptions into ours. Plain downloads are read
here, since the library begins a file anew after a kill and cannot be interrupted while a connection trickles; so are
listings, which it may wait for without end. It is imported when the first question is asked, since that takes longer
than finding a published snapshot.
"""

import contextlib
import datetime
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from snapshot_format.reference import HubReference
from storage_initializer.errors import (
    AccessDenied,
    HubBusy,
    HubUnavailable,
    InitializerError,
    InvalidUsage,
    NotFound,
    Stopped,
)
from storage_initializer.settings import Settings, limit_xet
from storage_initializer.sources.file_selection import File
from storage_initializer.sources.retry import Patience
from storage_initializer.sources.worker_pool import work_on
from storage_initializer.volume import layout

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_Result = TypeVar("_Result")


class Hub:
    """One repository as seen with one token through one endpoint."""

    def __init__(self, reference: HubReference, settings: Settings) -> None:
        self._reference = reference
        self._endpoint = settings.hf_endpoint.rstrip("/")
        self._token = settings.hf_token.get_secret_value() if settings.hf_token else None
        self._settings = settings
        self._patience = Patience(settings.attempts, settings.retry_wait_seconds)
        self._over_xet: frozenset[str] = frozenset()

    def resolve(self, *, patient: bool = True) -> str:
        """The commit that the reference's revision names now; asks nobody when it is a commit already.

        Without patience a busy Hub is asked once only.

        Raises:
            NotFound: no such repository or revision.
            AccessDenied: the repository is gated, or the token is not accepted.
            HubUnavailable: no answer, or none for now.
        """
        if self._reference.is_commit:
            return self._reference.revision
        api = self._api()

        def ask() -> str | None:
            repository, revision = self._reference.repository, self._reference.revision
            timeout = self._settings.stall_seconds
            return api.model_info(repository, revision=revision, expand=["sha"], timeout=timeout).sha

        commit = self._answer(ask, self._patience if patient else Patience(1, 1.0))
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
        self._api()
        from huggingface_hub import constants, get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers

        def ask() -> list[tuple[File, bool]]:
            # The library's own function has no timeout, and asks again by rules of its own.
            headers, entries = build_hf_headers(token=self._token), []
            page = f"{self._endpoint}/api/models/{self._reference.repository}/tree/{commit}?recursive=true"
            while page:
                response = get_session().get(page, headers=headers, timeout=self._settings.stall_seconds)
                hf_raise_for_status(response)
                entries += response.json()
                page = response.links.get("next", {}).get("url", "")
            return [(_file(entry), bool(entry.get("xetHash"))) for entry in entries if entry["type"] == "file"]

        listed = self._answer(ask, self._patience)
        if not constants.HF_HUB_DISABLE_XET:
            self._over_xet = frozenset(file.path for file, over_xet in listed if over_xet)
        return tuple(file for file, _ in listed)

    def fetch(
        self,
        commit: str,
        files: Iterable[File],
        staging: Path,
        advance: Callable[[int], None],
        finished: Callable[[File], None],
    ) -> None:
        """Put files of a commit into a directory, several at a time; a file appears there when it is complete.

        `advance` gets numbers of bytes and `finished` every file that has appeared, from several threads; what they
        raise ends the fetching.

        Raises:
            NotFound, AccessDenied, HubUnavailable: as above.
        """
        self._api()
        stopped = threading.Event()

        def advance_or_stop(size_bytes: int) -> None:
            if stopped.is_set():
                raise Stopped("fetching was stopped")
            advance(size_bytes)

        def fetch_one(file: File) -> None:
            download = self._download_over_xet if file.path in self._over_xet else self._download

            def attempt() -> None:
                with self._errors_explained(staging):
                    download(commit, file, staging, advance_or_stop)

            self._patience.call(attempt, stopped)
            finished(file)

        work_on(files, fetch_one, self._settings.parallel_files, stopped)

    def _download(self, commit: str, file: File, staging: Path, advance: Callable[[int], None]) -> None:
        """Fetch what is missing of a file, over plain HTTP."""
        import httpx2
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers

        unfinished = layout.partial(staging, file.path)
        with unfinished.open("ab") as into:
            begun = into.tell()
            if begun > file.size_bytes:
                into.truncate(0)
                begun = 0
            if begun < file.size_bytes:
                headers = build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"}
                if begun:
                    headers["Range"] = f"bytes={begun}-"
                url = hf_hub_url(self._reference.repository, file.path, revision=commit, endpoint=self._endpoint)
                stall_seconds = self._settings.stall_seconds
                with get_session().stream("GET", url, headers=headers, timeout=stall_seconds) as response:
                    hf_raise_for_status(response)
                    if begun and response.status_code != httpx2.codes.PARTIAL_CONTENT:
                        # A mirror that knows no ranges sends all of it.
                        into.truncate(0)
                        advance(-begun)
                    for chunk in self._at_some_pace(response.iter_bytes()):
                        into.write(chunk)
                        advance(len(chunk))
        layout.complete(staging, file.path)

    def _at_some_pace(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The chunks of a body, as long as enough of them come; silence is for the client's own timeout to notice."""
        window_seconds, floor = self._settings.stall_seconds, self._settings.stall_bytes_per_second
        began, size_bytes = time.monotonic(), 0
        for chunk in chunks:
            yield chunk
            size_bytes += len(chunk)
            seconds = time.monotonic() - began
            if seconds >= window_seconds:
                if size_bytes < floor * seconds:
                    raise HubBusy(
                        f"{self._reference} at {self._endpoint} stalled at {size_bytes / seconds:.0f} bytes/s: "
                        "check the network, then run again"
                    )
                began, size_bytes = time.monotonic(), 0

    def _download_over_xet(self, commit: str, file: File, staging: Path, advance: Callable[[int], None]) -> None:
        """Fetch a file with the library's own Xet client, which finds out itself when a connection has stalled."""
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            self._reference.repository,
            file.path,
            revision=commit,
            local_dir=staging,
            # Nowhere: what lies in the cache of this machine was not verified, and must not be copied.
            cache_dir=staging / ".cache" / "none",
            endpoint=self._endpoint,
            token=self._token,
            tqdm_class=_bar(advance),
        )

    def _answer(self, ask: Callable[[], _Result], patience: Patience) -> _Result:
        """What a question is answered, in a thread, so that a signal comes through."""
        stopped = threading.Event()

        def explained() -> _Result:
            with self._errors_explained():
                return ask()

        (answer,) = work_on([explained], lambda question: patience.call(question, stopped), stopped=stopped)
        return answer

    def _api(self) -> "HfApi":
        """The library, told to be quiet and modest: no telemetry, no bars, no log handler of its own.

        Raises:
            InvalidUsage: it cannot be imported, as with a variable of its own that it does not understand.
        """
        limit_xet(self._settings)
        try:
            from huggingface_hub import HfApi, constants
        except Exception as error:
            raise InvalidUsage(f"huggingface_hub cannot be loaded ({error}): check the HF_* variables") from error

        constants.HF_HUB_DISABLE_TELEMETRY = True
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
            return HubBusy(
                f"{where} answered {status} {error.response.reason_phrase}: run again later",
                _retry_after_seconds(error.response.headers),
            )
        if isinstance(error, httpx2.ReadTimeout):
            return HubBusy(f"{where} stalled: check the network, then run again")
        if isinstance(error, httpx2.HTTPError):
            return HubBusy(f"{where} cannot be reached ({error}): check the network, proxy and HF_ENDPOINT")
        return HubUnavailable(f"{where} failed ({error}): run again later")


def _is_of_the_disk(error: Exception, staging: Path) -> bool:
    """Whether an error comes from writing into staging, rather than from the network or files elsewhere."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    # gaierror and SSLError count errors in ways of their own.
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
        return False
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(staging)


def _retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The wait that an answer asks for: `Retry-After` in seconds or as a date, or the reset of a `ratelimit`."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    text = headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _file(entry: dict[str, Any]) -> File:
    if lfs := entry.get("lfs"):
        return File(entry["path"], lfs["size"], sha256=lfs["oid"])
    return File(entry["path"], entry["size"], git_sha1=entry["oid"])


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
