"""Leases: one initializer at a time publishes a snapshot.

flock is not used, because some network file systems accept and ignore it. A lease is a file that only one process can
create. Its holder updates the mtime regularly; another initializer takes over a lease whose mtime is too old by the
volume's own clock. A holder that was wrongly considered dead does no harm: the new holder renames the staging
directory, and a rename onto a published snapshot fails.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from snapshot_format.lease import Holder, read_holder
from storage_initializer.errors import LeaseLost, LeaseTimeout
from storage_initializer.volume.permissions import make_shared_directory

_POLL_SECONDS = 0.5
_LOG_INTERVAL_SECONDS = 10.0
_MODE = 0o664

log = logging.getLogger(__name__)


class Lease:
    """The exclusive right to stage and publish one snapshot, kept by a heartbeat."""

    def __init__(self, path: Path, stale_seconds: float) -> None:
        self.token = secrets.token_hex(8)
        self._path = path
        self._stale_seconds = stale_seconds
        self._lost = threading.Event()
        self._released = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def check(self) -> None:
        """Raise unless the lease is still held; cheap enough for every chunk.

        Raises:
            LeaseLost: another initializer has taken over.
        """
        if self._lost.is_set():
            raise LeaseLost(
                f"Lease lost: another initializer took over {self._path.stem} after more than "
                f"{self._stale_seconds:g} s without a heartbeat. Run again to see its result."
            )

    def acquire(self, timeout_seconds: float) -> None:
        """Create the lease, after its holder has released it or died.

        Raises:
            LeaseTimeout: the lease was held until the timeout expired.
        """
        make_shared_directory(self._path.parent)
        started = time.monotonic()
        logged = -_LOG_INTERVAL_SECONDS
        while not self._create():
            waited = time.monotonic() - started
            holder = read_holder(self._path)
            if holder is None or self._evict(holder):
                continue
            if waited > timeout_seconds:
                raise LeaseTimeout(
                    f"{holder.name} has been publishing {self._path.stem} for {waited:.0f} s. "
                    "Check its progress, or run again."
                )
            if waited - logged >= _LOG_INTERVAL_SECONDS:
                logged = waited
                log.info("waiting for %s, which publishes %s (%.0f s)", holder.name, self._path.stem, waited)
            time.sleep(min(_POLL_SECONDS, self._stale_seconds / 5))
        self._heartbeat.start()

    def release(self) -> None:
        """Delete the lease if it is still held."""
        self._released.set()
        if self._heartbeat.is_alive():
            self._heartbeat.join()
        if self._is_held():
            self._path.unlink(missing_ok=True)

    def _is_held(self) -> bool:
        holder = read_holder(self._path)
        return holder is not None and holder.token == self.token

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _MODE)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as file, contextlib.suppress(PermissionError):
                json.dump({"token": self.token, "name": f"{socket.gethostname()}:{os.getpid()}"}, file)
                # For users of the same group, whatever the umask. Some volumes have fixed modes.
                os.fchmod(descriptor, _MODE)
        except BaseException:
            # A full volume, or a signal: without a token, this lease could never be released.
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _evict(self, holder: Holder) -> bool:
        """Remove the lease of a holder without heartbeat, by the volume's clock and not this machine's."""
        probe = self._path.with_suffix(f".{self.token}.clock")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        if now - holder.last_beat < self._stale_seconds:
            return False
        log.warning(
            "no heartbeat of %s for %.0f s, taking over %s", holder.name, now - holder.last_beat, self._path.stem
        )
        aside = self._path.with_suffix(f".{self.token}.stale")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            evicted = read_holder(aside)
            if evicted is not None and evicted.token != holder.token:
                # Another initializer took over in the meantime: restore its lease.
                aside.rename(self._path)
                return False
            aside.unlink()
        return True

    def _beat(self) -> None:
        while not self._released.wait(self._stale_seconds / 5):
            try:
                if not self._is_held():
                    self._lost.set()
                    return
                os.utime(self._path)
            except OSError as error:
                # A temporary failure of the volume: other initializers decide whether the gap was too long.
                log.debug("heartbeat failed on %s: %s", self._path, error)


def seems_held(path: Path, stale_seconds: float) -> bool:
    """Return whether a live initializer holds a lease, by this machine's clock; read-only."""
    holder = read_holder(path)
    return holder is not None and time.time() - holder.last_beat < stale_seconds


@contextlib.contextmanager
def hold(path: Path, stale_seconds: float, timeout_seconds: float) -> Iterator[Lease]:
    """Hold the lease at `path` within the block; wait for another holder first.

    Raises:
        LeaseTimeout: a live initializer held it for longer than `timeout_seconds`.
    """
    lease = Lease(path, stale_seconds)
    try:
        lease.acquire(timeout_seconds)
        yield lease
    finally:
        lease.release()
