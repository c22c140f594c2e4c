"""OpenAI's streams: deltas -> server-sent events with ChatCompletionChunk or Completion objects."""

import json
from collections import defaultdict
from typing import Any

from predictor.errors import RequestError
from predictor.protocols.openai.requests import DecodedRequest
from predictor.protocols.openai.responses import (
    choice,
    encode_error,
    reasoning_fields,
    reported_tokens,
    response_head,
    text_offsets,
    usage,
)
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
        role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": index, **role}]) for index in range(self._decoded.n)]

    def delta(self, delta: CompletionDelta) -> list[str]:
        """Return the event of a delta, if it has content, tokens to report or a finish reason."""
        if self._has_ended:
            return []
        self._prompt_tokens[delta.index // self._decoded.n] = delta.prompt_tokens
        self._completion_tokens[delta.index] = delta.completion_tokens
        self._reasoning_tokens[delta.index] = delta.reasoning_tokens
        tokens = reported_tokens(self._decoded, delta) if self._decoded.logprobs is not None else []
        if not (delta.deltas or tokens or delta.finish_reason):
            return []
        text_offset = self._text_offsets[delta.index]
        self._text_offsets[delta.index] = text_offsets(tokens, delta.text, text_offset)[-1]
        if self._decoded.is_chat:
            # One delta in each chunk: some clients read one field of a chunk only.
            *earlier, message = [*map(_chat_delta, delta.deltas)] or [{}]
            if tokens and not earlier:
                message.setdefault("content", "")
            unfinished = {"index": delta.index, "logprobs": None, "finish_reason": None}
            chunks = [self._chunk([{**unfinished, "delta": item}]) for item in earlier]
            output: dict[str, Any] = {"delta": message}
        else:
            chunks, output = [], {"text": delta.text}
        last = choice(self._decoded, delta, output, index=delta.index, text_offset=text_offset)
        return [*chunks, self._chunk([last])]

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
        return [_event(encode_error(error))]

    def _chunk(self, choices: list[dict[str, Any]], total: dict[str, Any] | None = None) -> str:
        chunk = {**response_head(self._decoded, "chat.completion.chunk"), "choices": choices}
        return _event({**chunk, "usage": total} if self._decoded.include_usage else chunk)


def _chat_delta(delta: OutputDelta) -> dict[str, Any]:
    """Return the `delta` of a chat's choice."""
    match delta:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return reasoning_fields(text)
        case ToolCallDelta(index, arguments, id_, name):
            call: dict[str, Any] = {"index": index, "function": {"arguments": arguments}}
            if id_ is not None:
                call |= {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
            return {"tool_calls": [call]}


def _event(content: dict[str, Any]) -> str:
    # ASCII only: some clients also treat Unicode's line separators as ends of lines.
    return f"data: {json.dumps(content, allow_nan=False, separators=(',', ':'))}\n\n"
