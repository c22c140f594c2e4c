"""Streams as server-sent events."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import openai as client_package
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as CompletionObject
from openai.types.chat import ChatCompletionChunk

from predictor import errors
from predictor.errors import NotFound
from predictor.protocols.openai.requests import DecodedRequest
from predictor.protocols.openai.streaming import EventEncoder
from predictor.types import (
    MIN_LOGPROB,
    CompletionDelta,
    FinishReason,
    ToolCallDelta,
)
from tests.predictor.protocols.deltas import delta
from tests.predictor.protocols.openai.helpers import (
    TOKENS,
    Json,
    assert_conforms,
    both_apis,
    chat,
    client,
    completions,
    token,
)


def chunks(events: Iterable[str]) -> list[Any]:
    """The content of events, each of which is whole and one line."""
    contents = []
    for event in events:
        assert event.startswith("data: ")
        assert event.endswith("\n\n")
        assert len(event.splitlines()) == 2
        contents.append("[DONE]" if event == "data: [DONE]\n\n" else json.loads(event.removeprefix("data: ")))
    return contents


def check(decoded: DecodedRequest, chunk: Json) -> None:
    if decoded.is_chat:
        assert_conforms(ChatCompletionChunk, chunk)
        return
    # The client's type is that of a whole response, whose finish reason is never null.
    ended = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
    assert_conforms(CompletionObject, chunk | {"choices": ended})


def streamed(decoded: DecodedRequest, deltas: list[CompletionDelta]) -> list[Any]:
    stream = EventEncoder(decoded)
    events = [*stream.begin(), *(event for added in deltas for event in stream.delta(added)), *stream.end()]
    assert stream.end() == stream.delta(deltas[-1]) == stream.error(NotFound("late")) == []
    contents = chunks(events)
    assert contents.pop() == "[DONE]"
    for chunk in contents:
        check(decoded, chunk)
        assert (chunk["id"], chunk["created"], chunk["model"]) == (decoded.id, decoded.created, "m")
    return contents


DELTAS = [
    delta(0, "Hé", 3, 1, tokens=TOKENS[:1]),
    delta(1, "", 3, 1),
    delta(0, "", 3, 2, tokens=TOKENS[1:2]),
    delta(1, "Ho\u2028", 3, 2, FinishReason.LENGTH),
    delta(0, "llo", 3, 3, FinishReason.EOS_TOKEN, tokens=TOKENS[2:]),
]


def test_stream_of_a_chat_begins_with_the_role() -> None:
    choices = [chunk["choices"] for chunk in streamed(chat(stream=True, n=2), DELTAS)]
    assert all(len(of_chunk) == 1 for of_chunk in choices)
    assert [(choice["index"], choice["delta"], choice["finish_reason"]) for (choice,) in choices] == [
        (0, {"role": "assistant", "content": ""}, None),
        (1, {"role": "assistant", "content": ""}, None),
        (0, {"content": "Hé"}, None),
        (1, {"content": "Ho\u2028"}, None),
        (1, {}, "length"),
        (0, {"content": "llo"}, None),
        (0, {}, "stop"),
    ]


def test_stream_of_several_prompts_has_their_indices() -> None:
    chunks_ = streamed(completions(stream=True, prompt=["a", "b"]), DELTAS)
    assert [(c["index"], c["text"], c["finish_reason"]) for chunk in chunks_ for c in chunk["choices"]] == [
        (0, "Hé", None),
        (1, "Ho\u2028", "length"),
        (0, "llo", "stop"),
    ]


def test_stream_end_without_text_has_an_empty_delta() -> None:
    last = streamed(chat(stream=True), [delta(0, "", 3, 1, FinishReason.EOS_TOKEN)])[-1]
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


CALLS = CompletionDelta(
    index=0,
    deltas=(
        ToolCallDelta(0, id="call_1", name="weather"),
        ToolCallDelta(0, '{"city": '),
        ToolCallDelta(0, '"Ulm"}'),
        ToolCallDelta(1, id="call_2", name="now"),
        ToolCallDelta(1, "{}"),
    ),
    prompt_tokens=3,
    completion_tokens=9,
    finish_reason=FinishReason.TOOL_CALLS,
)
TOOL = {"type": "function", "function": {"name": "weather"}}


def test_stream_of_tool_calls_names_each_first_and_ends_with_an_empty_delta() -> None:
    choices = [choice for chunk in streamed(chat(stream=True, tools=[TOOL]), [CALLS]) for choice in chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices] == [None] * 6 + ["tool_calls"]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": None},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": _function("", "weather")}]},
        {"tool_calls": [{"index": 0, "function": _function('{"city": ')}]},
        {"tool_calls": [{"index": 0, "function": _function('"Ulm"}')}]},
        {"tool_calls": [{"index": 1, "id": "call_2", "type": "function", "function": _function("", "now")}]},
        {"tool_calls": [{"index": 1, "function": _function("{}")}]},
        {},
    ]


def _function(arguments: str, name: str | None = None) -> Json:
    return {"arguments": arguments} | ({} if name is None else {"name": name})


def test_stream_of_deprecated_functions_has_their_call() -> None:
    decoded = chat(stream=True, functions=[{"name": "weather"}])
    added = replace(CALLS, deltas=CALLS.deltas[:3])
    choices = [choice for chunk in streamed(decoded, [added]) for choice in chunk["choices"]]
    assert [choice["delta"] for choice in choices[1:]] == [
        {"function_call": _function("", "weather")},
        {"function_call": _function('{"city": ')},
        {"function_call": _function('"Ulm"}')},
        {},
    ]
    assert choices[-1]["finish_reason"] == "function_call"


@both_apis
def test_stream_without_include_usage_has_no_usage(decode_fields: Callable[..., DecodedRequest]) -> None:
    assert not any("usage" in chunk for chunk in streamed(decode_fields(stream=True, n=2), DELTAS))


@pytest.mark.parametrize(
    ("decoded", "prompt_tokens"),
    [
        (chat(stream=True, stream_options={"include_usage": True}, n=2), 3),
        (completions(stream=True, stream_options={"include_usage": True}, prompt=["a", "b"]), 6),
    ],
)
def test_stream_with_include_usage_ends_with_a_usage_chunk(decoded: DecodedRequest, prompt_tokens: int) -> None:
    *before, last = streamed(decoded, DELTAS)
    assert all(chunk["usage"] is None for chunk in before)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 5,
        "total_tokens": prompt_tokens + 5,
    }


def test_stream_logprobs_are_sent_while_text_is_held_back() -> None:
    chunks_of_chat = streamed(chat(stream=True, logprobs=True, n=2), DELTAS)
    reported = [c for chunk in chunks_of_chat for c in chunk["choices"] if c["index"] == 0 and c["logprobs"]]
    assert [c["delta"] for c in reported] == [{"content": "Hé"}, {"content": ""}, {"content": "llo"}]
    assert [[t["token"] for t in c["logprobs"]["content"]] for c in reported] == [["Hé"], ["llo"], []]


def test_stream_text_offsets_continue_over_chunks() -> None:
    chunks_of_completions = streamed(completions(stream=True, logprobs=0, n=2), DELTAS)
    reported = [c["logprobs"] for chunk in chunks_of_completions for c in chunk["choices"] if c["index"] == 0]
    assert [logprobs["text_offset"] for logprobs in reported] == [[0], [2], []]


@given(st.text(), st.lists(st.text(), max_size=3), st.floats(MIN_LOGPROB, 0))
def test_stream_any_text_makes_whole_events(text: str, tokens: list[str], logprob: float) -> None:
    reported = tuple(token(text_, logprob, top=(token(text_, logprob),)) for text_ in tokens)
    added = delta(0, text, 1, len(tokens), FinishReason.LENGTH, reported)
    for decoded in (chat(stream=True, logprobs=True), completions(stream=True, logprobs=1)):
        choices = [choice for chunk in streamed(decoded, [added]) for choice in chunk["choices"]]
        assert "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices) == text
        assert choices[-1]["finish_reason"] == "length"


def test_stream_is_read_by_the_openai_client() -> None:
    stream = EventEncoder(chat(stream=True))
    events = [*stream.begin(), *stream.delta(delta(0, "Héllo", 3, 3, FinishReason.EOS_TOKEN)), *stream.end()]
    with client(200, "".join(events), "text/event-stream") as connected:
        reported = list(connected.chat.completions.create(model="m", messages=[], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in reported) == "Héllo"


def test_stream_error_is_raised_by_the_openai_client() -> None:
    stream = EventEncoder(completions(stream=True))
    events = [
        *stream.begin(),
        *stream.delta(delta(0, "Hé", 3, 1)),
        *stream.error(errors.GenerationFailed("No memory.")),
    ]
    assert stream.end() == []
    reported: list[str] = []
    with client(200, "".join(events), "text/event-stream") as connected:
        chunks = connected.completions.create(model="m", prompt="a", stream=True)
        with pytest.raises(client_package.APIError, match=r"^No memory\.$") as raised:
            reported.extend(chunk.choices[0].text for chunk in chunks)
    assert reported == ["Hé"]
    assert raised.value.type == "server_error"
