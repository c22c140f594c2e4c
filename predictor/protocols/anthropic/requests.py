"""Anthropic's requests: JSON bodies -> generation requests."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from predictor.errors import InvalidRequest
from predictor.protocols.anthropic.schemas import (
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from predictor.protocols.field_validators import reasoning_fields
from predictor.protocols.json_body import json_schema
from predictor.protocols.json_object import validate_body
from predictor.protocols.structured_output_fields import json_schema_output
from predictor.types import Chat, GenerationRequest, Message

MESSAGES_SCHEMA = json_schema(MessagesRequest)
COUNT_TOKENS_SCHEMA = json_schema(CountTokensRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedRequest:
    """The generation request of a body, and the options of its response."""

    request: GenerationRequest
    id: str
    model: str
    stream: bool
    stop_sequences: tuple[str, ...]
    """The client's."""


def decode_messages(body: bytes) -> DecodedRequest:
    """Decode a request for a message.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong or not supported; the message names it.
    """
    content = validate_body(MessagesRequest, body)
    if content.num_candidates() > 1:
        raise InvalidRequest("best_of: only one message is generated. Use /v1/chat/completions.", "best_of")
    sampling = content.to_sampling_params()
    formats = [output.schema_ for output in (content.output_config.format, content.output_format) if output]
    if formats:
        if len(formats) > 1 or sampling.structured_output:
            raise InvalidRequest("Only one structured output is possible. Send output_config.format only.")
        sampling = replace(sampling, structured_output=json_schema_output(formats[0]))
    stop = tuple(dict.fromkeys(sampling.stop + tuple(string for string in content.stop_sequences if string)))
    return DecodedRequest(
        request=GenerationRequest(_chat(content), replace(sampling, stop=stop), parse_output=True),
        id=f"msg_{uuid.uuid4().hex}",
        model=content.model,
        stream=content.stream,
        stop_sequences=stop,
    )


def decode_count_tokens(body: bytes) -> tuple[str, Chat]:
    """Decode a request to count the tokens of a prompt: the model's name, and the chat.

    Raises:
        InvalidRequest: as `decode_messages`.
    """
    content = validate_body(CountTokensRequest, body)
    return content.model, _chat(content)


def _chat(content: CountTokensRequest) -> Chat:
    last = content.messages[-1]
    prefilled = last.role == "assistant"
    if prefilled and not all(isinstance(block, TextBlock) for block in last.content):
        raise InvalidRequest("messages: the last one has no text to continue. End with role user.", "messages")
    return Chat(
        tuple(_messages(content)),
        _tools(content),
        strict_tools=frozenset(tool.name for tool in content.tools if tool.strict),
        variables=content.chat_template_kwargs,
        requires_tool_call=content.tool_choice.type in ("any", "tool"),
        parallel_tool_calls=not content.tool_choice.disable_parallel_tool_use,
        reasoning_effort=_reasoning_effort(content),
        continue_final_message=prefilled,
    )


def _tools(content: CountTokensRequest) -> tuple[dict[str, Any], ...]:
    """Return the tools that the model may call, in OpenAI's form, which chat templates read."""
    choice = content.tool_choice
    names = [tool.name for tool in content.tools]
    if choice.type == "tool" and choice.name not in names:
        raise InvalidRequest(f"tool_choice.name: {choice.name!r} is none of the tools. Name one of them.")
    if choice.type == "any" and not names:
        raise InvalidRequest("tool_choice: there are no tools to call. Send tools.", "tool_choice")
    offered = {"none": [], "tool": [choice.name]}.get(choice.type, names)
    return tuple(
        {
            "type": "function",
            "function": {
                "name": tool.name,
                **({} if tool.description is None else {"description": tool.description}),
                "parameters": tool.input_schema,
            },
        }
        for tool in content.tools
        if tool.name in offered
    )


def _reasoning_effort(content: CountTokensRequest) -> str | None:
    if content.thinking is not None and content.thinking.type == "disabled":
        return "none"
    return content.output_config.effort or (None if content.thinking is None else "medium")


def _messages(content: CountTokensRequest) -> Iterator[Message]:
    if content.system:
        yield {"role": "system", "content": _text(content.system)}
    for message in content.messages:
        yield from [_assistant(message)] if message.role == "assistant" else _input(message)


def _input(message: InputMessage) -> Iterator[Message]:
    """Yield one message for each result of a tool, and one for all text of a user or of instructions."""
    for block in message.content:
        if isinstance(block, ToolResultBlock) and message.role == "user":
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
        elif not isinstance(block, TextBlock):
            raise InvalidRequest(f"messages: {block.type} is not allowed for role {message.role}.", "messages")
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    if texts or not message.content:
        yield {"role": message.role, "content": _text(texts)}


def _assistant(message: InputMessage) -> Message:
    blocks = message.content
    if any(isinstance(block, ToolResultBlock) for block in blocks):
        raise InvalidRequest("messages: tool_result is not allowed for role assistant.", "messages")
    reasoning = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    return {
        "role": "assistant",
        "content": _text([block for block in blocks if isinstance(block, TextBlock)]),
        **(reasoning_fields(reasoning) if reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _text(blocks: Sequence[TextBlock]) -> str:
    return "".join(block.text for block in blocks)
