"""What is known of the request that is being answered, for its log line and its spans."""

import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from predictor.types import FinishedSequence

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
    finished: list[FinishedSequence] = field(default_factory=list)
    """Every sequence, prompts times n of them, in the order of their ends."""
    error: str | None = None
    """Name of the error's class; its message may repeat what the client sent."""

    def as_fields(self) -> dict[str, Any]:
        """What the log's line says, by name, without the id: tokens over all sequences, the longest times of one."""
        known: dict[str, Any] = {"trace_id": self.trace_id, "key": self.key, "protocol": self.protocol}
        if self.finished:
            known |= {
                "prompt_tokens": sum(each.prompt_tokens for each in self.finished),
                "completion_tokens": sum(each.completion_tokens for each in self.finished),
                "sequences": len(self.finished),
                "finish_reasons": [each.outcome for each in self.finished],
                "queue_seconds": _longest(each.queue_seconds for each in self.finished),
                "first_token_seconds": _longest(each.first_token_seconds for each in self.finished),
            }
        known["error"] = self.error
        return {name: value for name, value in known.items() if value is not None}


def _longest(seconds: Iterable[float | None]) -> float | None:
    """To a tenth of a millisecond."""
    told = [each for each in seconds if each is not None]
    return round(max(told), 4) if told else None


_current_record: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def request_id(sent: Sequence[str]) -> str:
    """The id of a request: what its client sent as `x-request-id`, if that is one and printable anywhere, else new."""
    return sent[0] if len(sent) == 1 and _REQUEST_ID.fullmatch(sent[0]) else uuid.uuid4().hex


def current() -> RequestRecord:
    """The record of the request that is being answered; outside of one, a record that nobody reads."""
    return _current_record.get() or RequestRecord()


@contextmanager
def bind(record: RequestRecord) -> Iterator[RequestRecord]:
    """Make `record` the current one, here and in tasks that are started meanwhile; log lines carry its id."""
    token = _current_record.set(record)
    try:
        yield record
    finally:
        _current_record.reset(token)
