"""OpenAI's streams: deltas -> server-sent events with ChatCompletionChunk or Completion objects."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from predictor.errors import RequestError
from predictor.protocols.field_validators import reasoning_fields
from predictor.protocols.openai.requests import DecodedRequest
from predictor.protocols.openai.responses import (
    choice,
    encode_error,
    finish_reason,
    reported_tokens,
    response_head,
    text_offsets,
    usage,
)
from predictor.protocols.server_sent_events import encode_event
from predictor.types import CompletionDelta, OutputDelta, ReasoningDelta, TextDelta, ToolCallDelta


class EventEncoder:
    """Encoder of one response; each item is a complete event, and none follows the end or an error."""

    def __init__(self, decoded: DecodedRequest) -> None:
        self._decoded = decoded
        self._prompt_tokens: dict[int, int] = {}
        self._completion_tokens: dict[int, int] = {}
        self._reasoning_tokens: dict[int, int] = {}
        self._text_offsets: defaultdict[int, int] = defaultdict(int)
        self._has_ended = False

    def begin(self) -> list[str]:
        """Return the events before generation: the role in each choice of a chat."""
        if not self._decoded.is_chat:
            return []
        # A client that gets "" adds an empty text to the calls that follow.
        content = None if self._decoded.has_tools else ""
        role = {"delta": {"role": "assistant", "content": content}, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": index, **role}]) for index in range(self._decoded.n)]

    def delta(self, delta: CompletionDelta) -> list[str]:
        """Return the events of a delta, if it has content, tokens to report or a finish reason."""
        if self._has_ended:
            return []
        self._prompt_tokens[delta.index // self._decoded.n] = delta.prompt_tokens
        self._completion_tokens[delta.index] = delta.completion_tokens
        self._reasoning_tokens[delta.index] = delta.reasoning_tokens
        tokens = reported_tokens(self._decoded, delta) if self._decoded.logprobs is not None else []
        if not (delta.deltas or tokens or delta.finish_reason):
            return []
        if self._decoded.is_chat:
            return [self._chunk([item]) for item in self._chat_choices(delta, has_tokens=bool(tokens))]
        text_offset = self._text_offsets[delta.index]
        self._text_offsets[delta.index] = text_offsets(tokens, delta.text, text_offset)[-1]
        output = {"text": delta.text}
        return [self._chunk([choice(self._decoded, delta, output, index=delta.index, text_offset=text_offset)])]

    def _chat_choices(self, delta: CompletionDelta, *, has_tokens: bool) -> Iterator[dict[str, Any]]:
        """Yield the choices of one chunk each: some clients read only one field of a chunk, or the finish reason."""
        messages = [_chat_delta(item, functions=self._decoded.uses_functions) for item in delta.deltas]
        if has_tokens and not messages:
            messages = [{"content": ""}]
        unfinished = {"index": delta.index, "logprobs": None, "finish_reason": None}
        for message in messages[:-1]:
            yield {**unfinished, "delta": message}
        for message in messages[-1:]:
            yield choice(self._decoded, replace(delta, finish_reason=None), {"delta": message}, index=delta.index)
        if delta.finish_reason is not None:
            yield {**unfinished, "delta": {}, "finish_reason": finish_reason(self._decoded, delta)}

    def end(self) -> list[str]:
        """Return the usage, if requested, and the end marker."""
        if self._has_ended:
            return []
        self._has_ended = True
        total = usage(self._prompt_tokens.values(), self._completion_tokens.values(), self._reasoning_tokens.values())
        return [*([self._chunk([], total)] if self._decoded.include_usage else []), "data: [DONE]\n\n"]

    def error(self, error: RequestError) -> list[str]:
        """Return the error object, which clients raise; it ends the stream without the marker."""
        if self._has_ended:
            return []
        self._has_ended = True
        return [encode_event(encode_error(error))]

    def _chunk(self, choices: list[dict[str, Any]], total: dict[str, Any] | None = None) -> str:
        chunk = {**response_head(self._decoded, "chat.completion.chunk"), "choices": choices}
        return encode_event({**chunk, "usage": total} if self._decoded.include_usage else chunk)


def _chat_delta(delta: OutputDelta, *, functions: bool) -> dict[str, Any]:
    """Return the `delta` of a chat's choice; calls are those of deprecated `functions` or of tools."""
    match delta:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return reasoning_fields(text)
        case ToolCallDelta(index, arguments, id_, name):
            function = {"arguments": arguments} if id_ is None else {"name": name, "arguments": arguments}
            if functions:
                return {"function_call": function}
            head = {} if id_ is None else {"id": id_, "type": "function"}
            return {"tool_calls": [{"index": index, **head, "function": function}]}
