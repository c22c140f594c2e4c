"""Bearer API keys from a file that is read again when it changes.

The file has one `name:key` per line; blank lines and lines that begin with `#` are skipped. Options may follow, after
white space:

    alice:Zm9yIGFsaWNlIG9ubHk
    batch-job:c29tZXRoaW5nIGVsc2U weight=2 tokens_per_minute=100000

A name is 1 to 64 of `A-Za-z0-9._-` and identifies the client in logs and metrics. A key is at least 16 printable ASCII
characters without white space. Both are unique. The options are the fields of `Caller`: `weight`, 1 if absent, and
limits. No error or log line of this module contains any part of a key.
"""

import hmac
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from predictor.errors import InvalidSettings, Unauthorized
from predictor.types import Caller

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Shortest time between two checks of the file."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]{16,}")
MAX_WEIGHT = 1000
OPTIONS = ("weight", "requests_per_minute", "tokens_per_minute", "concurrent_sequences")
_OPTION = re.compile(rf"({'|'.join(OPTIONS)})=([1-9][0-9]{{0,11}})")


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

    def authenticate(self, authorization: Sequence[str]) -> Caller:
        """Return the owner of the key in a request's `Authorization` headers.

        Raises:
            Unauthorized: there is no header, more than one, another scheme, or an unknown key.
        """
        if not authorization:
            raise Unauthorized("Missing API key. Send `Authorization: Bearer <key>`.")
        scheme, _, key = authorization[0].partition(" ")
        if len(authorization) > 1 or scheme.lower() != "bearer":
            raise Unauthorized("Malformed Authorization header. Send one header `Authorization: Bearer <key>`.")
        caller = self.caller_of(key.strip(" "))
        if caller is None:
            raise Unauthorized("Invalid API key.")
        return caller

    def caller_of(self, key: str) -> Caller | None:
        """Return the owner of `key`, or None for an unknown one, in a time that does not depend on the key."""
        self._refresh()
        candidate = key.encode("utf-8", "surrogatepass")
        match = None
        for stored, caller in self._keys.items():
            if hmac.compare_digest(candidate, stored):
                match = caller
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


def _read(path: Path) -> dict[bytes, Caller]:
    """Return the owners by key; raises InvalidSettings."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InvalidSettings(f"API key file {path} cannot be read: {error.strerror}.") from None
    return parse(text, f"API key file {path}")


def parse(text: str, source: str) -> dict[bytes, Caller]:
    """Return the owners of the keys in a file, by key.

    Args:
        text: of the file.
        source: the file's name, for messages.

    Raises:
        InvalidSettings: a line is malformed, or there is no key.
    """
    keys: dict[bytes, Caller] = {}
    names: set[str] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            key, caller = _parse_line(line)
            if key in keys or caller.name in names:
                raise ValueError("duplicate name or key. Give every name its own key")
        except ValueError as problem:
            raise InvalidSettings(f"{source}, line {number}: {problem}.") from None
        keys[key] = caller
        names.add(caller.name)
    if not keys:
        raise InvalidSettings(f"{source} is empty. Write one name:key per line.")
    total = sum(caller.weight for caller in keys.values())
    return {key: replace(caller, share=caller.weight / total) for key, caller in keys.items()}


def _parse_line(line: str) -> tuple[bytes, Caller]:
    """Return the key and its owner, whose share is not known yet; raises ValueError with the problem."""
    name, _, rest = line.partition(":")
    key, *options = rest.split() if rest[:1].strip() else [""]
    if not _NAME.fullmatch(name):
        raise ValueError("invalid name. Write name:key with up to 64 letters, digits, dots, _ or - before the colon")
    if not _KEY.fullmatch(key):
        raise ValueError(
            "invalid key. Write name:key with 16 or more ASCII characters without white space after the colon"
        )
    # What follows may be a part of the key, so it is not shown.
    values: dict[str, int] = {}
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None:
            raise ValueError(f"invalid option after the key. Write {', '.join(OPTIONS)} as name=number, 1 or more")
        if match[1] in values:
            raise ValueError(f"duplicate option {match[1]}. Write it once")
        values[match[1]] = int(match[2])
    if values.get("weight", 1) > MAX_WEIGHT:
        raise ValueError(f"the weight is too large. Write at most {MAX_WEIGHT}")
    return key.encode(), Caller(name, **values)
