"""Whole responses."""

from typing import Any

import pytest
from openai.types.responses import Response

from predictor.protocols.openai_responses import responses
from predictor.protocols.openai_responses.items import find
from predictor.types import Chat, Completion, FinishReason, OutputDelta, ReasoningDelta, TextDelta, ToolCallDelta
from tests.predictor.protocols.openai_responses.helpers import TOOL, Json, call, check, completion, decode, token


def encode(*completions: Completion, **fields: Any) -> Json:
    response = responses.encode(decode(**fields), completions)
    check(Response, response)
    return response


def test_response_has_all_fields_of_its_type() -> None:
    decoded = decode(metadata={"a": "b"})
    response = responses.encode(decoded, [completion(TextDelta("Héllo"), reasoning_tokens=2)])
    check(Response, response)
    [item] = response["output"]
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "Héllo", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "status": "completed", "role": "assistant", "content": [part]}
    assert response == {
        "id": decoded.head["id"],
        "object": "response",
        "created_at": decoded.head["created_at"],
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"a": "b"},
        "model": "m",
        "output": [item],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "status": "completed",
        "store": False,
        "temperature": None,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": None,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 3,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 2},
            "total_tokens": 8,
        },
        "user": None,
    }


def test_response_of_a_request_with_every_kind_of_field_conforms() -> None:
    text_format = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    encode(
        completion(TextDelta("{}")),
        text={"format": text_format},
        tools=[TOOL],
        tool_choice=choice,
        reasoning={"effort": "low"},
    )


def test_items_are_in_the_order_of_the_output() -> None:
    output: list[OutputDelta] = [
        ReasoningDelta("Hm."),
        TextDelta("Wait."),
        call(1),
        call(2, "{"),
        ToolCallDelta(1, "}"),
        TextDelta("So."),
    ]
    response = encode(completion(*output, finish_reason=FinishReason.TOOL_CALLS), tools=[TOOL])
    assert response["status"] == "completed"
    reasoning, message, first, second, last = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert reasoning["summary"] == []
    assert [item["content"][0]["text"] for item in (message, last)] == ["Wait.", "So."]
    assert [(item["call_id"], item["name"], item["arguments"]) for item in (first, second)] == [
        ("call_1", "weather", '{"city": "Ulm"}'),
        ("call_2", "weather", "{}"),
    ]
    assert len({item["id"] for item in response["output"]}) == 5


@pytest.mark.parametrize(
    ("output", "statuses"),
    [
        ([TextDelta("He")], [("message", "incomplete")]),
        ([ReasoningDelta("Hm")], [("reasoning", "incomplete")]),
        ([ReasoningDelta("Hm."), TextDelta("He")], [("reasoning", "completed"), ("message", "incomplete")]),
        ([call(1), call(2)], [("function_call", "completed"), ("function_call", "incomplete")]),
        ([], []),
    ],
)
def test_response_that_is_cut_off_is_incomplete_and_its_last_item(output: list[Any], statuses: list[Any]) -> None:
    response = encode(completion(*output, finish_reason=FinishReason.LENGTH))
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [(item["type"], item["status"]) for item in response["output"]] == statuses


@pytest.mark.parametrize(
    ("output", "types"),
    [([], ["message"]), ([ReasoningDelta("Hm.")], ["reasoning", "message"]), ([call()], ["function_call"])],
)
def test_response_without_text_has_an_empty_message_unless_it_has_calls(output: list[Any], types: list[str]) -> None:
    assert [item["type"] for item in encode(completion(*output))["output"]] == types


def test_logprobs_are_those_of_the_message() -> None:
    tokens = (
        token("<think>"),
        token("He"),
        token("</think>"),
        token("He", -0.25, top=(token("He", -0.25), token("\ufffd", -2))),
        token("y"),
        token("<|end|>", special=True),
    )
    response = encode(completion(ReasoningDelta("He"), TextDelta("Hey"), tokens=tokens), top_logprobs=2)
    assert response["output"][1]["content"][0]["logprobs"] == [
        {
            "token": "He",
            "logprob": -0.25,
            "bytes": [72, 101],
            "top_logprobs": [
                {"token": "He", "logprob": -0.25, "bytes": [72, 101]},
                {"token": "\ufffd", "logprob": -2, "bytes": []},
            ],
        },
        {"token": "y", "logprob": -0.5, "bytes": [121], "top_logprobs": []},
    ]


def test_logprobs_of_messages_around_a_call_are_their_own() -> None:
    tokens = tuple(map(token, ["He", "y", "<call>", "{}", "</call>", "\n", "So", "."]))
    response = encode(completion(TextDelta("Hey"), call(), TextDelta("So."), tokens=tokens), top_logprobs=1)
    parts = [item["content"][0] for item in response["output"] if item["type"] == "message"]
    assert [[logprob["token"] for logprob in part["logprobs"]] for part in parts] == [["He", "y"], ["So", "."]]


@pytest.mark.parametrize(
    ("tokens", "text", "skip", "expected"),
    [
        (["a", "b"], "ab", 0, 0),
        (["<", "a", "b"], "a", 0, 1),
        (["<", "a"], "ab", 0, 1),
        (["a", "<", "a"], "a", 1, 2),
        (["<", "\ufffd", "\ufffd"], "é", 0, None),
        ([], "a", 0, None),
    ],
)
def test_find_returns_the_token_with_which_the_text_begins(
    tokens: list[str], text: str, skip: int, expected: int | None
) -> None:
    assert find([*map(token, tokens)], text, skip) == expected


def test_best_of_returns_the_most_probable_and_counts_all() -> None:
    candidates = [
        completion(TextDelta(text), tokens=(token(text, logprob),)) for text, logprob in (("a", -1), ("b", -0.5))
    ]
    response = encode(*candidates, best_of=2)
    [part] = response["output"][0]["content"]
    assert (part["text"], part["logprobs"]) == ("b", [])
    assert response["usage"]["output_tokens"] == 10


def test_output_is_accepted_in_the_next_request() -> None:
    output: list[OutputDelta] = [ReasoningDelta("Hm."), TextDelta("Wait."), call()]
    first = encode(completion(*output, finish_reason=FinishReason.TOOL_CALLS), tools=[TOOL])
    items = [*first["output"], {"type": "function_call_output", "call_id": "call_1", "output": "mild"}]
    prompt = decode(input=items).request.prompt
    assert isinstance(prompt, Chat)
    assert [message["role"] for message in prompt.messages] == ["assistant", "tool"]
    assert prompt.messages[0]["reasoning_content"] == "Hm."
