"""The log of a wait for a snapshot: how long, what the volume holds of it, and the storage initializer's last error."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from snapshot_format import failure, layout, lease
from snapshot_format.failure import Failure
from snapshot_format.reference import ModelReference

LOG_SECONDS = 30.0

logger = logging.getLogger(__name__)


class WaitLog:
    """Logs the start of a wait, its state every 30 s, and new errors of the storage initializer at once.

    Args:
        root: root of the volume.
        reference: None for a directory of weights, of which the volume holds nothing else.
        timeout_seconds: maximum time of the wait.
        report: called with the state, one line, whenever it has been logged.
    """

    def __init__(
        self, root: Path, reference: ModelReference | None, timeout_seconds: float, report: Callable[[str], None]
    ) -> None:
        self._root = root
        self._reference = reference
        self._timeout_seconds = timeout_seconds
        self._report = report
        self._logged_at_seconds: float | None = None
        self._failure: Failure | None = None

    def update(self, missing: str, waited_seconds: float) -> None:
        """Log the state if it is due, or if the storage initializer has failed since the last call.

        Args:
            missing: what is waited for, logged once.
            waited_seconds: time since the start of the wait.
        """
        known, self._failure = self._failure, self.last_failure()
        has_failed = self._failure is not None and self._failure != known
        if has_failed:
            logger.warning("%s", self._failure)
        is_first = self._logged_at_seconds is None
        is_due = self._logged_at_seconds is None or waited_seconds - self._logged_at_seconds >= LOG_SECONDS
        if not has_failed and not is_due:
            return
        state = self._state(waited_seconds)
        if is_due:
            self._logged_at_seconds = waited_seconds
            logger.info("waiting for the snapshot, %s%s", state, f"; {missing}" if is_first else "")
        self._report(state)

    def last_failure(self) -> Failure | None:
        """Return the last error of the storage initializer; None if there is none, or it cannot be read."""
        if self._reference is None:
            return None
        try:
            return failure.read(layout.status_path(self._root, self._reference))
        except OSError:
            return None

    def _state(self, waited_seconds: float) -> str:
        parts = [f"{waited_seconds:.0f} of {self._timeout_seconds:.0f} s"]
        if self._reference is not None:
            parts.append(describe(self._root, self._reference))
        if self._failure is not None:
            parts.append(str(self._failure).rstrip("."))
        return "; ".join(parts)


def describe(root: Path, reference: ModelReference) -> str:
    """Return the staged bytes and the storage initializers that hold a lease, in one line."""
    try:
        staged = _staged_bytes(root, reference)
        holders = _holders(root, reference)
    except OSError as error:
        return f"{error.filename or root} cannot be read ({error.strerror})"
    staging = f"{staged / 2**20:.1f} MiB in staging" if staged else "nothing in staging"
    return f"{staging}, {' and '.join(holders) or 'no storage initializer holds a lease'}"


def _staged_bytes(root: Path, reference: ModelReference) -> int:
    staged = 0
    for directory in _entries(root / layout.STAGING, reference):
        for folder, _, names in os.walk(directory):
            for name in names:
                try:
                    staged += Path(folder, name).lstat().st_size
                except FileNotFoundError:  # The snapshot is being completed or published.
                    continue
    return staged


def _holders(root: Path, reference: ModelReference) -> list[str]:
    """Return the holders of leases, with the age of their heartbeats by this machine's clock."""
    holders = []
    for path in _entries(root / layout.LOCKS, reference):
        if path.suffix == layout.LEASE_SUFFIX and (holder := lease.read_holder(path)):
            age = max(0.0, time.time() - holder.last_beat)
            holders.append(f"{holder.name} holds a lease, last heartbeat {age:.0f} s ago")
    return holders


def _entries(folder: Path, reference: ModelReference) -> list[Path]:
    """Return the entries of a reference; of all commits if its revision is a branch or tag."""
    prefix = f"{reference.slug}@{reference.revision if reference.is_commit else ''}"
    try:
        return sorted(path for path in folder.iterdir() if path.name.startswith(prefix))
    except FileNotFoundError:
        return []
