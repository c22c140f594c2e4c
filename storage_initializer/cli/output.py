"""What people and log collectors see on stderr: lines, JSON lines or a live bar, and never a secret."""

import datetime
import json
import logging
import sys
import threading
import time
from typing import Any, TextIO

from storage_initializer.settings import Settings, concealed
from storage_initializer.sources.file_selection import readable

_LIVE_SECONDS = 0.1

log = logging.getLogger("storage_initializer")


def configure(settings: Settings) -> None:
    """Let every log line of this program and its libraries go to stderr, in the format of the settings."""
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(_JsonLines() if settings.log_format == "json" else _Lines())
    logging.disable(logging.NOTSET)
    logging.basicConfig(level=settings.log_level, handlers=[output], force=True)
    logging.captureWarnings(True)
    for chatty in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def say(settings: Settings, text: str, **facts: object) -> None:
    """Write a line of the result to stdout; as JSON, it has the facts beside the text."""
    if settings.log_format == "json":
        text = _json("INFO", text, facts)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class _Lines(logging.Formatter):
    """One line per record."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return concealed(text if record.exc_info else " ".join(text.split()))


class _JsonLines(logging.Formatter):
    """One JSON object per line, with the facts that a record carries."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = dict(getattr(record, "facts", {}))
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return concealed(_json(record.levelname, " ".join(record.getMessage().split()), facts))


def _json(level: str, message: str, facts: dict[str, Any]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": now, "level": level, "message": message} | facts)


class Progress:
    """Tells how the work goes: a live bar on a terminal, a line every few seconds in a log."""

    def __init__(self, settings: Settings, verb: str = "fetched") -> None:
        self._verb = verb
        self._output: TextIO = sys.stderr
        self._live = self._output.isatty() and settings.log_format == "text"
        self._interval_seconds = _LIVE_SECONDS if self._live else settings.progress_seconds
        self._lock = threading.Lock()
        self._total_bytes = 0
        self._done_bytes = 0
        self._began = 0.0
        self._told = 0.0

    def begin(self, total_bytes: int) -> None:
        """So many bytes are to come."""
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._began = self._told = time.monotonic()

    def advance(self, size_bytes: int) -> None:
        """So many more are here; from any thread."""
        with self._lock:
            self._done_bytes += size_bytes
            now = time.monotonic()
            if now - self._told >= self._interval_seconds:
                self._told = now
                self._tell(now)

    def end(self) -> None:
        """No more will come."""
        with self._lock:
            self._tell(time.monotonic())
            if self._live:
                self._output.write("\n")

    def _tell(self, now: float) -> None:
        left_bytes = max(0, self._total_bytes - self._done_bytes)
        percent = 100 * self._done_bytes / self._total_bytes if self._total_bytes else 100.0
        rate = self._done_bytes / max(now - self._began, 1e-3)
        eta_seconds = left_bytes / rate if rate > 0 else None
        line = (
            f"{self._verb} {readable(self._done_bytes)} of {readable(self._total_bytes)} "
            f"({percent:.0f} %), {readable(rate)}/s"
        )
        if left_bytes and eta_seconds is not None:
            line += f", {datetime.timedelta(seconds=round(eta_seconds))} left"
        if self._live:
            self._output.write(f"\r{line}\x1b[K")
            self._output.flush()
        else:
            facts = {
                "done_bytes": self._done_bytes,
                "total_bytes": self._total_bytes,
                "bytes_per_second": round(rate),
                "eta_seconds": None if eta_seconds is None else round(eta_seconds),
            }
            log.info("%s", line, extra={"facts": facts})
