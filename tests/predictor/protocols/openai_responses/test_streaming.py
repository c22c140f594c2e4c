"""Streams as typed server-sent events."""

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from predictor import errors
from predictor.errors import NotFound, RequestError
from predictor.protocols.openai_responses import responses
from predictor.protocols.openai_responses.requests import DecodedRequest
from predictor.protocols.openai_responses.streaming import EventEncoder
from predictor.types import (
    CompletionDelta,
    FinishReason,
    OutputDelta,
    ReasoningDelta,
    TextDelta,
    Token,
    ToolCallDelta,
)
from tests.predictor.protocols.openai.helpers import client
from tests.predictor.protocols.openai_responses.helpers import TOOL, Json, check, completion, decode, token

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CALL = ToolCallDelta(0, id="call_1", name="weather")
ARGUMENTS = [ToolCallDelta(0, '{"city": '), ToolCallDelta(0, '"Ulm"}')]


def added(
    *deltas: OutputDelta, finish_reason: FinishReason | None = None, tokens: tuple[Token, ...] = ()
) -> CompletionDelta:
    return CompletionDelta(
        index=0, deltas=deltas, prompt_tokens=3, completion_tokens=5, finish_reason=finish_reason, tokens=tokens
    )


LAST = added(finish_reason=FinishReason.EOS_TOKEN)


def contents(events: Iterable[str]) -> list[Json]:
    """The content of events, each of which is whole, named by its type, and of the client's type."""
    parsed = []
    for event in events:
        name, data = event.removesuffix("\n\n").splitlines()
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        check(type(EVENT.validate_python(content)), content)
        parsed.append(content)
    assert [content["sequence_number"] for content in parsed] == list(range(len(parsed)))
    return parsed


def streamed(decoded: DecodedRequest, *deltas: CompletionDelta) -> list[Json]:
    encoder = EventEncoder(decoded)
    events = [*encoder.begin(), *(event for delta in deltas for event in encoder.delta(delta)), *encoder.end()]
    assert encoder.delta(LAST) == encoder.error(NotFound("late")) == []
    return contents(events)


