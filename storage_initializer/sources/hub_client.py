"""Fence around huggingface_hub: the only importer of that library's internals.

Uses its session, headers and Xet downloads. Listings and plain downloads are read with the session directly, because
the library's own functions have no timeout, restart interrupted files, and cannot be interrupted. The library is
imported on first use, because that takes longer than checking a published snapshot.
"""

import contextlib
import datetime
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol, Self

from storage_initializer.errors import InvalidUsage
from storage_initializer.settings import Settings


class Response(Protocol):
    """The part of an httpx response that this program uses."""

    status_code: int

    def iter_bytes(self) -> Iterator[bytes]:
        """Iterate over the chunks of the body."""


class HubClient:
    """A client of one Hub endpoint with one token.

    Raises:
        InvalidUsage: huggingface_hub cannot be imported, for example because of an invalid HF_* variable.
    """

    def __init__(self, settings: Settings) -> None:
        _configure_xet(settings)
        try:
            from huggingface_hub import HfApi, constants
        except Exception as error:
            raise InvalidUsage(f"Cannot load huggingface_hub ({error}). Check the HF_* variables.") from error
        constants.HF_HUB_DISABLE_TELEMETRY = True
        # Our own handler is on the root logger.
        logging.getLogger("huggingface_hub").handlers.clear()
        self._endpoint = settings.hf_endpoint.rstrip("/")
        self._token = settings.hf_token.get_secret_value() if settings.hf_token else None
        self._timeout_seconds = settings.stall_seconds
        self._api = HfApi(endpoint=self._endpoint, token=self._token)
        self.uses_xet = not constants.HF_HUB_DISABLE_XET

    def commit(self, repository: str, revision: str) -> str | None:
        """Return the commit of a revision."""
        return self._api.model_info(repository, revision=revision, expand=["sha"], timeout=self._timeout_seconds).sha

    def tree(self, repository: str, commit: str) -> list[dict[str, Any]]:
        """Return all entries of a commit's file tree."""
        from huggingface_hub import get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers

        headers, entries = build_hf_headers(token=self._token), []
        page = f"{self._endpoint}/api/models/{repository}/tree/{commit}?recursive=true"
        while page:
            response = get_session().get(page, headers=headers, timeout=self._timeout_seconds)
            hf_raise_for_status(response)
            entries += response.json()
            page = response.links.get("next", {}).get("url", "")
        return entries

    @contextlib.contextmanager
    def stream(self, repository: str, commit: str, path: str, offset: int) -> Iterator[Response]:
        """Stream a file over plain HTTP, from a byte offset if the server supports ranges."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        url = hf_hub_url(repository, path, revision=commit, endpoint=self._endpoint)
        with get_session().stream("GET", url, headers=headers, timeout=self._timeout_seconds) as response:
            hf_raise_for_status(response)
            yield response

    def download_over_xet(
        self, repository: str, commit: str, path: str, staging: Path, advance: Callable[[int], None]
    ) -> None:
        """Download a file with the library's Xet client, which detects stalled connections itself."""
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            repository,
            path,
            revision=commit,
            local_dir=staging,
            # A directory that does not exist: the machine's cache is not verified, so it must not be used.
            cache_dir=staging / ".cache" / "none",
            endpoint=self._endpoint,
            token=self._token,
            tqdm_class=byte_counter(advance),
        )


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the wait that a response requests: its `Retry-After`, or the reset of its `ratelimit`."""
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


def byte_counter(advance: Callable[[int], None]) -> type[Any]:
    """Return a tqdm-compatible class that reports numbers of bytes and displays nothing.

    Over Xet the library reports bytes twice, as received (`update_transfer`) and as written to the file (`update`).
    Only the latter are counted.
    """

    class ByteCounter:
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

    return ByteCounter


def _configure_xet(settings: Settings) -> None:
    """Set the memory, concurrency and timeout of hf_xet, which reads the environment when it is loaded.

    KServe sets `HF_XET_HIGH_PERFORMANCE`, which uses gigabytes of memory. The settings of this program override it.
    """
    buffer = f"{settings.xet_buffer_mib}mb"
    os.environ |= {
        "HF_XET_HIGH_PERFORMANCE": "0",
        "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": buffer,
        "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": buffer,
        "HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER": "8mb",
        "HF_XET_DATA_MAX_CONCURRENT_FILE_DOWNLOADS": str(settings.parallel_files),
        "HF_XET_CLIENT_READ_TIMEOUT": f"{math.ceil(settings.stall_seconds)}s",
    }
