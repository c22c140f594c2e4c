"""The program: argv pairs in, an exit code out. What people see of it, logging and progress, is here."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import TextIO

from storage_initializer.errors import InitializerError, Stopped
from storage_initializer.initializer import Outcome, initialize
from storage_initializer.plan import readable
from storage_initializer.reference import parse
from storage_initializer.settings import Settings, read

log = logging.getLogger("storage_initializer")


def main(words: Sequence[str] | None = None) -> int:
    """Publish every pair in order; stop at the first that fails.

    Returns:
        0 when all is done, 1 when another try may help, 2 when it cannot; then the last line on stderr is the reason.
    """
    try:
        command_line, settings = read(words)
        _configure_logging(settings)
        signal.signal(signal.SIGTERM, _stop)
        # All references are read before the first is fetched: a typing error in the last should not cost hours.
        pairs = [(parse(source), root.absolute()) for source, root in command_line.pairs]
        for reference, root in pairs:
            started = time.monotonic()
            outcome = initialize(reference, root, settings, _Progress(sys.stderr, settings.progress_seconds))
            sys.stdout.write(_summary(outcome, time.monotonic() - started) + "\n")
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail(Stopped("stopped by Ctrl-C: run the same command again to go on"))
    except InitializerError as error:
        log.debug("the cause:", exc_info=True)
        return _fail(error)
    except Exception as error:
        log.debug("the cause:", exc_info=True)
        return _fail(
            InitializerError(
                f"unexpected {type(error).__name__} ({error}): run again with LOG_LEVEL=DEBUG and report it"
            )
        )
    return 0


def _summary(outcome: Outcome, seconds: float) -> str:
    what = f"{outcome.reference.name}@{outcome.place.commit[:12]}"
    size = f"{len(outcome.record.files)} files, {readable(outcome.record.size_bytes)}"
    if outcome.fresh:
        return f"published {what} at {outcome.place.directory}: {size} in {seconds:.1f} s"
    return f"already published {what} at {outcome.place.directory}: {size}, nothing to do ({seconds:.2f} s)"


def _fail(error: InitializerError) -> int:
    """Write the reason as the last line, and bare: KServe copies it into the status of the InferenceService."""
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    return error.exit_code


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped("stopped by SIGTERM: run the same command again to go on")


class _Redacting(logging.Formatter):
    """One line per record, and never a token in it."""

    def __init__(self, secret: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        self._secret = secret

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.exc_info is None:
            text = " ".join(text.split())
        return text.replace(self._secret, "***") if self._secret else text


def _configure_logging(settings: Settings) -> None:
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(_Redacting(settings.hf_token.get_secret_value().strip() if settings.hf_token else ""))
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
    sys.exit(main())
