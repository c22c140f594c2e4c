"""Items of a response's output: reasoning, message and function calls, whole and as events of a stream."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol

from predictor.types import UNFINISHED_CHARACTER, Token

Status = Literal["in_progress", "completed", "incomplete"]
Event = tuple[str, dict[str, Any]]
"""Type and fields of an event of one item."""
_FIRST_PART = {"content_index": 0}
"""Messages and reasoning have one part."""


class Item(Protocol):
    """An item that grows."""

    id: str

    def begin(self) -> list[Event]:
        """Return the events after that of the empty item."""

    def end(self) -> list[Event]:
        """Return the events before that of the complete item."""

    def to_json(self, status: Status) -> dict[str, Any]:
        """Return the item; one in progress is empty."""


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


@dataclass(slots=True)
class Message:
    """The text of the response."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    """Those to report."""
    id: str = field(default_factory=lambda: _id("msg"))

    def begin(self) -> list[Event]:  # noqa: D102
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [("response.content_part.added", {**_FIRST_PART, "part": part})]

    def add(self, text: str, tokens: Sequence[Token]) -> list[Event]:
        """Add text and its tokens; return the event."""
        self.text += text
        self.tokens += tokens
        logprobs = [_logprob(token) for token in tokens]
        return [("response.output_text.delta", {**_FIRST_PART, "delta": text, "logprobs": logprobs})]

    def end(self) -> list[Event]:  # noqa: D102
        logprobs = [_logprob(token) for token in self.tokens]
        return [
            ("response.output_text.done", {**_FIRST_PART, "text": self.text, "logprobs": logprobs}),
            ("response.content_part.done", {**_FIRST_PART, "part": self._part()}),
        ]

    def to_json(self, status: Status) -> dict[str, Any]:  # noqa: D102
        content = [] if status == "in_progress" else [self._part()]
        return {"type": "message", "id": self.id, "status": status, "role": "assistant", "content": content}

    def _part(self) -> dict[str, Any]:
        logprobs = [_logprob_with_bytes(token) for token in self.tokens]
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": logprobs}


@dataclass(slots=True)
class Reasoning:
    """The reasoning before a message or a call. It is given as it is, not as a summary."""

    text: str = ""
    id: str = field(default_factory=lambda: _id("rs"))

    def begin(self) -> list[Event]:  # noqa: D102
        return [("response.content_part.added", {**_FIRST_PART, "part": {"type": "reasoning_text", "text": ""}})]

    def add(self, text: str) -> list[Event]:
        """Add text; return the event."""
        self.text += text
        return [("response.reasoning_text.delta", {**_FIRST_PART, "delta": text})]

    def end(self) -> list[Event]:  # noqa: D102
        return [
            ("response.reasoning_text.done", {**_FIRST_PART, "text": self.text}),
            ("response.content_part.done", {**_FIRST_PART, "part": self._part()}),
        ]

    def to_json(self, status: Status) -> dict[str, Any]:  # noqa: D102
        content = [] if status == "in_progress" else [self._part()]
        return {"type": "reasoning", "id": self.id, "status": status, "summary": [], "content": content}

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}


@dataclass(slots=True)
class FunctionCall:
    """A call of one of the tools."""

    call_id: str
    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: _id("fc"))

    def begin(self) -> list[Event]:  # noqa: D102
        return []

    def add(self, arguments: str) -> list[Event]:
        """Add a part of the arguments; return the event."""
        self.arguments += arguments
        return [("response.function_call_arguments.delta", {"delta": arguments})]

    def end(self) -> list[Event]:  # noqa: D102
        return [("response.function_call_arguments.done", {"name": self.name, "arguments": self.arguments})]

    def to_json(self, status: Status) -> dict[str, Any]:  # noqa: D102
        return {
            "type": "function_call",
            "id": self.id,
            "status": status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "" if status == "in_progress" else self.arguments,
        }


def text_tokens(tokens: Iterable[Token]) -> list[Token]:
    """Return all but special tokens, which OpenAI's API does not report."""
    return [token for token in tokens if not token.special]


def find(tokens: Sequence[Token], text: str, skip: int = 0) -> int | None:
    """Return the position of the token with which `text` begins; None if there is none.

    Args:
        tokens: text tokens of reasoning, markers, and at least the beginning of `text`, or of `text` and more.
        text: of the message so far.
        skip: least number of characters before it.
    """
    whole = "".join(token.text for token in tokens)
    offsets = accumulate((len(token.text) for token in tokens), initial=0)
    for position, offset in zip(range(len(tokens)), offsets, strict=False):
        is_part = len(whole) - offset < len(text)
        if offset >= skip and (text.startswith(whole[offset:]) if is_part else whole.startswith(text, offset)):
            return position
    return None


def _logprob(token: Token) -> dict[str, Any]:
    top = [{"token": alternative.text, "logprob": alternative.logprob} for alternative in token.top]
    return {"token": token.text, "logprob": token.logprob, "top_logprobs": top}


def _logprob_with_bytes(token: Token) -> dict[str, Any]:
    return {**_token(token), "top_logprobs": [_token(alternative) for alternative in token.top]}


def _token(token: Token) -> Mapping[str, Any]:
    # Part of a character has no bytes here: only their text is known.
    octets = [] if UNFINISHED_CHARACTER in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": token.logprob, "bytes": octets}
