"""Anthropic's requests."""

import json
from typing import Any

import pytest

from predictor.errors import InvalidRequest
from predictor.protocols.anthropic import requests
from predictor.protocols.anthropic.requests import DecodedRequest
from predictor.types import Chat, GrammarKind, Message, StructuredOutput

USER = {"role": "user", "content": "Hi"}
TOOL = {"name": "add", "description": "Add.", "input_schema": {"type": "object"}}
IMAGE = {"type": "image", "source": {"type": "url", "url": "u"}}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "a"}
USE = {"type": "tool_use", "id": "i", "name": "n"}


def decode(**fields: Any) -> DecodedRequest:
    body = {"model": "m", "max_tokens": 9, "messages": [USER]} | fields
    return requests.decode_messages(json.dumps(body).encode())


def chat_of(**fields: Any) -> Chat:
    prompt = decode(**fields).request.prompt
    assert isinstance(prompt, Chat)
    return prompt


def messages_of(*messages: dict[str, Any], **fields: Any) -> list[Message]:
    return list(chat_of(messages=[*messages], **fields).messages)


def test_decode_returns_sampling_and_options() -> None:
    decoded = decode(stop_sequences=["x", "y"], temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, stream=True)
    sampling = decoded.request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (9, 0.5, 4, 0.9)
    assert (sampling.min_p, sampling.stop, decoded.stop_sequences) == (0.1, ("x", "y"), ("x", "y"))
    assert decoded.stream
    assert decoded.request.parse_output
    assert decoded.id.startswith("msg_")


@pytest.mark.parametrize("texts", [["Be brief."], ["Be ", "brief."]])
def test_system_of_either_form_is_the_first_message(texts: list[str]) -> None:
    blocks = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in texts]
    expected = [{"role": "system", "content": "Be brief."}, USER]
    assert messages_of(USER, system=blocks) == messages_of(USER, system="Be brief.") == expected


def test_conversation_with_tools_becomes_template_messages() -> None:
    called = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "text", "text": "I add."},
        {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "t2", "name": "add", "input": {}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "3"},
        {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "4"}], "is_error": True},
        {"type": "text", "text": "And now?"},
    ]
    first = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    second = {"id": "t2", "type": "function", "function": {"name": "add", "arguments": {}}}
    assert messages_of(USER, {"role": "assistant", "content": called}, {"role": "user", "content": results}) == [
        USER,
        {
            "role": "assistant",
            "content": "I add.",
            "reasoning_content": "Hm.",
            "reasoning": "Hm.",
            "tool_calls": [first, second],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "3"},
        {"role": "tool", "tool_call_id": "t2", "content": "4"},
        {"role": "user", "content": "And now?"},
    ]


def test_last_message_of_the_assistant_is_continued() -> None:
    assert chat_of(messages=[USER, {"role": "assistant", "content": "The"}]).continue_final_message
    assert not chat_of().continue_final_message


def test_instructions_between_messages_keep_their_place() -> None:
    instructions = {"role": "system", "content": "Be brief."}
    assert messages_of(USER, instructions, USER) == [USER, instructions, USER]


ADD = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
SUB = {"type": "function", "function": {"name": "sub", "parameters": {}}}


@pytest.mark.parametrize(
    ("choice", "offered", "required"),
    [
        (None, (ADD, SUB), False),
        ({"type": "auto"}, (ADD, SUB), False),
        ({"type": "any"}, (ADD, SUB), True),
        ({"type": "tool", "name": "sub"}, (SUB,), True),
        ({"type": "none"}, (), False),
    ],
)
def test_tool_choice_selects_tools(choice: Any, offered: tuple[Any, ...], required: bool) -> None:
    sub = {"type": "custom", "name": "sub", "input_schema": {}, "strict": True}
    chat = chat_of(tools=[TOOL, sub], tool_choice=choice)
    assert (chat.tools, chat.requires_tool_call, chat.parallel_tool_calls) == (offered, required, True)
    assert chat.strict_tools == {"sub"}


def test_parallel_tool_use_can_be_disabled() -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert not chat_of(tools=[TOOL], tool_choice=choice).parallel_tool_calls


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "medium"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, "high"),
    ],
)
def test_thinking_sets_the_reasoning_effort(fields: Any, effort: str | None) -> None:
    assert chat_of(**fields).reasoning_effort == effort


@pytest.mark.parametrize("field", ["output_format", "output_config"])
def test_output_format_is_a_structured_output(field: str) -> None:
    output = {"type": "json_schema", "schema": {"type": "object"}}
    decoded = decode(**{field: output if field == "output_format" else {"format": output}})
    assert decoded.request.sampling.structured_output == StructuredOutput(GrammarKind.JSON_SCHEMA, '{"type": "object"}')


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0: expected a block of type text"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]}, "messages: thinking"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}, USER]}, "messages: tool_result"),
        ({"messages": [{"role": "assistant", "content": [USE]}]}, "End with role user"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: "),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name: 'x' is none of the tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
        ({"mcp_servers": [{}]}, "mcp_servers: not supported"),
        ({"output_format": {"type": "json_schema", "schema": {}}, "structured_outputs": {"regex": "a"}}, "Only one"),
        ({"best_of": 2}, "best_of: only one message is generated"),
    ],
)
def test_decode_unsupported_request_raises_naming_the_field(fields: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        decode(**fields)
