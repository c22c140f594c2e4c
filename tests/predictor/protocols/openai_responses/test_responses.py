"""Whole responses."""

from typing import Any

import pytest
from openai.types.responses import Response

from predictor.protocols.openai_responses import responses
from predictor.protocols.openai_responses.items import tokens_from
from predictor.types import Chat, Completion, FinishReason, Token
from tests.predictor.protocols.openai_responses.helpers import TOOL, Json, call, check, completion, decode, token


def encode(*completions: Completion, **fields: Any) -> Json:
    response = responses.encode(decode(**fields), completions)
    check(Response, response)
    return response


def test_response_has_all_fields_of_its_type() -> None:
    decoded = decode(metadata={"a": "b"})
    response = responses.encode(decoded, [completion("Héllo", reasoning_tokens=2)])
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
        completion("{}"), text={"format": text_format}, tools=[TOOL], tool_choice=choice, reasoning={"effort": "low"}
    )


def test_reasoning_comes_before_the_message_and_its_calls() -> None:
    response = encode(
        completion("Wait.", FinishReason.TOOL_CALLS, reasoning="Hm.", tool_calls=(call(1), call(2))), tools=[TOOL]
    )
    assert response["status"] == "completed"
    reasoning, message, first, second = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "Wait."
    assert [(item["call_id"], item["name"], item["arguments"]) for item in (first, second)] == [
        ("call_1", "weather", '{"city": "Ulm"}'),
        ("call_2", "weather", '{"city": "Ulm"}'),
    ]
    assert len({item["id"] for item in response["output"]}) == 4


@pytest.mark.parametrize(
    ("fields", "statuses"),
    [
        ({"text": "He"}, [("message", "incomplete")]),
        ({"reasoning": "Hm"}, [("reasoning", "incomplete")]),
        ({"text": "He", "reasoning": "Hm."}, [("reasoning", "completed"), ("message", "incomplete")]),
        ({"tool_calls": (call(), call())}, [("function_call", "completed"), ("function_call", "incomplete")]),
        ({}, []),
    ],
)
def test_response_that_is_cut_off_is_incomplete_and_its_last_item(fields: Json, statuses: list[Any]) -> None:
    response = encode(completion(finish_reason=FinishReason.LENGTH, **fields))
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [(item["type"], item["status"]) for item in response["output"]] == statuses


@pytest.mark.parametrize(
    ("fields", "types"),
    [
        ({}, ["message"]),
        ({"reasoning": "Hm."}, ["reasoning", "message"]),
        ({"tool_calls": (call(),)}, ["function_call"]),
    ],
)
def test_response_without_text_has_an_empty_message_unless_it_has_calls(fields: Json, types: list[str]) -> None:
    assert [item["type"] for item in encode(completion(**fields))["output"]] == types


def test_logprobs_are_those_of_the_message() -> None:
    tokens = (
        token("<think>"),
        token("He"),
        token("</think>"),
        token("He", -0.25, top=(token("He", -0.25), token("\ufffd", -2))),
        token("y"),
        token("<|end|>", special=True),
    )
    response = encode(completion("Hey", reasoning="He", tokens=tokens), top_logprobs=2)
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


@pytest.mark.parametrize(
    ("tokens", "text", "skip", "expected"),
    [
        (["a", "b"], "ab", 0, ["a", "b"]),
        (["<", "a", "b"], "a", 0, ["a", "b"]),
        (["<", "a"], "ab", 0, ["a"]),
        (["a", "<", "a"], "a", 1, ["a"]),
        (["<", "\ufffd", "\ufffd"], "é", 0, ["<", "\ufffd", "\ufffd"]),
        ([], "a", 0, []),
    ],
)
def test_tokens_from_begin_with_the_text(tokens: list[str], text: str, skip: int, expected: list[str]) -> None:
    found: list[Token] = [*tokens_from([token(part) for part in tokens], text, skip)]
    assert [part.text for part in found] == expected


def test_best_of_returns_the_most_probable_and_counts_all() -> None:
    candidates = [completion(text, tokens=(token(text, logprob),)) for text, logprob in (("a", -1), ("b", -0.5))]
    response = encode(*candidates, best_of=2)
    [part] = response["output"][0]["content"]
    assert (part["text"], part["logprobs"]) == ("b", [])
    assert response["usage"]["output_tokens"] == 10


def test_output_is_accepted_in_the_next_request() -> None:
    first = encode(completion("Wait.", FinishReason.TOOL_CALLS, reasoning="Hm.", tool_calls=(call(),)), tools=[TOOL])
    items = [*first["output"], {"type": "function_call_output", "call_id": "call_1", "output": "mild"}]
    prompt = decode(input=items).request.prompt
    assert isinstance(prompt, Chat)
    assert [message["role"] for message in prompt.messages] == ["assistant", "tool"]
    assert prompt.messages[0]["reasoning_content"] == "Hm."
