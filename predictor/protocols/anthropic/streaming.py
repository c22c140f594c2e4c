"""Anthropic's streams: deltas -> server-sent events."""

from typing import Any

from predictor.errors import RequestError
from predictor.protocols.anthropic.requests import DecodedRequest
from predictor.protocols.anthropic.responses import (
    encode_error,
    message,
    stop,
    text_block,
    thinking_block,
    tool_use_block,
    usage,
)
from predictor.protocols.server_sent_events import encode_event
from predictor.types import CompletionDelta, OutputDelta, ReasoningDelta, TextDelta, ToolCallDelta


class EventEncoder:
    """Encoder of one response; each item is a complete event, and none follows the end or an error."""

    def __init__(self, decoded: DecodedRequest) -> None:
        self._decoded = decoded
        self._index = -1
        """Of the last block."""
        self._open: object = None
        """What the open block is: a type of delta, or the index of a tool call; None if no block is open."""
        self._has_begun = False
        self._has_ended = False

    def begin(self) -> list[str]:
        """Return no event: the first one has the number of the prompt's tokens."""
        return []

    def delta(self, delta: CompletionDelta) -> list[str]:
        """Return the events of a delta."""
        if self._has_ended:
            return []
        events = [] if self._has_begun else [self._message_start(delta)]
        self._has_begun = True
        for item in delta.deltas:
            events += self._block_events(item)
        if delta.finish_reason is not None:
            events += self._close_block()
            end = stop(self._decoded, delta)
            events.append(_event("message_delta", delta=end, usage=usage(delta)))
        return events

    def end(self) -> list[str]:
        """Return the last event."""
        if self._has_ended:
            return []
        self._has_ended = True
        return [_event("message_stop")]

    def error(self, error: RequestError) -> list[str]:
        """Return the error, which clients raise; it ends the stream."""
        if self._has_ended:
            return []
        self._has_ended = True
        return [_event("error", **{name: item for name, item in encode_error(error).items() if name != "type"})]

    def _message_start(self, delta: CompletionDelta) -> str:
        end = {"stop_reason": None, "stop_sequence": None}
        start = {**message(self._decoded, []), **end, "usage": {**usage(delta), "output_tokens": 0}}
        return _event("message_start", message=start)

    def _block_events(self, delta: OutputDelta) -> list[str]:
        """Return the events of one delta; it opens a block unless it continues that of the previous delta."""
        match delta:
            case TextDelta(text):
                opened = self._open_block(TextDelta, text_block())
                content = {"type": "text_delta", "text": text}
            case ReasoningDelta(text):
                opened = self._open_block(ReasoningDelta, thinking_block())
                content = {"type": "thinking_delta", "thinking": text}
            case ToolCallDelta(index, arguments, id_, name):
                opened = self._open_block(index, tool_use_block(id_ or "", name or ""))
                content = {"type": "input_json_delta", "partial_json": arguments}
        return [*opened, _event("content_block_delta", index=self._index, delta=content)]

    def _open_block(self, kind: object, block: dict[str, Any]) -> list[str]:
        if self._open == kind:
            return []
        closed = self._close_block()
        self._open = kind
        self._index += 1
        return [*closed, _event("content_block_start", index=self._index, content_block=block)]

    def _close_block(self) -> list[str]:
        if self._open is None:
            return []
        self._open = None
        return [_event("content_block_stop", index=self._index)]


def _event(type_: str, **content: Any) -> str:
    return encode_event({"type": type_, **content}, type_)
