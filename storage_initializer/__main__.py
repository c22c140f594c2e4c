"""The program: argv pairs in, an exit code out. What people see of it, logging and progress, is here."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn, TextIO

from storage_initializer.errors import InitializerError, Stopped
from storage_initializer.initializer import Outcome, initialize
from storage_initializer.plan import readable
from storage_initializer.reference import parse
from storage_initializer.settings import Settings, concealed, read

_PATIENCE_SECONDS = 2.0
"""How long the way out may take before one more signal cuts it short; as a rule it takes half a second."""

log = logging.getLogger("storage_initializer")


def main(words: Sequence[str] | None = None) -> int:
    """Publish every pair in order; stop at the first that fails.

    Returns:
        0 when all is done, 1 when another try may help, 2 when it cannot; then the last line on stderr is the reason.
    """
    signals = _Signals()
    try:
        signals.listen()
        error = _run(words)
        signals.leave()
    except _Signalled as signalled:
        error = Stopped(str(signalled))
    return _fail(error) if error else 0


def _run(words: Sequence[str] | None) -> InitializerError | None:
    """All of it, but signals; the failure is a value, so that a signal may come while it is told."""
    try:
        command_line, settings = read(words)
        _configure_logging(settings)
        # All references are read before the first is fetched: a typing error in the last should not cost hours.
        pairs = [(parse(source), root.absolute()) for source, root in command_line.pairs]
        for reference, root in pairs:
            started = time.monotonic()
            # Whatever a library prints belongs to the log: stdout is for the summaries.
            with contextlib.redirect_stdout(sys.stderr):
                outcome = initialize(reference, root, settings, _Progress(sys.stderr, settings.progress_seconds))
            sys.stdout.write(_summary(outcome, time.monotonic() - started) + "\n")
            sys.stdout.flush()
    except InitializerError as error:
        log.debug("the cause:", exc_info=True)
        return error
    except Exception as error:
        log.debug("the cause:", exc_info=True)
        return InitializerError(
            f"unexpected {type(error).__name__} ({error}): run again with LOG_LEVEL=DEBUG and report it"
        )
    return None


def _summary(outcome: Outcome, seconds: float) -> str:
    what = f"{outcome.reference.name}@{outcome.place.commit[:12]}"
    size = f"{len(outcome.record.files)} files, {readable(outcome.record.size_bytes)}"
    if outcome.fresh:
        return f"published {what} at {outcome.place.directory}: {size} in {seconds:.1f} s"
    return f"already published {what} at {outcome.place.directory}: {size}, nothing to do ({seconds:.2f} s)"


def _fail(error: InitializerError) -> int:
    """Write the reason as the last line, and bare: KServe copies it into the status of the InferenceService."""
    # Threads that were left behind may still want to tell something, and this is the last line.
    logging.disable()
    sys.stderr.write(f"{concealed(str(error))}\n")
    sys.stderr.flush()
    return error.exit_code


def _leave(exit_code: int) -> NoReturn:
    """End the program at once, with whatever threads still wait for the network.

    Not by `sys.exit`: the interpreter would wait for those that libraries have started, for as long as a Hub likes to
    keep them. Files need no farewell: what matters was brought to the disk, and the lease is free, before `main` ends.
    """
    for output in (sys.stdout, sys.stderr):
        # Nobody may be listening any more.
        with contextlib.suppress(OSError, ValueError):
            output.flush()
    os._exit(exit_code)


class _Signalled(BaseException):
    """SIGTERM or Ctrl-C, as one sentence. Not an `Exception`: no `except Exception` on its way may swallow it."""


class _Signals:
    """The first SIGTERM or Ctrl-C raises `_Signalled`, in the main thread, and so frees the lease on its way out.

    That takes about half a second, and later signals (`timeout` sends two at once) must not disturb it. Where it takes
    longer, since the volume hangs, one more signal ends the program without: the lease will be found stale.
    """

    def __init__(self) -> None:
        self._left: float | None = None
        self._reason = ""

    def listen(self) -> None:
        """From now on. Ctrl-C stays ignored where the shell has said so."""
        signal.signal(signal.SIGTERM, self._hear)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._hear)

    def leave(self) -> None:
        """The outcome stands: no signal changes it any more."""
        self._left = time.monotonic()

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._left is None:
            self.leave()
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            self._reason = f"stopped by {name}: run the same command again to go on"
            raise _Signalled(self._reason)
        if self._reason and time.monotonic() - self._left > _PATIENCE_SECONDS:
            # Past sys.stderr, whose lock the interrupted code may hold.
            with contextlib.suppress(OSError):
                os.write(2, f"{self._reason}\n".encode())
            os._exit(Stopped.exit_code)


class _Redacting(logging.Formatter):
    """One line per record, and never a secret in it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return concealed(text if record.exc_info else " ".join(text.split()))


def _configure_logging(settings: Settings) -> None:
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(_Redacting())
    logging.disable(logging.NOTSET)
    logging.basicConfig(level=settings.log_level, handlers=[output], force=True)
    logging.captureWarnings(True)
    for chatty in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class _Progress:
    """Tells how the fetching goes: a live bar on a terminal, a line every few seconds in a log."""

    def __init__(self, output: TextIO, interval_seconds: float) -> None:
        self._output = output
        self._live = output.isatty()
        self._interval_seconds = 0.1 if self._live else interval_seconds
        self._lock = threading.Lock()
        self._total_bytes = 0
        self._done_bytes = 0
        self._began = 0.0
        self._told = 0.0

    def begin(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._began = self._told = time.monotonic()

    def advance(self, size_bytes: int) -> None:
        with self._lock:
            self._done_bytes += size_bytes
            now = time.monotonic()
            if now - self._told >= self._interval_seconds:
                self._told = now
                self._tell(now)

    def end(self) -> None:
        with self._lock:
            self._tell(time.monotonic())
            if self._live:
                self._output.write("\n")

    def _tell(self, now: float) -> None:
        percent = 100 * self._done_bytes / self._total_bytes if self._total_bytes else 100.0
        rate = self._done_bytes / max(now - self._began, 1e-3)
        line = (
            f"fetched {readable(self._done_bytes)} of {readable(self._total_bytes)} "
            f"({percent:.0f} %), {readable(rate)}/s"
        )
        if self._live:
            self._output.write(f"\r{line}\x1b[K")
            self._output.flush()
        else:
            log.info("%s", line)


if __name__ == "__main__":
    _leave(main())
