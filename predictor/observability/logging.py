"""Logging to stderr: one line per event, as text or JSON, with the id of the request that it belongs to."""

import json
import logging
import logging.config
from datetime import UTC, datetime
from typing import Literal

from predictor.observability import request_record


def configure(level: str, format: Literal["text", "json"]) -> None:  # noqa: A002, the setting's name
    """Write all log lines and Python warnings to stderr, including those of KServe and uvicorn.

    Args:
        level: minimum level.
        format: `text`, or `json` with one object per line: `time`, `level`, `logger`, `message`, and where they exist
            `request_id`, `exception` and the fields of a request's line.
    """
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"text": {"()": TextFormatter}, "json": {"()": JsonFormatter}},
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


class TextFormatter(logging.Formatter):
    """Formats `time level logger [request id]: message`, followed by the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, except for a traceback."""
        request_id = request_record.current().request_id
        origin = f"{record.name} [{request_id}]" if request_id else record.name
        line = f"{_time(record)} {record.levelname} {origin}: {record.getMessage()}"
        # A message with line breaks must not look like several events.
        line = line.replace("\r", "\\r").replace("\n", "\\n")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
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
        if request_id := request_record.current().request_id:
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    """Return the UTC time in ISO 8601, in milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
