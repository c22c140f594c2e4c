"""OpenAI's streams: deltas -> server-sent events with ChatCompletionChunk or Completion objects."""

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from predictor.errors import RequestError
from predictor.protocols.openai.requests import DecodedRequest
from predictor.protocols.openai.responses import choice, encode_error, response_head, text_tokens, usage
from predictor.types import CompletionDelta, TextDelta


class EventEncoder:
    """Encoder of one response; each item is a complete event, and none follows the end or an error."""

    def __init__(self, decoded: DecodedRequest) -> None:
        self._decoded = decoded
        self._prompt_tokens: dict[int, int] = {}
        self._completion_tokens: dict[int, int] = {}
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
        tokens = text_tokens(delta.tokens) if self._decoded.logprobs else []
        if not (delta.deltas or tokens or delta.finish_reason):
            return []
        text_offset = self._text_offsets[delta.index]
        self._text_offsets[delta.index] += sum(len(token.text) for token in tokens)
        if self._decoded.is_chat:
            message = _chat_delta(delta.deltas)
            if tokens:
                message.setdefault("content", "")
            output: dict[str, Any] = {"delta": message}
        else:
            output = {"text": delta.text}
        return [self._chunk([choice(self._decoded, delta, output, index=delta.index, text_offset=text_offset)])]

    def end(self) -> list[str]:
        """Return the usage, if requested, and the end marker."""
        if self._has_ended:
            return []
        self._has_ended = True
        total = usage(self._prompt_tokens.values(), self._completion_tokens.values())
        return [*([self._chunk([], total)] if self._decoded.include_usage else []), "data: [DONE]\n\n"]

    def error(self, error: RequestError) -> list[str]:
        """Return the error object, which clients raise; it ends the stream without the marker."""
        if self._has_ended:
            return []
        self._has_ended = True
        return [_event(encode_error(error))]

    def _chunk(self, choices: list[dict[str, Any]], total: dict[str, int] | None = None) -> str:
        chunk = {**response_head(self._decoded, "chat.completion.chunk"), "choices": choices}
        return _event({**chunk, "usage": total} if self._decoded.include_usage else chunk)


def _chat_delta(deltas: Iterable[TextDelta]) -> dict[str, Any]:
    """Return the `delta` of a chat's choice; each type of delta fills its own field."""
    message: dict[str, Any] = {}
    for delta in deltas:
        match delta:
            case TextDelta(text):
                message["content"] = message.get("content", "") + text
    return message


def _event(content: dict[str, Any]) -> str:
    # ASCII only: some clients also treat Unicode's line separators as ends of lines.
    return f"data: {json.dumps(content, allow_nan=False, separators=(',', ':'))}\n\n"
