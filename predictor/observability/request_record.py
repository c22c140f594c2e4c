"""The record of the current request: source of its log line, its spans and the request id of other log lines."""

import logging
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from predictor.types import Caller, FinishedSequence

request_logger = logging.getLogger("predictor.request")

CLIENT_GONE = 499
"""Status in log and metrics if the client disconnected before the response; nginx's number."""

IGNORED_FIELDS_HEADER = "x-ignored-fields"
"""Response header, or gRPC trailing metadata, that names the unknown fields of the request."""
MAX_IGNORED_FIELDS = 16
MAX_FIELD_LENGTH = 64

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
"""Characters of a client that are not for log lines and headers."""


@dataclass(slots=True)
class RequestRecord:
    """Properties of a request in addition to method, path, status and duration; never the prompt or completion."""

    request_id: str = ""
    protocol: str | None = None
    operation: str | None = None
    """OpenTelemetry's `chat` or `text_completion`; not logged."""
    trace_id: str | None = None
    """W3C trace id, 32 hexadecimal digits, if the request is traced."""
    finished: list[FinishedSequence] = field(default_factory=list)
    """All sequences, prompts times n, in the order in which they ended."""
    error: str | None = None
    """Name of the exception class; its message may contain client data."""
    ignored_fields: list[str] = field(default_factory=list)
    """Paths of unknown fields, safe for headers; "..." at the end stands for further ones."""
    caller: Caller | None = None
    """Owner of the API key; the log has the name only."""

    @property
    def key(self) -> str | None:
        """Name of the API key."""
        return self.caller.name if self.caller else None

    def add_ignored_fields(self, paths: Iterable[str]) -> None:
        """Record unknown fields of the request, up to MAX_IGNORED_FIELDS."""
        for path in paths:
            if len(self.ignored_fields) >= MAX_IGNORED_FIELDS:
                self.ignored_fields[MAX_IGNORED_FIELDS:] = ["..."]
                return
            self.ignored_fields.append(_UNSAFE.sub("?", path[:MAX_FIELD_LENGTH]))

    def as_fields(self) -> dict[str, Any]:
        """Return the fields of the log line: tokens are sums over all sequences, times are maxima."""
        fields: dict[str, Any] = {"trace_id": self.trace_id, "key": self.key, "protocol": self.protocol}
        if self.finished:
            fields |= {
                "prompt_tokens": sum(sequence.prompt_tokens for sequence in self.finished),
                "completion_tokens": sum(sequence.completion_tokens for sequence in self.finished),
                "sequences": len(self.finished),
                "finish_reasons": [sequence.outcome for sequence in self.finished],
                "queue_seconds": _max_seconds(sequence.queue_seconds for sequence in self.finished),
                "first_token_seconds": _max_seconds(sequence.first_token_seconds for sequence in self.finished),
            }
        fields |= {"ignored_fields": self.ignored_fields or None, "error": self.error}
        return {name: value for name, value in fields.items() if value is not None}


def _max_seconds(values: Iterable[float | None]) -> float | None:
    """Return the maximum, rounded to 0.1 ms."""
    longest = max((value for value in values if value is not None), default=None)
    return None if longest is None else round(longest, 4)


_current_record: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def request_id(headers: Sequence[str]) -> str:
    """Return the client's `x-request-id` if there is exactly one and it is printable, else a new id."""
    return headers[0] if len(headers) == 1 and _REQUEST_ID.fullmatch(headers[0]) else uuid.uuid4().hex


def current() -> RequestRecord:
    """Return the record of the current request; outside of a request, a new one that is discarded."""
    return _current_record.get() or RequestRecord()


@contextmanager
def bind(record: RequestRecord) -> Iterator[RequestRecord]:
    """Make `record` the current one, here and in tasks created meanwhile; log lines have its request id."""
    token = _current_record.set(record)
    try:
        yield record
    finally:
        _current_record.reset(token)


def log_request(summary: str, record: RequestRecord, fields: Mapping[str, Any], **details: Any) -> None:
    """Write a request's log line: the summary, then `details` and the record's fields as `name=value`.

    `fields` are the summary's values by name, for the JSON format.
    """
    details |= record.as_fields()
    text = " ".join(
        f"{name}={','.join(value) if isinstance(value, list) else value}" for name, value in details.items()
    )
    request_logger.info("%s %s", summary, text, extra={"fields": {**fields, **details}})
