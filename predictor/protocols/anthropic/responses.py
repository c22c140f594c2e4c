"""Anthropic's whole responses and errors, and the objects that they share with the events of streams."""

import json
from contextlib import suppress
from typing import Any

from predictor.errors import RequestError
from predictor.observability import request_record
from predictor.protocols.anthropic.requests import DecodedRequest
from predictor.types import Completion, CompletionDelta, FinishReason, ToolCall

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def encode(decoded: DecodedRequest, completion: Completion) -> dict[str, Any]:
    """Return the whole message."""
    content: list[dict[str, Any]] = []
    if completion.reasoning:
        content.append({**thinking_block(), "thinking": completion.reasoning})
    if completion.text:
        content.append({**text_block(), "text": completion.text})
    content += [{**tool_use_block(call.id, call.name), "input": _input(call)} for call in completion.tool_calls]
    return {**message(decoded, content), **stop(decoded, completion), "usage": usage(completion)}


def encode_error(error: RequestError) -> dict[str, Any]:
    """Return Anthropic's error object."""
    type_ = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    content = {"type": type_, "message": str(error)}
    return {"type": "error", "error": content, "request_id": request_record.current().request_id}


def message(decoded: DecodedRequest, content: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a message without its end and its usage."""
    return {"id": decoded.id, "type": "message", "role": "assistant", "model": decoded.model, "content": content}


def stop(decoded: DecodedRequest, completion: Completion | CompletionDelta) -> dict[str, str | None]:
    """Return the reason of a message's end, and the client's stop sequence if it was the reason."""
    sequence = completion.stop if completion.stop in decoded.stop_sequences else None
    reasons = {FinishReason.LENGTH: "max_tokens", FinishReason.TOOL_CALLS: "tool_use"}
    default = "end_turn" if sequence is None else "stop_sequence"
    reason = default if completion.finish_reason is None else reasons.get(completion.finish_reason, default)
    return {"stop_reason": reason, "stop_sequence": sequence if reason == "stop_sequence" else None}


def usage(completion: Completion | CompletionDelta) -> dict[str, Any]:
    """Return the token counts so far."""
    counts: dict[str, Any] = {
        "input_tokens": completion.prompt_tokens,
        "output_tokens": completion.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
    if completion.reasoning_tokens:
        counts["output_tokens_details"] = {"thinking_tokens": completion.reasoning_tokens}
    return counts


def text_block() -> dict[str, Any]:
    """Return a block without text."""
    return {"type": "text", "text": "", "citations": None}


def thinking_block() -> dict[str, Any]:
    """Return a block without reasoning; clients send it back with its signature, which says nothing here."""
    return {"type": "thinking", "thinking": "", "signature": ""}


def tool_use_block(id_: str, name: str) -> dict[str, Any]:
    """Return a call without its input."""
    return {"type": "tool_use", "id": id_, "name": name, "input": {}}


def _input(call: ToolCall) -> dict[str, Any]:
    """Return the arguments of a call; {} if they are not an object, since they were cut off by max_tokens."""
    with suppress(ValueError):
        arguments = json.loads(call.arguments)
        if isinstance(arguments, dict):
            return arguments
    return {}
