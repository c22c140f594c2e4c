"""Streams of the Responses API: deltas -> typed events."""

from typing import Any, TypeVar

from predictor.errors import InvalidRequest, Overloaded, RequestError
from predictor.protocols.openai_responses.items import (
    Event,
    FunctionCall,
    Item,
    Message,
    Reasoning,
    Status,
    find,
    text_tokens,
)
from predictor.protocols.openai_responses.requests import DecodedRequest
from predictor.protocols.openai_responses.responses import ended, response
from predictor.protocols.server_sent_events import encode_event
from predictor.types import CompletionDelta, FinishReason, OutputDelta, ReasoningDelta, TextDelta, Token, ToolCallDelta

ItemT = TypeVar("ItemT", Message, Reasoning)


class EventEncoder:
    """Encoder of one response; each item is a complete server-sent event, and none follows the last one."""

    def __init__(self, decoded: DecodedRequest) -> None:
        self._decoded = decoded
        self._sequence_number = 0
        self._output: list[dict[str, Any]] = []
        """Items that are complete."""
        self._item: Item | None = None
        """The item in progress."""
        self._tokens: list[Token] = []
        """Tokens to report whose text is held back."""
        self._has_ended = False

    def begin(self) -> list[str]:
        """Return the events before generation, with the response object."""
        started = response(self._decoded, "in_progress")
        return [self._event(f"response.{name}", response=started) for name in ("created", "in_progress")]

    def delta(self, delta: CompletionDelta) -> list[str]:
        """Return the events of a delta; of the last one, those that end the response, too."""
        if self._has_ended:
            return []
        tokens = text_tokens(delta.tokens) if self._decoded.logprobs else []
        self._tokens += tokens
        events = []
        for addition in delta.deltas:
            events += self._add(addition)
            if isinstance(addition, ReasoningDelta):
                # The step may have tokens of the message, too.
                self._tokens = list(tokens)
        return events if delta.finish_reason is None else [*events, *self._complete(delta)]

    def end(self) -> list[str]:
        """Return the events after the last delta: none."""
        return []

    def error(self, error: RequestError) -> list[str]:
        """Return the error, and the response object with the output so far."""
        if self._has_ended:
            return []
        self._has_ended = True
        content = {"code": _error_code(error), "message": str(error)}
        events = self._finish("incomplete")
        failed = response(self._decoded, "failed", output=self._output, error=content)
        return [*events, self._event("error", **content, param=None), self._event("response.failed", response=failed)]

    def _complete(self, last: CompletionDelta) -> list[str]:
        self._has_ended = True
        is_cut = last.finish_reason is FinishReason.LENGTH
        events = []
        if not (is_cut or self._has_answer()):
            events += self._start(Message())
        events += self._finish("incomplete" if is_cut else "completed")
        whole = ended(self._decoded, self._output, last)
        return [*events, self._event(f"response.{whole['status']}", response=whole)]

    def _has_answer(self) -> bool:
        """Return whether there is a message or a call."""
        return isinstance(self._item, Message | FunctionCall) or any(
            item["type"] != "reasoning" for item in self._output
        )

    def _add(self, delta: OutputDelta) -> list[str]:
        match delta:
            case TextDelta(text):
                return self._add_text(text)
            case ReasoningDelta(text):
                events, reasoning = self._continue(Reasoning)
                return [*events, *self._item_events(reasoning.add(text))]
            case ToolCallDelta(_, arguments, id_, name):
                events = [] if id_ is None or name is None else self._start(FunctionCall(id_, name))
                if arguments and isinstance(self._item, FunctionCall):
                    events += self._item_events(self._item.add(arguments))
                return events

    def _add_text(self, text: str) -> list[str]:
        events, message = self._continue(Message)
        # Before the first text there may be tokens of markers.
        start = (find(self._tokens, text) or 0) if events else 0
        tokens, self._tokens = self._tokens[start:], []
        return [*events, *self._item_events(message.add(text, tokens))]

    def _continue(self, kind: type[ItemT]) -> tuple[list[str], ItemT]:
        """Return the item in progress if it is of this kind, else a new one and the events of its beginning."""
        if isinstance(self._item, kind):
            return [], self._item
        item = kind()
        return self._start(item), item

    def _start(self, item: Item) -> list[str]:
        """Complete the item in progress, and begin the next one."""
        finished = self._finish("completed")
        self._item = item
        added = ("response.output_item.added", {"item": item.to_json("in_progress")})
        return [*finished, self._output_event(*added), *self._item_events(item.begin())]

    def _finish(self, status: Status) -> list[str]:
        """Complete the item in progress, if there is one."""
        if self._item is None:
            return []
        item = self._item.to_json(status)
        events = [*self._item_events(self._item.end()), self._output_event("response.output_item.done", {"item": item})]
        self._output.append(item)
        self._item = None
        return events

    def _item_events(self, events: list[Event]) -> list[str]:
        item_id = self._item.id if self._item else ""
        return [self._output_event(type_, {"item_id": item_id, **fields}) for type_, fields in events]

    def _output_event(self, type_: str, fields: dict[str, Any]) -> str:
        return self._event(type_, output_index=len(self._output), **fields)

    def _event(self, type_: str, **fields: Any) -> str:
        content = {"type": type_, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return encode_event(content, type_)


def _error_code(error: RequestError) -> str:
    """Return one of the codes that the API has for failed responses."""
    if isinstance(error, Overloaded):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, InvalidRequest) else "server_error"
