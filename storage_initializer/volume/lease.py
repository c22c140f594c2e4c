"""Leases: of many initializers on one volume, one at a time publishes a snapshot. Knows nothing of snapshots.

Nothing here relies on flock, which network file systems are known to accept and ignore. A lease is a file that only
one can create; its holder touches it, and whoever finds it untouched for too long, by the volume's own clock, takes
over. A holder that was taken for dead by mistake does no harm: whoever takes over renames the staging directory, so the
old holder loses it, and a rename onto a published snapshot fails.
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
from dataclasses import dataclass
from pathlib import Path

from storage_initializer.errors import LeaseLost, LeaseTimeout

_POLL_SECONDS = 0.5
_STILL_WAITING_SECONDS = 10.0

log = logging.getLogger(__name__)


class Lease:
    """The right to stage and publish one snapshot, held as long as the heartbeat goes on."""

    def __init__(self, path: Path, stale_seconds: float) -> None:
        self.token = secrets.token_hex(8)
        self._path = path
        self._stale_seconds = stale_seconds
        self._lost = threading.Event()
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def check(self) -> None:
        """Raise unless the lease is still held; cheap, for every chunk and before every step that matters.

        Raises:
            LeaseLost: another initializer has taken over.
        """
        if self._lost.is_set():
            raise LeaseLost(
                f"another initializer took over {self._path.stem}, since this one was silent for more than "
                f"{self._stale_seconds:g} s: run again to see its result"
            )

    def acquire(self, timeout_seconds: float) -> None:
        """Wait until nobody holds the lease, or its holder is dead.

        Raises:
            LeaseTimeout: somebody alive held it for all that time.
        """
        started = time.monotonic()
        told = -_STILL_WAITING_SECONDS
        while not self._create():
            waited = time.monotonic() - started
            holder = self._holder()
            if holder is None or self._evict(holder):
                continue
            if waited > timeout_seconds:
                raise LeaseTimeout(
                    f"{holder.name} has been publishing {self._path.stem} for {waited:.0f} s: "
                    "look why it takes so long, or run again"
                )
            if waited - told >= _STILL_WAITING_SECONDS:
                told = waited
                log.info("waiting for %s, which publishes %s (%.0f s)", holder.name, self._path.stem, waited)
            time.sleep(min(_POLL_SECONDS, self._stale_seconds / 5))
        self._heart.start()

    def release(self) -> None:
        """Let the next one in; harmless when the lease is lost, or was never had."""
        self._released.set()
        if self._heart.is_alive():
            self._heart.join()
        holder = self._holder()
        if holder is not None and holder.token == self.token:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o664)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as file, contextlib.suppress(PermissionError):
                json.dump({"token": self.token, "name": f"{socket.gethostname()}:{os.getpid()}"}, file)
                # For users of the same group, whatever the umask says; some volumes have fixed modes.
                os.fchmod(descriptor, 0o664)
        except BaseException:
            # A full volume, or a signal: nobody would recognise this lease as ours.
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _holder(self) -> "_Holder | None":
        return _holder(self._path)

    def _evict(self, holder: "_Holder") -> bool:
        """Remove the lease of a holder without heartbeat; the volume's clock decides, not this machine's."""
        probe = self._path.with_suffix(f".{self.token}.clock")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        if now - holder.beat < self._stale_seconds:
            return False
        log.warning("%s is silent for %.0f s: taking over %s", holder.name, now - holder.beat, self._path.stem)
        aside = self._path.with_suffix(f".{self.token}.stale")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            evicted = _holder(aside)
            if evicted is not None and evicted.token != holder.token:
                # Somebody else took over in between: this lease is alive, and goes back.
                aside.rename(self._path)
                return False
            aside.unlink()
        return True

    def _beat(self) -> None:
        while not self._released.wait(self._stale_seconds / 5):
            try:
                holder = self._holder()
                if holder is None or holder.token != self.token:
                    self._lost.set()
                    return
                os.utime(self._path)
            except OSError as error:
                # The volume hiccups: whether the beat was missed for too long is for the others to judge.
                log.debug("no heartbeat on %s: %s", self._path, error)


@dataclass(frozen=True, slots=True)
class _Holder:
    """Who holds a lease; `beat` is the mtime of the file, in the volume's seconds since the epoch."""

    token: str
    name: str
    beat: float


def _holder(path: Path) -> _Holder | None:
    """Read a lease. Opening the file makes network file systems fetch its attributes anew."""
    try:
        with path.open() as file:
            beat = os.fstat(file.fileno()).st_mtime
            fields = json.load(file)
        return _Holder(fields["token"], fields["name"], beat)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        # Created a moment ago and not written yet, or its author died in between.
        return _Holder("", "an initializer", beat)


def seems_held(path: Path, stale_seconds: float) -> bool:
    """Whether somebody alive holds a lease, by this machine's clock: for looking, since it touches nothing."""
    holder = _holder(path)
    return holder is not None and time.time() - holder.beat < stale_seconds


@contextlib.contextmanager
def hold(path: Path, stale_seconds: float, timeout_seconds: float) -> Iterator[Lease]:
    """Hold the lease at `path`; wait for it first, if somebody else does.

    Raises:
        LeaseTimeout: somebody alive held it for longer than `timeout_seconds`.
    """
    held = Lease(path, stale_seconds)
    try:
        held.acquire(timeout_seconds)
        yield held
    finally:
        held.release()
