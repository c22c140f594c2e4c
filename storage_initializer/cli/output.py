"""Output: log lines, JSON lines or a bar on stderr, results on stdout; secrets are redacted."""

import datetime
import json
import logging
import sys
import threading
import time
from typing import Any, TextIO

from storage_initializer.formatting import format_bytes
from storage_initializer.settings import Settings, redact

log = logging.getLogger("storage_initializer")


def configure(settings: Settings) -> None:
    """Send the log of this program and its libraries to stderr, in the configured format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if settings.log_format == "json" else _TextFormatter())
    logging.disable(logging.NOTSET)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for library in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock"):
        logging.getLogger(library).setLevel(logging.WARNING)


def write_result(settings: Settings, text: str, **fields: object) -> None:
    """Write a result line to stdout; as JSON, it includes the fields."""
    if settings.log_format == "json":
        text = _json("INFO", text, fields)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class _TextFormatter(logging.Formatter):
    """Format records as single lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return redact(text if record.exc_info else " ".join(text.split()))


class _JsonFormatter(logging.Formatter):
    """Format records as JSON objects, with the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return redact(_json(record.levelname, " ".join(record.getMessage().split()), fields))


def _json(level: str, message: str, fields: dict[str, Any]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": now, "level": level, "message": message} | fields)


class Progress:
    """Progress display: a bar on a terminal, a line every few seconds in a log."""

    def __init__(self, settings: Settings, verb: str = "fetched") -> None:
        self._verb = verb
        self._stderr: TextIO = sys.stderr
        self._live = self._stderr.isatty() and settings.log_format == "text"
        self._bar: Any = None
        self._interval_seconds = settings.progress_seconds
        self._lock = threading.Lock()
        self._total_bytes = 0
        self._done_bytes = 0
        self._started = 0.0
        self._displayed = 0.0

    def begin(self, total_bytes: int) -> None:
        """Start with the number of expected bytes."""
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._started = self._displayed = time.monotonic()
        if self._live:
            # Imported for a terminal only, since imports dominate the time to check a published snapshot.
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_bytes,
                desc=self._verb,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                dynamic_ncols=True,
                file=self._stderr,
            )

    def advance(self, size_bytes: int) -> None:
        """Add a number of bytes; thread-safe."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(size_bytes)
                return
            self._done_bytes += size_bytes
            now = time.monotonic()
            if now - self._displayed >= self._interval_seconds:
                self._displayed = now
                self._log(now)

    def end(self) -> None:
        """Display the final state."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            else:
                self._log(time.monotonic())

    def _log(self, now: float) -> None:
        remaining_bytes = max(0, self._total_bytes - self._done_bytes)
        percent = 100 * self._done_bytes / self._total_bytes if self._total_bytes else 100.0
        rate = self._done_bytes / max(now - self._started, 1e-3)
        eta_seconds = remaining_bytes / rate if rate > 0 else None
        line = (
            f"{self._verb} {format_bytes(self._done_bytes)} of {format_bytes(self._total_bytes)} "
            f"({percent:.0f} %), {format_bytes(rate)}/s"
        )
        if remaining_bytes and eta_seconds is not None:
            line += f", {datetime.timedelta(seconds=round(eta_seconds))} left"
        fields = {
            "done_bytes": self._done_bytes,
            "total_bytes": self._total_bytes,
            "bytes_per_second": round(rate),
            "eta_seconds": None if eta_seconds is None else round(eta_seconds),
        }
        log.info("%s", line, extra={"fields": fields})
