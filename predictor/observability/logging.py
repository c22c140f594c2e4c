"""How the server writes its log: one line per event on stderr, and what is known of the request it belongs to.

A `RequestRecord` travels with a request through everything that is awaited or spawned as a task on its behalf; whoever
learns something that the request's line should say writes it there. Who asks and what is answered is not known here,
and prompts and completions never get here.
"""

import json
import logging
import logging.config
from datetime import UTC, datetime
from typing import Literal

from predictor.observability import request_record


def configure(level: str, format: Literal["text", "json"]) -> None:  # noqa: A002, what the setting is called
    """Write all log lines and Python warnings to stderr, ours, KServe's and uvicorn's alike.

    Args:
        level: the least severe level that is written.
        format: `text` for people; `json` for one object per line with `time`, `level`, `logger`, `message`,
            `request_id` and `exception` where there is one, and, for a request's line, its fields.
    """
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"text": {"()": _Text}, "json": {"()": _Json}},
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": format, "stream": "ext://sys.stderr"}
            },
            "root": {"handlers": ["stderr"], "level": level},
            "loggers": {
                # A handler of its own keeps the SDK from installing its configuration.
                "kserve": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
                # Our line for each request says more than these two.
                "kserve.trace": {"level": "CRITICAL", "propagate": False},
                "uvicorn.access": {"level": "CRITICAL", "propagate": False},
                "httpx": {"level": "WARNING"},
                # The first says what clients send wrongly, the second that it tries again: what is lost is an error.
                "opentelemetry.trace": {"level": "ERROR"},
                "opentelemetry.exporter": {"level": "ERROR"},
                "ContinuousBatchingLogger": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
            },
        }
    )
    logging.captureWarnings(True)


class _Text(logging.Formatter):
    """`time level logger [request id]: message`, and a traceback below it where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = request_record.current().request_id
        origin = f"{record.name} [{request_id}]" if request_id else record.name
        line = f"{_time(record)} {record.levelname} {origin}: {record.getMessage()}"
        # A message that spans lines, or was made to, must not look like several events.
        line = line.replace("\r", "\\r").replace("\n", "\\n")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    """One object per line, in ASCII; a line's own fields come from `extra={"fields": …}`."""

    def format(self, record: logging.LogRecord) -> str:
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
    """UTC in ISO 8601, to the millisecond."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
