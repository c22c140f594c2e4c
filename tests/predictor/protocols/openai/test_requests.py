"""Decoding of completion and chat completion requests."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from predictor.errors import InvalidRequest, RequestError
from predictor.observability import request_record
from predictor.observability.request_record import RequestRecord
from predictor.protocols.openai import requests
from predictor.protocols.openai.requests import DecodedRequest
from predictor.types import (
    Chat,
    GenerationRequest,
    SamplingParams,
)
from tests.predictor.protocols.openai.helpers import (
    MESSAGES,
    Json,
    both_apis,
    chat,
    completions,
    decoded_chat,
    rejected,
    template_messages,
)

Decode = Callable[[bytes], DecodedRequest]

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 0], [(1, 0)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_decode_prompts_of_text_or_token_ids_keeps_their_order(prompt: Any, expected: list[Any]) -> None:
    assert [request.prompt for request in completions(prompt=prompt).requests] == expected


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [True], [-1], [[1], 2], [1.5], 7, {"a": 1}, None])
def test_decode_other_prompt_raises_with_its_field(prompt: Any) -> None:
    assert rejected(completions, prompt=prompt).field == "prompt"


def test_decode_without_max_tokens_uses_16_for_completions_only() -> None:
    assert completions().requests == [GenerationRequest("Hi", SamplingParams(max_tokens=16))]
    message = {"role": "user", "content": "Hi"}
    assert chat().requests == [GenerationRequest(Chat((message,)), SamplingParams(), parse_output=True)]


@both_apis
def test_decode_sampling_fields_returns_all_of_them(decode_fields: Callable[..., DecodedRequest]) -> None:
    fields: Json = {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 1,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "ignore_eos": True,
        "seed": -7,
    }
    (request,) = decode_fields(**fields, stop=["a", "b"], stop_token_ids=[4], n=3).requests
    assert request.sampling == SamplingParams(**fields, stop=("a", "b"), stop_token_ids=(4,))
    assert request.n == 3


@both_apis
@pytest.mark.parametrize(("stop", "expected"), [("a", ("a",)), (["a"], ("a",)), ("[1]", ("[1]",)), ("[]", ("[]",))])
def test_decode_stop_string_like_json_is_kept_verbatim(
    decode_fields: Callable[..., DecodedRequest], stop: Any, expected: tuple[str, ...]
) -> None:
    assert decode_fields(stop=stop).requests[0].sampling.stop == expected


@pytest.mark.parametrize(
    ("decode_fields", "body"), [(completions, requests.COMPLETION_SCHEMA), (chat, requests.CHAT_COMPLETION_SCHEMA)]
)
def test_decode_null_equals_absent_for_every_optional_field(
    decode_fields: Callable[..., DecodedRequest], body: Json
) -> None:
    nulls = dict.fromkeys(set(body["properties"]) - set(body["required"]))
    assert decode_fields(**nulls).requests == decode_fields().requests


@both_apis
def test_decode_sampling_extensions_are_parameters(decode_fields: Callable[..., DecodedRequest]) -> None:
    fields = {"logit_bias": {"5": -100, "7": 0.5}, "allowed_token_ids": [5, 7], "truncate_prompt_tokens": -1}
    sampling = decode_fields(**fields, prompt_logprobs=2).requests[0].sampling
    assert sampling.logit_bias == ((5, -100.0), (7, 0.5))
    assert (sampling.allowed_token_ids, sampling.truncate_prompt_tokens, sampling.prompt_logprobs) == ((5, 7), -1, 2)


@both_apis
def test_decode_best_of_generates_candidates_with_log_probabilities(
    decode_fields: Callable[..., DecodedRequest],
) -> None:
    decoded = decode_fields(best_of=4, n=2)
    assert (decoded.n, decoded.candidates, decoded.requests[0].n, decoded.logprobs) == (2, 4, 4, None)
    assert decoded.requests[0].sampling.logprobs == 0
    assert decode_fields(best_of=2, n=2, stream=True).requests[0].sampling.logprobs is None


def test_decode_echo_with_logprobs_scores_the_prompt() -> None:
    decoded = completions(echo=True, logprobs=3, max_tokens=0)
    assert (decoded.requests[0].sampling.prompt_logprobs, decoded.requests[0].sampling.logprobs) == (3, 3)
    assert completions(echo=True).requests[0].sampling.prompt_logprobs is None
    assert completions(echo=True, logprobs=1, prompt_logprobs=2).requests[0].sampling.prompt_logprobs == 2


def test_decode_echo_and_logprobs_by_each_apis_fields() -> None:
    assert completions(echo=True).requests[0].echo
    assert [completions(logprobs=count).requests[0].sampling.logprobs for count in (None, 0, 5)] == [None, 0, 5]
    assert chat(logprobs=True).requests[0].sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).requests[0].sampling.logprobs == 20
    assert chat(logprobs=False).requests[0].sampling.logprobs is None


@pytest.mark.parametrize("fields", [{"max_tokens": 9}, {"max_completion_tokens": 9}])
def test_decode_chat_accepts_both_names_of_max_tokens(fields: Json) -> None:
    assert chat(**fields).requests[0].sampling.max_tokens == 9
    assert chat(max_tokens=9, max_completion_tokens=9).requests[0].sampling.max_tokens == 9


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_chat_message_of_any_role_is_passed_unchanged(role: str) -> None:
    assert template_messages({"role": role, "content": "x", "name": "n"}) == [
        {"role": role, "content": "x", "name": "n"}
    ]


def test_chat_message_parts_are_concatenated() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "prompt_cache_breakpoint": {}}]
    assert template_messages({"role": "user", "content": parts}) == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant", "content": [], "tool_calls": []}, ""),
        ({"role": "tool", "content": None, "tool_call_id": "1"}, ""),
        ({"role": "tool", "content": [], "tool_call_id": "1"}, ""),
        ({"role": "user", "content": []}, ""),
        ({"role": "system", "content": []}, ""),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "So"}, {"type": "refusal", "refusal": " no."}]},
            "So no.",
        ),
    ],
)
def test_chat_message_of_a_history_without_text_or_with_a_refusal_is_accepted(message: Json, text: str) -> None:
    [passed] = template_messages(message)
    assert passed["content"] == text


def test_chat_tool_call_arguments_are_passed_as_objects() -> None:
    decoded = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None}
    reported = {"role": "tool", "content": "rain", "tool_call_id": "1"}
    called = {**CALL, "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    assert template_messages(decoded, reported) == [
        {"role": "assistant", "content": "", "tool_calls": [called]},
        reported,
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("  ", {}),
        ('{"city": "Ul', {}),
        ("[1]", {}),
        ("null", {}),
        (None, {}),
        (7, {}),
        ([None], {}),
        ('{"a": "\\ud800"}', {}),
        ("[" * 100_000, {}),
        ({"city": "Ulm", "days": None}, {"city": "Ulm", "days": None}),
        ('{"days": [1, 2.5]}', {"days": [1, 2.5]}),
    ],
)
def test_chat_tool_call_arguments_of_any_form_become_an_object(arguments: Any, expected: Json) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    answer = {"role": "assistant", "tool_calls": [call]}
    [message] = template_messages(answer)
    jsonschema.validate({"model": "m", "messages": [answer]}, requests.CHAT_COMPLETION_SCHEMA)
    assert message["tool_calls"][0]["function"].get("arguments", {}) == expected


def test_chat_template_variables_are_passed() -> None:
    prompt = decoded_chat(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert (prompt.variables, prompt.reasoning_effort) == ({"enable_thinking": False}, "low")
    assert decoded_chat(reasoning_effort="").reasoning_effort is None
    assert decoded_chat(reasoning_effort=None, chat_template_kwargs=None) == decoded_chat()


def test_chat_prefix_of_the_last_message_continues_it() -> None:
    assistant = {"role": "assistant", "content": "So"}
    for fields in ({"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}):
        assert decoded_chat(messages=[*MESSAGES, assistant], **fields).continue_final_message
    prefixed = decoded_chat(messages=[*MESSAGES, {**assistant, "prefix": True}])
    assert prefixed.continue_final_message
    assert prefixed.messages[-1] == assistant
    assert not decoded_chat(messages=[*MESSAGES, {**assistant, "prefix": True}, *MESSAGES]).continue_final_message
    assert not decoded_chat(add_generation_prompt=False).add_generation_prompt


def test_decode_fields_without_effect_are_ignored() -> None:
    labels = {
        "user": "u",
        "safety_identifier": "s",
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "store": True,
        "verbosity": "low",
        "prediction": {"type": "content", "content": "a"},
        "service_tier": "flex",
        "chat_id": "c",
        "session_id": "s",
        "id": "i",
        "keep_alive": "5m",
        "cache_prompt": True,
    }
    without_effect = {
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "suffix": "",
        "typical_p": 1.0,
        "chat_template_kwargs": {},
        "options": {},
        "extra_body": {},
        "tools": [],
        "functions": [],
        "function_call": "none",
        "add_generation_prompt": True,
        "continue_final_message": False,
        "skip_special_tokens": True,
        "top_logprobs": 0,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }
    with request_record.bind(RequestRecord()) as record:
        assert chat(**labels | without_effect).requests == chat().requests
        assert chat(user=7, metadata={"user_id": 5, "a": {}}).requests == chat().requests
        assert completions(user="u", logit_bias={}, suffix="", best_of=2, n=2).requests == completions(n=2).requests
        assert completions(best_of=1).requests == completions().requests
    assert record.ignored_fields == []


def test_decode_unknown_fields_are_ignored_and_recorded() -> None:
    message = {**MESSAGES[0], "mood": 1}
    with request_record.bind(RequestRecord()) as record:
        decoded = chat(messages=[*MESSAGES, message], max_token=5, stream_options={"continuous": True})
    assert decoded.requests == chat(messages=[*MESSAGES, *MESSAGES]).requests
    assert sorted(record.ignored_fields) == ["max_token", "messages.1.mood", "stream_options.continuous"]


def test_decode_labels_of_messages_and_tools_are_not_passed_to_the_template() -> None:
    cached: Json = {"cache_control": {"type": "ephemeral"}}
    plain: list[Json] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [CALL]},
        {"role": "tool", "content": "c", "tool_call_id": "1"},
    ]
    parts = [{"type": "text", "text": "a", **cached}]
    labels: Json = {"annotations": [], "refusal": None, "audio": None, "prefix": False, "id": "m"}
    called = {**CALL, "index": 0, "function": {"name": "weather", "arguments": '{"city": "Ulm"}', "strict": True}}
    labelled = [
        {"role": "user", "content": parts, "timestamp": 5, **cached},
        {**plain[1], **labels, "tool_calls": [called]},
        {**plain[2], **cached},
    ]
    tools = [{**TOOL, **cached, "strict": False}]
    with request_record.bind(RequestRecord()) as record:
        assert chat(messages=labelled, tools=tools).requests == chat(messages=plain, tools=[TOOL]).requests
    assert record.ignored_fields == []


@pytest.mark.parametrize("name", ["mcp.read_file", "server/tool", "a" * 100])
def test_decode_tool_name_of_any_form_is_passed(name: str) -> None:
    prompt = decoded_chat(tools=[{"type": "function", "function": {"name": name}}])
    assert prompt.tools[0]["function"]["name"] == name


@both_apis
def test_decode_whole_numbers_as_floats_are_integers(decode_fields: Callable[..., DecodedRequest]) -> None:
    floats = {"max_tokens": 24.0, "n": 2.0, "top_k": 40.0, "seed": 3.0, "min_tokens": 1.0, "temperature": 1.0}
    integers = {name: int(value) for name, value in floats.items()}
    decoded = decode_fields(**floats)
    assert decoded.requests == decode_fields(**integers).requests
    sampling = decoded.requests[0].sampling
    assert all(type(value) is int for value in (decoded.n, sampling.max_tokens, sampling.top_k, sampling.seed))


@both_apis
@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (-1, None),
        (7, 7),
        (-(2**63), -(2**63)),
        (2**63 - 1, 2**63 - 1),
        (2**63, -(2**63)),
        (2**64 - 1, -1),
        (2**64, 0),
        (10**40, (10**40 + 2**63) % 2**64 - 2**63),
    ],
)
def test_decode_seed_of_any_size_is_within_the_generators_range(
    decode_fields: Callable[..., DecodedRequest], seed: int, expected: int | None
) -> None:
    assert decode_fields(seed=seed).requests[0].sampling.seed == expected


@both_apis
def test_decode_empty_stops_are_dropped_and_256_accepted(decode_fields: Callable[..., DecodedRequest]) -> None:
    stops = [f"<{number}>" for number in range(256)]
    for stop, expected in (("", ()), ([""], ()), ([None, "a", ""], ("a",)), (stops, tuple(stops))):
        assert decode_fields(stop=stop).requests[0].sampling.stop == expected


@both_apis
@pytest.mark.parametrize(("requested", "limit"), [(-1, sys.maxsize), (0, 0), (10**30, 10**30)])
def test_decode_max_tokens_may_be_unlimited_or_none_at_all(
    decode_fields: Callable[..., DecodedRequest], requested: int, limit: int
) -> None:
    assert decode_fields(max_tokens=requested).requests[0].sampling.max_tokens == limit
    assert chat(max_completion_tokens=requested).requests[0].sampling.max_tokens == limit


@pytest.mark.parametrize(("decode_fields", "prefix"), [(completions, "cmpl-"), (chat, "chatcmpl-")])
def test_decode_sets_a_unique_id_and_the_current_time(
    decode_fields: Callable[..., DecodedRequest], prefix: str
) -> None:
    before = int(time.time())
    first, second = decode_fields(), decode_fields()
    assert first.id.startswith(prefix)
    assert first.id != second.id
    assert before <= first.created <= time.time()


@both_apis
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 1.1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("max_tokens", -2),
        ("max_tokens", 1.5),
        ("max_tokens", "24"),
        ("max_tokens", True),
        ("seed", 1.5),
        ("stop", 7),
        ("stop", ["a"] * 257),
        ("min_p", 1.1),
        ("typical_p", 0.9),
        ("typical_p", True),
        ("allowed_token_ids", []),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("best_of", 0),
        ("best_of", 129),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("suffix", "x"),
        ("max_new_tokens", 8),
        ("skip_special_tokens", False),
        ("stream", "yes"),
    ],
)
def test_decode_invalid_field_raises_with_its_name(
    decode_fields: Callable[..., DecodedRequest], field: str, value: Any
) -> None:
    error = rejected(decode_fields, **{field: value})
    assert error.field == field
    assert str(error).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"suffix": "a"}, "suffix: insertion is not supported."),
        ({"best_of": 2, "n": 3}, "best_of: 2 is less than n, 3. Raise it, or omit it."),
        ({"best_of": 2, "stream": True}, "best_of: is not possible in a stream"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs: is not possible in a stream"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: input should be less than or equal to 100"),
        ({"logit_bias": {"-5": 1}}, "logit_bias.-5.[key]: string should match pattern"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5: input should be a valid number"),
        ({"add_special_tokens": False}, "add_special_tokens: special tokens of the tokenizer are always added."),
        ({"logprobs": 21}, "logprobs: input should be less than or equal to 20"),
        ({"logprobs": True}, "logprobs: input should be a valid integer"),
    ],
)
def test_decode_completion_unsupported_field_raises_with_the_reason(fields: Json, expected: str) -> None:
    assert str(rejected(completions, **fields)).startswith(expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio: only text is generated."),
        ({"modalities": ["text", "audio"]}, "modalities: only text is generated."),
        ({"moderation": {"model": "m"}}, "moderation: "),
        ({"web_search_options": {}}, "web_search_options: "),
        ({"reasoning_effort": "very high"}, "reasoning_effort: "),
        ({"chat_template_kwargs": "off"}, "chat_template_kwargs: "),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt: begins a new"),
        ({"options": {"num_predict": 5}}, "options: put its fields into the body."),
        ({"response_format": {"type": "xml"}}, "response_format.type: "),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type: only function tools are supported"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name: "),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs to be true."),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"logprobs": 1}, "logprobs: "),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens: differs from max_completion_tokens"),
        ({"messages": []}, "messages: list should have at least 1 item"),
    ],
)
def test_decode_chat_unsupported_field_raises_with_the_reason(fields: Json, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{expected}"):
        chat(**fields)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Hi", "messages.0: input should be an object."),
        ({"content": "a"}, "messages.0.role: field required."),
        ({"role": "critic", "content": "a"}, "messages.0.role: input should be 'system'"),
        ({"role": "function", "content": "a"}, "messages.0: name is required for role function"),
        ({"role": "user"}, "messages.0: content is required"),
        ({"role": "user", "content": None}, "messages.0: content is required"),
        ({"role": "system", "content": None}, "messages.0: content is required"),
        ({"role": "user", "content": 7}, "messages.0.content: input should be a valid array."),
        ({"role": "user", "content": [{"type": "refusal"}]}, "messages.0.content.0.text: field required."),
        ({"role": "user", "content": ["a"]}, "messages.0.content.0: input should be an object."),
        ({"role": "user", "content": [IMAGE]}, "messages.0.content.0.type: only text parts are supported, not images"),
        (
            {"role": "user", "content": [AUDIO]},
            "messages.0.content.0.type: only text parts are supported, not images, audio",
        ),
        ({"role": "user", "content": "a", "images": ["AAAA"]}, "messages.0.images: only text is supported"),
        (
            {"role": "user", "content": "a", "tool_calls": [CALL]},
            "messages.0: tool_calls.* allowed for role assistant only.",
        ),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "messages.0: tool_call_id is required"),
        ({"role": "tool", "content": "a"}, "messages.0: tool_call_id is required for role tool"),
        ({"role": "assistant", "content": "a", "audio": {"id": "1"}}, "messages.0.audio: only text is supported"),
    ],
)
def test_decode_chat_invalid_message_raises_with_the_reason(message: Any, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{expected}"):
        chat(messages=[message])


@both_apis
def test_decode_returns_the_model_and_requires_it(decode_fields: Callable[..., DecodedRequest]) -> None:
    assert decode_fields(model="other").model == "other"
    assert rejected(decode_fields, model=None).field == "model"


@both_apis
def test_decode_several_invalid_fields_are_all_reported(decode_fields: Callable[..., DecodedRequest]) -> None:
    error = rejected(decode_fields, max_tokens=-2, top_p=2)
    assert all(f"{name}: " in str(error) for name in ("max_tokens", "top_p"))
    assert error.field is None


@pytest.mark.parametrize("decode", [requests.decode_completion, requests.decode_chat_completion])
@pytest.mark.parametrize("body", [b"{", b"[]", b"7", b'{"model": "\\ud800"}', b"[" * 10_000])
def test_decode_body_other_than_a_json_object_raises(decode: Decode, body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^the body: "):
        decode(body)


@pytest.mark.parametrize(
    ("params", "body"),
    [(completion_create_params, requests.COMPLETION_SCHEMA), (chat_create_params, requests.CHAT_COMPLETION_SCHEMA)],
)
def test_schema_has_every_field_of_the_openai_client(params: Any, body: Json) -> None:
    fields = {*params.CompletionCreateParamsBase.__annotations__, "stream"}
    assert fields <= set(body["properties"])


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["text", "user", "none"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bool, Json]:
    """A body of either API in which a few fields, or a field of a message, are any_json."""
    is_chat = draw(st.booleans())
    known = sorted((requests.CHAT_COMPLETION_SCHEMA if is_chat else requests.COMPLETION_SCHEMA)["properties"])
    body: Json = {"model": "m", **({"messages": [{**MESSAGES[0]}]} if is_chat else {"prompt": "Hi"})}
    if is_chat and draw(st.booleans()):
        body["messages"][0][draw(st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id"]))] = draw(
            any_json
        )
    return is_chat, body | draw(st.dictionaries(st.sampled_from(known), any_json, max_size=3))


@given(bodies())
def test_decode_any_body_matches_its_schema_or_raises_a_sentence(decoded: tuple[bool, Json]) -> None:
    is_chat, body = decoded
    decode = requests.decode_chat_completion if is_chat else requests.decode_completion
    try:
        decode(json.dumps(body).encode())
    except RequestError as error:
        message = str(error)
        assert message.endswith(".")
        assert not any(
            word in message
            for word in ("pydantic", "http", "BaseRequest", "CompletionRequest", "SamplingFields", "instance of")
        )
    else:
        jsonschema.validate(body, requests.CHAT_COMPLETION_SCHEMA if is_chat else requests.COMPLETION_SCHEMA)


@given(st.binary() | any_json.map(lambda value: json.dumps(value).encode()))
def test_decode_any_bytes_raises_request_errors_only(body: bytes) -> None:
    for decode in (requests.decode_chat_completion, requests.decode_completion):
        with pytest.raises(RequestError):
            decode(body)


@pytest.mark.parametrize("schema", [requests.COMPLETION_SCHEMA, requests.CHAT_COMPLETION_SCHEMA])
def test_schema_is_self_contained_without_private_names(schema: Json) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    written = json.dumps(schema)
    assert "$ref" not in written
    assert "$defs" not in written
    assert '"_' not in written
