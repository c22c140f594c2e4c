"""Requests of the Responses API: JSON bodies -> generation requests."""

import sys
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from predictor.errors import InvalidRequest
from predictor.protocols.field_validators import reasoning_fields
from predictor.protocols.json_body import json_schema
from predictor.protocols.json_object import validate_body
from predictor.protocols.openai_responses.schemas import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    MessageItem,
    ReasoningItem,
    ResponseRequest,
)
from predictor.types import Chat, GenerationRequest

RESPONSE_SCHEMA = json_schema(ResponseRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedRequest:
    """A generation request, and the options of its response."""

    request: GenerationRequest
    stream: bool
    model: str
    logprobs: bool
    """Whether those of the message's tokens are reported."""
    head: dict[str, Any]
    """Fields of the response object that are known before the output."""


def decode(body: bytes) -> DecodedRequest:
    """Decode a request.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong or not supported; the message names it.
    """
    content = validate_body(ResponseRequest, body)
    limits = {content.max_tokens, content.max_output_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequest("max_tokens: differs from max_output_tokens. Omit it.", "max_tokens")
    max_tokens = next(iter(limits), None)
    logprobs = bool(content.top_logprobs) or "message.output_text.logprobs" in content.include
    candidates = content.num_candidates()
    if content.stream and candidates > 1:
        raise InvalidRequest("best_of: not possible in a stream, since all candidates are compared.", "best_of")
    sampling = content.to_sampling_params(content.top_logprobs if logprobs else None)
    request = GenerationRequest(_chat(content), replace(sampling, max_tokens=max_tokens), candidates, parse_output=True)
    return DecodedRequest(
        request=request,
        stream=content.stream,
        model=content.model,
        logprobs=logprobs,
        head=_head(content, max_tokens),
    )


def decode_input(body: bytes) -> tuple[str, Chat]:
    """Decode a request to count the tokens of its input: the model's name, and the chat.

    Raises:
        InvalidRequest: as `decode`.
    """
    content = validate_body(ResponseRequest, body)
    return content.model, _chat(content)


def _chat(content: ResponseRequest) -> Chat:
    instructions = [{"role": "system", "content": content.instructions}] if content.instructions else []
    return Chat(
        (*instructions, *_messages(content.input)),
        variables=content.chat_template_kwargs,
        reasoning_effort=content.reasoning.effort or None,
        **content.tool_fields(),
    )


def _messages(items: Iterable[InputItem]) -> list[dict[str, Any]]:
    """Return the messages for the chat template; consecutive items of the assistant are one message."""
    messages: list[dict[str, Any]] = []
    call_ids: set[str] = set()
    for position, item in enumerate(items):
        match item:
            case MessageItem(role="assistant"):
                _add_text(messages, _text(item.content))
            case MessageItem():
                messages.append({"role": item.role, "content": _text(item.content)})
            case ReasoningItem():
                _add_reasoning(messages, _text(item.content) or _text(item.summary, "\n\n"))
            case FunctionCallItem():
                call_ids.add(item.call_id)
                _add_call(messages, item)
            case FunctionCallOutputItem():
                if item.call_id not in call_ids:
                    field = f"input.{position}.call_id"
                    raise InvalidRequest(f"{field}: no function_call with this id comes before. Send it, too.", field)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    return messages


def _text(parts: Iterable[Any], separator: str = "") -> str:
    return separator.join(part.text for part in parts)


def _assistant(messages: list[dict[str, Any]], *without: str) -> dict[str, Any]:
    """Return the assistant's message at the end, or a new one if there is none, or none without these fields."""
    if not messages or messages[-1]["role"] != "assistant" or any(messages[-1].get(name) for name in without):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _add_reasoning(messages: list[dict[str, Any]], text: str) -> None:
    if text:
        message = _assistant(messages, "content", "tool_calls")
        text = message.get("reasoning_content", "") + text
        message |= reasoning_fields(text)


def _add_text(messages: list[dict[str, Any]], text: str) -> None:
    """Add the text of a message; it may stand between calls, but two messages in succession are two answers."""
    last_has_calls = bool(messages) and bool(messages[-1].get("tool_calls"))
    message = _assistant(messages) if last_has_calls else _assistant(messages, "content")
    message["content"] += text


def _add_call(messages: list[dict[str, Any]], item: FunctionCallItem) -> None:
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    _assistant(messages).setdefault("tool_calls", []).append(call)


def _head(content: ResponseRequest, max_tokens: int | None) -> dict[str, Any]:
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "background": False,
        "instructions": content.instructions,
        "max_output_tokens": None if max_tokens == sys.maxsize else max_tokens,
        "max_tool_calls": content.max_tool_calls,
        "metadata": content.metadata,
        "model": content.model,
        "parallel_tool_calls": content.parallel_tool_calls,
        "previous_response_id": None,
        "prompt_cache_key": content.prompt_cache_key,
        "reasoning": {"effort": content.reasoning.effort or None, "summary": None},
        "safety_identifier": content.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": content.temperature,
        "text": {"format": content.text.format.to_json(), "verbosity": content.text.verbosity},
        "tool_choice": content.tool_choice.to_json(),
        "tools": [tool.to_json() for tool in content.tools],
        "top_logprobs": content.top_logprobs,
        "top_p": content.top_p,
        "truncation": "disabled",
        "user": content.user,
    }