def test_stream_of_a_message_has_all_events_in_order() -> None:
    decoded = decode(stream=True)
    created, in_progress, *events, completed = streamed(decoded, added(TextDelta("Hé")), added(TextDelta("llo")), LAST)
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == in_progress["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert created["response"]["usage"] is None
    item_id = events[0]["item"]["id"]
    part = {"type": "output_text", "text": "Héllo", "annotations": [], "logprobs": []}
    place = {"item_id": item_id, "output_index": 0, "content_index": 0}
    item = {"type": "message", "id": item_id, "role": "assistant"}
    assert [{key: value for key, value in event.items() if key != "sequence_number"} for event in events] == [
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {**item, "status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **place, "part": part | {"text": ""}},
        {"type": "response.output_text.delta", **place, "delta": "Hé", "logprobs": []},
        {"type": "response.output_text.delta", **place, "delta": "llo", "logprobs": []},
        {"type": "response.output_text.done", **place, "text": "Héllo", "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": {**item, "status": "completed", "content": [part]},
        },
    ]
    assert completed["type"] == "response.completed"
    assert completed["response"]["output"] == [events[-1]["item"]]
    assert completed["response"]["usage"]["total_tokens"] == 8


def test_stream_of_reasoning_and_calls_has_one_item_after_the_other() -> None:
    events = streamed(
        decode(stream=True, tools=[TOOL]),
        added(ReasoningDelta("Hm")),
        added(ReasoningDelta("."), TextDelta("Wait.")),
        added(CALL, *ARGUMENTS),
        added(ToolCallDelta(1, "{}", "call_2", "weather"), finish_reason=FinishReason.TOOL_CALLS),
    )
    names = [event["type"].removeprefix("response.") for event in events]
    reasoning = ["reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert names == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", *reasoning, "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *(call[0], call[1], *call[1:]),
        *call,
        "completed",
    ]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in done] == [0, 1, 2, 3]
    assert events[-1]["response"]["output"] == [event["item"] for event in done]
    assert [item.get("arguments") for item in events[-1]["response"]["output"]] == [
        None,
        None,
        '{"city": "Ulm"}',
        "{}",
    ]


@pytest.mark.parametrize(
    ("deltas", "types"),
    [([], []), ([ReasoningDelta("Hm")], ["reasoning"]), ([CALL, ARGUMENTS[0]], ["function_call"])],
)
def test_stream_that_is_cut_off_is_incomplete(deltas: list[OutputDelta], types: list[str]) -> None:
    last = streamed(decode(), added(*deltas), added(finish_reason=FinishReason.LENGTH))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [(item["type"], item["status"]) for item in last["response"]["output"]] == [
        (type_, "incomplete") for type_ in types
    ]


@pytest.mark.parametrize("deltas", [[], [ReasoningDelta("Hm.")]])
def test_stream_without_text_ends_with_an_empty_message(deltas: list[OutputDelta]) -> None:
    last = streamed(decode(), added(*deltas), LAST)[-1]
    message = last["response"]["output"][-1]
    assert (message["type"], message["content"][0]["text"], message["status"]) == ("message", "", "completed")


def test_stream_text_after_a_call_is_an_item_of_its_own() -> None:
    last = streamed(decode(), added(TextDelta("a"), CALL, *ARGUMENTS, TextDelta("b")), LAST)[-1]
    assert [item["type"] for item in last["response"]["output"]] == ["message", "function_call", "message"]


def test_stream_logprobs_come_with_their_text() -> None:
    end = token("</think>")
    events = streamed(
        decode(include=["message.output_text.logprobs"]),
        added(ReasoningDelta("Hm."), tokens=(token("Hm."),)),
        added(tokens=(end,)),
        added(tokens=(token("a", -0.25, top=(token("a", -0.25),)),)),
        added(TextDelta("ab"), tokens=(token("b"),)),
        added(TextDelta("c"), tokens=(token("c"),)),
        added(finish_reason=FinishReason.EOS_TOKEN, tokens=(token("<|end|>", special=True),)),
    )
    reported = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert reported[0][0] == {"token": "a", "logprob": -0.25, "top_logprobs": [{"token": "a", "logprob": -0.25}]}
    assert [[logprob["token"] for logprob in logprobs] for logprobs in reported] == [["a", "b"], ["c"]]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert [logprob["token"] for logprob in done["logprobs"]] == ["a", "b", "c"]
    assert events[-1]["response"]["output"][1]["content"][0]["logprobs"][0]["bytes"] == [97]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.GenerationFailed("No memory."), "server_error"),
        (errors.DeadlineExceeded("No memory.", ("Hé",)), "server_error"),
        (errors.Overloaded("No memory."), "rate_limit_exceeded"),
        (errors.InvalidRequest("No memory."), "invalid_prompt"),
    ],
)
def test_stream_error_ends_with_the_failed_response(error: RequestError, code: str) -> None:
    encoder = EventEncoder(decode())
    events = contents([*encoder.begin(), *encoder.delta(added(TextDelta("Hé"))), *encoder.error(error)])
    assert encoder.delta(LAST) == encoder.error(error) == encoder.end() == []
    assert [event["type"] for event in events[-3:]] == ["response.output_item.done", "error", "response.failed"]
    assert (events[-2]["code"], events[-2]["message"]) == (code, "No memory.")
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]) == ("failed", {"code": code, "message": "No memory."})
    assert [(item["status"], item["content"][0]["text"]) for item in failed["output"]] == [("incomplete", "Hé")]


texts = st.text(min_size=1)


parts = (
    st.builds(TextDelta, texts)
    | st.builds(ReasoningDelta, texts)
    | st.builds(ToolCallDelta, st.just(0), texts, st.just("call_1"), st.just("weather"))
)


@given(st.lists(parts, max_size=6))
def test_stream_of_any_output_ends_with_what_the_whole_response_is(output: list[OutputDelta]) -> None:
    # Whole completions have no two texts in succession.
    output = [next(same) for _, same in groupby(output, type)]
    decoded = decode()
    last = streamed(decoded, *map(added, output), LAST)[-1]
    whole = responses.encode(decoded, [completion(*output)])
    for item, other in zip(last["response"]["output"], whole["output"], strict=True):
        assert item | {"id": ""} == other | {"id": ""}
    assert last["response"] | {"output": []} == whole | {"output": []}


def test_stream_is_read_by_the_openai_client() -> None:
    encoder = EventEncoder(decode(stream=True))
    deltas = [added(ReasoningDelta("Hm.")), added(TextDelta("Hé\u2028llo")), added(CALL, *ARGUMENTS), LAST]
    events = [*encoder.begin(), *(event for delta in deltas for event in encoder.delta(delta))]
    with (
        client(200, "".join(events), "text/event-stream") as connected,
        connected.responses.stream(model="m", input="Hi") as stream,
    ):
        final = stream.get_final_response()
    assert final.output_text == "Hé\u2028llo"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
