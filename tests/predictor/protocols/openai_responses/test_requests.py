"""Decoding of requests of the Responses API."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import response_create_params

from predictor.errors import InvalidRequest, RequestError
from predictor.observability import request_record
from predictor.observability.request_record import RequestRecord
from predictor.protocols.openai_responses import requests
from predictor.types import Chat, GenerationRequest, GrammarKind, SamplingParams, StructuredOutput
from tests.predictor.protocols.openai_responses.helpers import TOOL, Json, decode

CALL = {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "weather", "arguments": '{"city": "Ulm"}'}
TEMPLATE_CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "mild"}
SUMMARY = {"type": "summary_text", "text": "short"}
THOUGHT = {"type": "reasoning_text", "text": "Hm."}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(**fields: Any) -> Chat:
    prompt = decode(**fields).request.prompt
    assert isinstance(prompt, Chat)
    return prompt


def messages(*items: Json) -> list[Any]:
    return list(chat(input=items).messages)


def rejected(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        decode(**fields)
    return raised.value


def test_decode_string_is_a_user_message() -> None:
    decoded = decode()
    expected = Chat(({"role": "user", "content": "Hi"},))
    assert decoded.request == GenerationRequest(expected, SamplingParams(), parse_output=True)
    assert (decoded.model, decoded.stream, decoded.logprobs) == ("m", False, False)


def test_decode_instructions_are_the_first_message() -> None:
    assert chat(instructions="Be brief.").messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    )


def test_decode_sampling_fields_returns_all_of_them() -> None:
    fields: Json = {"temperature": 1, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7, "presence_penalty": -1}
    assert decode(**fields, stop="a", max_output_tokens=5).request.sampling == SamplingParams(
        **fields, stop=("a",), max_tokens=5
    )
    assert decode(max_tokens=5).request.sampling.max_tokens == 5
    assert rejected(max_tokens=5, max_output_tokens=6).field == "max_tokens"


def test_decode_best_of_is_the_number_of_completions_and_not_for_streams() -> None:
    assert decode(best_of=3).request.n == 3
    assert rejected(best_of=3, stream=True).field == "best_of"


def test_decode_logprobs_by_include_or_their_number() -> None:
    assert decode(include=["reasoning.encrypted_content"]).request.sampling.logprobs is None
    assert decode(include=["message.output_text.logprobs"]).request.sampling.logprobs == 0
    assert decode(top_logprobs=3).request.sampling.logprobs == 3
    assert rejected(include=["everything"]).field == "include.0"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_message_of_any_role_is_passed_with_or_without_type(role: str) -> None:
    types: list[Json] = [{}, {"type": "message"}, {"type": None}]
    for type_ in types:
        assert messages({"role": role, "content": "x", "id": "msg_1", **type_}) == [{"role": role, "content": "x"}]


def test_message_parts_are_concatenated() -> None:
    parts = [
        {"type": "input_text", "text": "a"},
        {"type": "output_text", "text": "b", "annotations": [], "logprobs": [{"token": "b"}]},
        {"type": "refusal", "refusal": "c"},
    ]
    assert messages({"role": "assistant", "content": parts, "status": "completed", "phase": "final_answer"}) == [
        {"role": "assistant", "content": "abc"}
    ]


def test_items_of_a_response_are_one_message_of_the_assistant() -> None:
    text = {"role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]}
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [SUMMARY], "content": [THOUGHT]}
    expected = {
        "role": "assistant",
        "content": "Wait.",
        "tool_calls": [TEMPLATE_CALL],
        "reasoning_content": "Hm.",
        "reasoning": "Hm.",
    }
    orders: list[list[Json]] = [[reasoning, text, CALL], [reasoning, CALL, text]]
    for items in orders:
        passed = messages({"role": "user", "content": "Hi"}, *items, RESULT)
        assert passed == [
            {"role": "user", "content": "Hi"},
            expected,
            {"role": "tool", "tool_call_id": "1", "content": "mild"},
        ]


def test_calls_in_succession_are_one_message_and_answers_are_two() -> None:
    other = CALL | {"call_id": "2"}
    assert [call["id"] for call in messages(CALL, other)[0]["tool_calls"]] == ["1", "2"]
    answers = [{"role": "assistant", "content": text} for text in ("a", "b")]
    assert messages(*answers) == answers
    [first, _, second] = messages(CALL, RESULT, other)
    assert first["role"] == second["role"] == "assistant"


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"content": [THOUGHT], "summary": []}, "Hm."),
        ({"summary": [SUMMARY, SUMMARY]}, "short\n\nshort"),
        ({"summary": [], "content": None, "encrypted_content": "gAAAA"}, None),
    ],
)
def test_reasoning_of_a_history_is_its_content_else_its_summary(item: Json, text: str | None) -> None:
    message = {"role": "assistant", "content": "a"}
    [passed] = messages({"type": "reasoning", "id": "rs_1", **item}, message)
    assert passed == (message if text is None else {**message, "reasoning_content": text, "reasoning": text})


def test_reasoning_after_an_answer_begins_the_next_message() -> None:
    answer = {"role": "assistant", "content": "a"}
    passed = messages(answer, {"type": "reasoning", "summary": [SUMMARY]}, CALL)
    assert [message.get("reasoning_content") for message in passed] == [None, "short"]


@pytest.mark.parametrize("arguments", ["", '{"a"', "[1]", [None]])
def test_arguments_that_are_no_object_are_read_as_empty(arguments: object) -> None:
    [message] = messages(CALL | {"arguments": arguments})
    assert message["tool_calls"][0]["function"]["arguments"] == {}
    jsonschema.validate({"model": "m", "input": [CALL | {"arguments": arguments}]}, requests.RESPONSE_SCHEMA)


def test_output_of_a_call_may_have_parts() -> None:
    output = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages(CALL, RESULT | {"output": output})[1]["content"] == "ab"


def test_output_without_its_call_is_rejected() -> None:
    error = rejected(input=[{"role": "user", "content": "Hi"}, RESULT])
    assert error.field == "input.1.call_id"
    assert "no function_call" in str(error)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"type": "item_reference", "id": "msg_1"}, "items are not stored"),
        ({"id": "msg_1"}, "items are not stored"),
        ({"type": "computer_call"}, "computer_call"),
        ({"type": "custom_tool_call_output", "call_id": "1", "output": ""}, "custom_tool_call_output"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}, "only text parts"),
        ({"role": "tool", "content": "x"}, "role"),
        ({"type": "function_call", "name": "x"}, "call_id: field required"),
        (7, "should be an object"),
    ],
)
def test_item_that_is_not_supported_is_rejected_by_name(item: Any, reason: str) -> None:
    error = rejected(input=[item])
    assert reason in str(error)
    assert str(error.field).startswith("input.0")


@pytest.mark.parametrize("value", [7, [], {}, [["a"]], None])
def test_other_input_is_rejected(value: Any) -> None:
    assert str(rejected(input=value).field).startswith("input")


@pytest.mark.parametrize(
    "kind", ["web_search", "file_search", "computer", "code_interpreter", "mcp", "image_generation", "custom", "shell"]
)
def test_tool_that_runs_on_the_server_is_rejected_by_name(kind: str) -> None:
    error = rejected(tools=[TOOL, {"type": kind}])
    assert error.field == "tools.1"
    assert f"type {kind}" in str(error)
    assert kind in str(rejected(tools=[TOOL], tool_choice={"type": kind}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", {"id": "conv_1"}),
        ("prompt", {"id": "pmpt_1"}),
        ("background", True),
        ("truncation", "auto"),
        ("context_management", [{"type": "compaction"}]),
        ("messages", [{"role": "user", "content": "Hi"}]),
        ("n", 2),
    ],
)
def test_field_that_is_not_supported_is_rejected_by_name(field: str, value: Any) -> None:
    error = rejected(**{field: value})
    assert error.field == field
    assert str(error).startswith(f"{field}: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True},
        {"store": False},
        {"truncation": "disabled"},
        {"background": False},
        {"n": 1},
        {"stream_options": {"include_obfuscation": False}},
        {"service_tier": "auto"},
        {"prompt_cache_retention": "24h"},
        {"reasoning": {"effort": None, "summary": "auto"}},
    ],
)
def test_field_without_effect_is_accepted(fields: Json) -> None:
    record = RequestRecord()
    with request_record.bind(record):
        assert decode(**fields).request == decode().request
    assert record.ignored_fields == []


def test_unknown_fields_are_recorded_with_their_paths() -> None:
    record = RequestRecord()
    with request_record.bind(record):
        decode(mood=1, input=[{"role": "user", "content": "x", "mood": 1}], text={"mood": 1})
    assert sorted(record.ignored_fields) == ["input.0.mood", "mood", "text.mood"]


def test_tools_are_passed_in_the_form_of_chats() -> None:
    function = {key: value for key, value in TOOL.items() if key != "type"}
    assert chat(tools=[TOOL | {"strict": None}]).tools == ({"type": "function", "function": function},)


@pytest.mark.parametrize(
    ("choice", "names", "required"),
    [
        ("auto", ["weather", "time"], False),
        ("none", [], False),
        ("required", ["weather", "time"], True),
        ({"type": "function", "name": "time"}, ["time"], True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]}, ["time"], False),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]},
            ["time"],
            True,
        ),
    ],
)
def test_tool_choice_selects_the_tools(choice: Any, names: list[str], required: bool) -> None:
    decoded = decode(tools=[TOOL, TOOL | {"name": "time"}], tool_choice=choice)
    prompt = decoded.request.prompt
    assert isinstance(prompt, Chat)
    assert [tool["function"]["name"] for tool in prompt.tools] == names
    assert prompt.requires_tool_call is required
    assert decoded.head["tool_choice"] == choice


def test_strict_tools_are_those_that_set_it() -> None:
    tools = [TOOL | {"strict": True}, TOOL | {"name": "time"}]
    assert chat(tools=tools).strict_tools == {"weather"}
    assert [tool["strict"] for tool in decode(tools=tools).head["tools"]] == [True, False]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"type": "function", "name": "other"}, "other"),
        ({"type": "function"}, "needs a name"),
        ({"type": "allowed_tools", "tools": []}, "needs tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}, "other"),
    ],
)
def test_tool_choice_of_an_unknown_tool_is_rejected(choice: Json, reason: str) -> None:
    error = rejected(tools=[TOOL], tool_choice=choice)
    assert error.field == "tool_choice"
    assert reason in str(error)


def test_parallel_tool_calls_and_effort_reach_the_chat() -> None:
    decoded = chat(
        parallel_tool_calls=False, reasoning={"effort": "low"}, chat_template_kwargs={"enable_thinking": True}
    )
    assert (decoded.parallel_tool_calls, decoded.reasoning_effort) == (False, "low")
    assert decoded.variables == {"enable_thinking": True}


def test_text_format_is_structured_output() -> None:
    def output(**text_format: Any) -> StructuredOutput | None:
        return decode(text={"format": text_format}).request.sampling.structured_output

    assert output(type="text") is None
    assert output(type="json_object") == StructuredOutput(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
    assert output(type="json_schema", name="n", schema=SCHEMA, strict=True) == StructuredOutput(
        GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)
    )
    assert rejected(text={"format": {"type": "json_schema", "name": "n"}}).field == "text.format"
    assert "text.format" in str(rejected(text={"format": {"type": "json_object"}}, guided_regex="a"))


def test_head_repeats_the_fields_of_the_request() -> None:
    text_format = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    fields: Json = {
        "instructions": "Be brief.",
        "max_output_tokens": 5,
        "max_tool_calls": 2,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "temperature": 0.5,
        "text": {"format": text_format, "verbosity": "low"},
        "tools": [TOOL | {"strict": False, "description": "d"}],
        "top_logprobs": 2,
        "top_p": 0.5,
        "user": "u",
    }
    head = decode(**fields, store=True).head
    assert {name: head[name] for name in fields} == fields
    assert (head["store"], head["truncation"], head["service_tier"]) == (False, "disabled", "default")
    assert decode(max_output_tokens=-1).head["max_output_tokens"] is None


def test_schema_has_every_field_of_the_openai_client() -> None:
    fields = {*response_create_params.ResponseCreateParamsBase.__annotations__, "stream"}
    assert fields <= set(requests.RESPONSE_SCHEMA["properties"])


def test_schema_is_self_contained_without_private_names() -> None:
    jsonschema.Draft202012Validator.check_schema(requests.RESPONSE_SCHEMA)
    written = json.dumps(requests.RESPONSE_SCHEMA)
    assert not any(name in written for name in ("$ref", "$defs", '"_'))


def test_decode_null_equals_absent_for_every_optional_field() -> None:
    schema = requests.RESPONSE_SCHEMA
    nulls = dict.fromkeys(set(schema["properties"]) - set(schema["required"]))
    assert decode(**nulls).request == decode().request


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["text", "user", "message"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
items = st.dictionaries(
    st.sampled_from(["type", "role", "content", "call_id", "output", "summary", "arguments", "id", "name"]),
    any_json | st.sampled_from(["function_call", "function_call_output", "reasoning", "message", "item_reference"]),
)


@given(
    st.dictionaries(st.sampled_from(sorted(requests.RESPONSE_SCHEMA["properties"])), any_json, max_size=3),
    st.none() | st.lists(items, max_size=3),
)
def test_decode_any_body_matches_its_schema_or_raises_a_sentence(fields: Json, input_: list[Json] | None) -> None:
    body = {"model": "m", "input": "Hi"} | fields | ({} if input_ is None else {"input": input_})
    try:
        requests.decode(json.dumps(body).encode())
    except RequestError as error:
        message = str(error)
        assert message.endswith(".")
        assert not any(word in message for word in ("pydantic", "http", "Request", "Fields", "instance of", "_item"))
    else:
        jsonschema.validate(body, requests.RESPONSE_SCHEMA)


@given(st.binary() | any_json.map(lambda value: json.dumps(value).encode()))
def test_decode_any_bytes_raises_request_errors_only(body: bytes) -> None:
    with pytest.raises(RequestError):
        requests.decode(body)
