"""The bearer keys that a server accepts, read from a file and read again when it changes.

The file has one `name:key` per line; blank lines and lines that begin with `#` are skipped:

    alice:Zm9yIGFsaWNlIG9ubHk
    batch-job:c29tZXRoaW5nIGVsc2U

A name is 1 to 64 of `A-Za-z0-9._-` and tells in logs who asked; a key is at least 16 printable ASCII characters
without white space. Both are unique. Nothing that this module says, raises or logs contains any part of a line.
"""

import hmac
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from predictor.errors import InvalidSettings

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""The file is looked at no more often than this."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]{16,}")


class KeyFile:
    """The keys of one file, as it was when it was last in order.

    Args:
        path: the file, or a symbolic link to it that is swapped, as in a mounted Kubernetes Secret.
        clock: seconds that only grow.

    Raises:
        InvalidSettings: the file is missing, unreadable, malformed or has no key.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked = clock()
        self._stamp = _stamp(path)
        self._keys = _read(path)

    def name_of(self, key: str) -> str | None:
        """The name of `key`, or None where it is not known; takes as long for a key that is nearly right as for any."""
        self._refresh()
        asked = key.encode("utf-8", "surrogatepass")
        found = None
        for name, known in self._keys.items():
            if hmac.compare_digest(asked, known):
                found = name
        return found

    def _refresh(self) -> None:
        """Read the file again if it has changed; one that is not in order changes nothing and is reported once."""
        now = self._clock()
        if now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        # Taken before reading: what is written meanwhile is seen at the next check.
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._path)
        except InvalidSettings as error:
            logger.error("%s Until then the keys read before stay valid.", error)
        else:
            logger.info("Read %d keys from %s.", len(self._keys), self._path)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when the file is written, replaced or made readable; None where it cannot be found."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _read(path: Path) -> dict[str, bytes]:
    """Keys by name; raises InvalidSettings."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InvalidSettings(f"The key file {path} cannot be read ({error.strerror}); name one that can.") from None
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = line.partition(":")
        if not _NAME.fullmatch(name):
            problem = "does not begin with a name; write name:key, the name of up to 64 letters, digits, dots, _ or -"
        elif not _KEY.fullmatch(key):
            problem = "has no good key; write name:key, the key of 16 or more ASCII characters without white space"
        elif name in keys or key.encode() in keys.values():
            problem = "repeats a name or a key; every name has one key of its own"
        else:
            keys[name] = key.encode()
            continue
        raise InvalidSettings(f"Line {number} of the key file {path} {problem}.")
    if not keys:
        raise InvalidSettings(f"The key file {path} has no keys; write one name:key per line.")
    return keys
