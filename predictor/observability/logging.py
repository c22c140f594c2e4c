"""Logging to stderr: one line per event, as text or JSON, with the id of the request that it belongs to."""

import json
import logging
import logging.config
from datetime import UTC, datetime
from typing import Literal

from predictor.observability import request_record


def configure(level: str, format: Literal["text", "json"], rank: int | None = None) -> None:  # noqa: A002, a setting
    """Write all log lines and Python warnings to stderr, including those of KServe and uvicorn.

    Args:
        level: minimum level.
        format: `text`, or `json` with one object per line: `time`, `level`, `logger`, `message`, and where they exist
            `request_id`, `exception` and the fields of a request's line.
        rank: of a follower of a tensor-parallel model, which each of its lines names; None: no follower.
    """
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "text": {"()": TextFormatter, "rank": rank},
                "json": {"()": JsonFormatter, "rank": rank},
            },
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": format, "stream": "ext://sys.stderr"}
            },
            "root": {"handlers": ["stderr"], "level": level},
            "loggers": {
                # KServe installs its own configuration unless this logger has a handler.
                "kserve": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
                # The line of `RequestLogMiddleware` has more information than these two.
                "kserve.trace": {"level": "CRITICAL", "propagate": False},
                "uvicorn.access": {"level": "CRITICAL", "propagate": False},
                "httpx": {"level": "WARNING"},
                # Silence warnings about malformed client headers and export retries; keep dropped-span errors.
                "opentelemetry.trace": {"level": "ERROR"},
                "opentelemetry.exporter": {"level": "ERROR"},
                "ContinuousBatchingLogger": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
            },
        }
    )
    logging.captureWarnings(True)


class _RankFormatter(logging.Formatter):
    """Formatter of a follower's lines, or of others, whose `rank` is None."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self.rank = rank


class TextFormatter(_RankFormatter):
    """Formats `time level logger [request id]: message`, followed by the traceback if there is one.

    Instead of a request id, the lines of followers have `[rank N]`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, except for a traceback."""
        request_id = request_record.current().request_id
        subject = request_id if self.rank is None else f"rank {self.rank}"
        origin = f"{record.name} [{subject}]" if subject else record.name
        line = f"{_time(record)} {record.levelname} {origin}: {record.getMessage()}"
        # A message with line breaks must not look like several events.
        line = line.replace("\r", "\\r").replace("\n", "\\n")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(_RankFormatter):
    """Formats one ASCII JSON object per line; `extra={"fields": …}` adds keys."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as one line."""
        line = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if self.rank is not None:
            line["rank"] = self.rank
        if request_id := request_record.current().request_id:
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    """Return the UTC time in ISO 8601, in milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
