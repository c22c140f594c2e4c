"""How the server writes its log: one line per event on stderr, and what is known of the request it belongs to.

A `RequestRecord` travels with a request through everything that is awaited or spawned as a task on its behalf; whoever
learns something that the request's line should say writes it there. Who asks and what is answered is not known here,
and prompts and completions never get here.
"""

import json
import logging
import logging.config
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from predictor.generation import Ended

CLIENT_GONE = 499
"""Status in log and metrics where the client did not wait for the answer; nginx's number for it."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request, beside method, path, status and duration: for its one log line, and its spans."""

    request_id: str = ""
    key: str | None = None
    """Name of the bearer key."""
    protocol: str | None = None
    operation: str | None = None
    """`chat` or `text_completion`, as OpenTelemetry has it, once that is known; not in the log."""
    trace_id: str | None = None
    """W3C's, 32 hexadecimal digits, where requests are traced."""
    ended: list[Ended] = field(default_factory=list)
    """Every sequence, prompts times n of them, in the order of their ends."""
    error: str | None = None
    """Name of the error's class; its message may repeat what the client sent."""

    def known(self) -> dict[str, Any]:
        """What the log's line says, by name, without the id: tokens over all sequences, the longest times of one."""
        known: dict[str, Any] = {"trace_id": self.trace_id, "key": self.key, "protocol": self.protocol}
        if self.ended:
            known |= {
                "prompt_tokens": sum(each.prompt_tokens for each in self.ended),
                "completion_tokens": sum(each.completion_tokens for each in self.ended),
                "sequences": len(self.ended),
                "finish_reasons": [each.outcome for each in self.ended],
                "queue_seconds": _longest(each.queue_seconds for each in self.ended),
                "first_token_seconds": _longest(each.first_token_seconds for each in self.ended),
            }
        known["error"] = self.error
        return {name: value for name, value in known.items() if value is not None}


def _longest(seconds: Iterable[float | None]) -> float | None:
    """To a tenth of a millisecond."""
    told = [each for each in seconds if each is not None]
    return round(max(told), 4) if told else None


_in_use: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def request_id(sent: Sequence[str]) -> str:
    """The id of a request: what its client sent as `x-request-id`, if that is one and printable anywhere, else new."""
    return sent[0] if len(sent) == 1 and _REQUEST_ID.fullmatch(sent[0]) else uuid.uuid4().hex


def current() -> RequestRecord:
    """The record of the request that is being answered; outside of one, a record that nobody reads."""
    return _in_use.get() or RequestRecord()


@contextmanager
def use(record: RequestRecord) -> Iterator[RequestRecord]:
    """Make `record` the current one, here and in tasks that are started meanwhile; log lines carry its id."""
    token = _in_use.set(record)
    try:
        yield record
    finally:
        _in_use.reset(token)


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
        request_id = current().request_id
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
        if request_id := current().request_id:
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    """UTC in ISO 8601, to the millisecond."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
