"""Bearer API keys from a file that is read again when it changes.

The file has one `name:key` per line; blank lines and lines that begin with `#` are skipped:

    alice:Zm9yIGFsaWNlIG9ubHk
    batch-job:c29tZXRoaW5nIGVsc2U

A name is 1 to 64 of `A-Za-z0-9._-` and identifies the client in logs. A key is at least 16 printable ASCII characters
without white space. Both are unique. No error or log line of this module contains any part of a key.
"""

import hmac
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from predictor.errors import InvalidSettings, Unauthorized

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Shortest time between two checks of the file."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]{16,}")


class KeyFile:
    """The keys of the last valid version of a file.

    Args:
        path: the file, or a symbolic link that is swapped, as in a mounted Kubernetes Secret.
        clock: monotonic time in seconds.

    Raises:
        InvalidSettings: the file is missing, unreadable, malformed or has no key.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._last_check = clock()
        self._stamp = _stamp(path)
        self._keys = _read(path)

    def authenticate(self, authorization: Sequence[str]) -> str:
        """Return the name of the key in a request's `Authorization` headers.

        Raises:
            Unauthorized: there is no header, more than one, another scheme, or an unknown key.
        """
        if not authorization:
            raise Unauthorized("Missing API key. Send `Authorization: Bearer <key>`.")
        scheme, _, key = authorization[0].partition(" ")
        if len(authorization) > 1 or scheme.lower() != "bearer":
            raise Unauthorized("Malformed Authorization header. Send one header `Authorization: Bearer <key>`.")
        name = self.name_of(key.strip(" "))
        if name is None:
            raise Unauthorized("Invalid API key.")
        return name

    def name_of(self, key: str) -> str | None:
        """Return the name of `key`, or None for an unknown one, in a time that does not depend on the key."""
        self._refresh()
        candidate = key.encode("utf-8", "surrogatepass")
        match = None
        for name, stored in self._keys.items():
            if hmac.compare_digest(candidate, stored):
                match = name
        return match

    def _refresh(self) -> None:
        """Read the file again if it has changed; an invalid one is logged once and changes nothing."""
        now = self._clock()
        if now - self._last_check < CHECK_SECONDS:
            return
        self._last_check = now
        # Taken before reading: a later write is noticed at the next check.
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._path)
        except InvalidSettings as error:
            logger.error("%s The previous keys stay valid.", error)
        else:
            logger.info("read %d API keys from %s", len(self._keys), self._path)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return attributes that change when the file is written, replaced or made readable; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _read(path: Path) -> dict[str, bytes]:
    """Return the keys by name; raises InvalidSettings."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InvalidSettings(f"API key file {path} cannot be read: {error.strerror}.") from None
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = line.partition(":")
        if not _NAME.fullmatch(name):
            problem = "invalid name. Write name:key with up to 64 letters, digits, dots, _ or - before the colon"
        elif not _KEY.fullmatch(key):
            problem = "invalid key. Write name:key with 16 or more ASCII characters without white space after the colon"
        elif name in keys or key.encode() in keys.values():
            problem = "duplicate name or key. Give every name its own key"
        else:
            keys[name] = key.encode()
            continue
        raise InvalidSettings(f"API key file {path}, line {number}: {problem}.")
    if not keys:
        raise InvalidSettings(f"API key file {path} is empty. Write one name:key per line.")
    return keys
