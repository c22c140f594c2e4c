"""Anthropic's whole responses, errors and events, checked with the types of its client."""

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from predictor import errors
from predictor.errors import RequestError
from predictor.protocols.anthropic import requests, responses
from predictor.protocols.anthropic.requests import DecodedRequest
from predictor.protocols.anthropic.streaming import EventEncoder
from predictor.types import (
    Completion,
    CompletionDelta,
    FinishReason,
    OutputDelta,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
)

COUNTS = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def decoded() -> DecodedRequest:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], "stop_sequences": ["x"]}
    return requests.decode_messages(json.dumps(body).encode())


def test_encode_reasoning_text_and_calls_are_blocks() -> None:
    completion = Completion(
        "I add.",
        finish_reason=FinishReason.TOOL_CALLS,
        prompt_tokens=3,
        completion_tokens=7,
        reasoning="Hm.",
        reasoning_tokens=2,
        tool_calls=(ToolCall("t1", "add", '{"a": 1}'), ToolCall("t2", "add", '{"a"')),
    )
    request = decoded()
    response = responses.encode(request, completion)
    Message.model_validate(response)
    assert response == {
        "id": request.id,
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "text", "text": "I add.", "citations": None},
            {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
            {"type": "tool_use", "id": "t2", "name": "add", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 7, **COUNTS, "output_tokens_details": {"thinking_tokens": 2}},
    }


@pytest.mark.parametrize(
    ("reason", "found", "expected"),
    [
        (FinishReason.EOS_TOKEN, None, ("end_turn", None)),
        (FinishReason.LENGTH, None, ("max_tokens", None)),
        (FinishReason.STOP_SEQUENCE, "x", ("stop_sequence", "x")),
        # The model's own stop strings are ends of its turn.
        (FinishReason.STOP_SEQUENCE, "</s>", ("end_turn", None)),
        (FinishReason.TOOL_CALLS, "x", ("tool_use", None)),
    ],
)
def test_stop_reason_is_anthropics(reason: FinishReason, found: str | None, expected: tuple[str, str | None]) -> None:
    completion = Completion("a", finish_reason=reason, prompt_tokens=1, completion_tokens=1, stop=found)
    response = responses.encode(decoded(), completion)
    assert (response["stop_reason"], response["stop_sequence"]) == expected


@pytest.mark.parametrize(
    ("error", "type_"),
    [
        (errors.InvalidRequest("a"), "invalid_request_error"),
        (errors.Unauthorized("a"), "authentication_error"),
        (errors.NotFound("a"), "not_found_error"),
        (errors.BodyTooLarge("a"), "request_too_large"),
        (errors.Overloaded("a"), "rate_limit_error"),
        (errors.GenerationFailed("a"), "api_error"),
        (errors.Draining("a"), "overloaded_error"),
        (errors.DeadlineExceeded("a"), "timeout_error"),
    ],
)
def test_encode_error_has_anthropics_type(error: RequestError, type_: str) -> None:
    content = responses.encode_error(error)
    assert (content["type"], content["error"]) == ("error", {"type": type_, "message": "a"})


def delta(*deltas: OutputDelta, finish_reason: FinishReason | None = None) -> CompletionDelta:
    return CompletionDelta(index=0, deltas=deltas, prompt_tokens=3, completion_tokens=7, finish_reason=finish_reason)


def parsed(events: list[str]) -> list[dict[str, Any]]:
    contents = []
    for event in events:
        name, data = event.removesuffix("\n\n").split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        contents.append(content)
    return contents


def test_stream_has_each_block_between_its_start_and_stop() -> None:
    encoder = EventEncoder(decoded())
    events = parsed(
        [
            *encoder.begin(),
            *encoder.delta(delta(ReasoningDelta("H"))),
            *encoder.delta(delta(ReasoningDelta("m."), TextDelta("I"))),
            *encoder.delta(delta(ToolCallDelta(0, id="t1", name="add"), ToolCallDelta(0, '{"a"'))),
            *encoder.delta(delta(ToolCallDelta(0, ": 1}"), ToolCallDelta(1, id="t2", name="sub"))),
            *encoder.delta(delta(finish_reason=FinishReason.TOOL_CALLS)),
            *encoder.end(),
            *encoder.end(),
        ]
    )
    for event in events:
        STREAM_EVENT.validate_python(event)
    assert [(event["type"], event.get("index")) for event in events] == [
        ("message_start", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_delta", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("content_block_start", 3),
        ("content_block_delta", 3),
        ("content_block_stop", 3),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert events[0]["message"]["usage"] == {"input_tokens": 3, "output_tokens": 0, **COUNTS}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 7


def test_stream_ends_with_an_error() -> None:
    encoder = EventEncoder(decoded())
    encoder.delta(delta(TextDelta("a")))
    [event] = parsed(encoder.error(errors.GenerationFailed("It failed.")))
    assert (event["type"], event["error"]) == ("error", {"type": "api_error", "message": "It failed."})
    assert encoder.delta(delta(TextDelta("b"))) == encoder.end() == encoder.error(errors.Draining("c")) == []
