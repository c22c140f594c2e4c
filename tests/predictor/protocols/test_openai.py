import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx2
import jsonschema
import openai as client_package
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as CompletionObject
from openai.types import Model, completion_create_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_create_params

from predictor import errors
from predictor.errors import InvalidRequest, NotFound, RequestError
from predictor.protocols.openai import models, requests, responses
from predictor.protocols.openai.requests import DecodedRequest
from predictor.protocols.openai.streaming import EventEncoder
from predictor.types import (
    MIN_LOGPROB,
    Chat,
    Completion,
    CompletionDelta,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TextDelta,
    Token,
)

Json = dict[str, Any]
Decode = Callable[[bytes], DecodedRequest]

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def completions(**fields: Any) -> DecodedRequest:
    return requests.decode_completion(json.dumps({"model": "m", "prompt": "Hi"} | fields).encode())


def chat(**fields: Any) -> DecodedRequest:
    return requests.decode_chat_completion(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode())


ask = pytest.mark.parametrize("ask", [completions, chat])


def refused(ask: Callable[..., DecodedRequest], **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        ask(**fields)
    return raised.value


# What is asked for


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 0], [(1, 0)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_takes_prompts_as_text_and_as_token_ids_one_or_several(prompt: Any, expected: list[Any]) -> None:
    assert [request.prompt for request in completions(prompt=prompt).requests] == expected


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [True], [-1], [[1], 2], [1.5], 7, {"a": 1}, None])
def test_refuses_any_other_prompt_by_name(prompt: Any) -> None:
    assert refused(completions, prompt=prompt).field == "prompt"


def test_completions_have_the_apis_default_of_16_tokens_and_a_chat_the_models_own() -> None:
    assert completions().requests == [GenerationRequest("Hi", SamplingParams(max_tokens=16))]
    assert chat().requests == [GenerationRequest(Chat(({"role": "user", "content": "Hi"},)), SamplingParams())]


@ask
def test_decodes_every_field_of_sampling(ask: Callable[..., DecodedRequest]) -> None:
    fields: Json = {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 1,
        "top_p": 0.9,
        "top_k": 3,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "ignore_eos": True,
        "seed": -7,
    }
    (request,) = ask(**fields, stop=["a", "b"], stop_token_ids=[4], n=3).requests
    assert request.sampling == SamplingParams(**fields, stop=("a", "b"), stop_token_ids=(4,))
    assert request.n == 3


@ask
@pytest.mark.parametrize(("stop", "expected"), [("a", ("a",)), (["a"], ("a",)), ("[1]", ("[1]",)), ("[]", ("[]",))])
def test_takes_a_stop_string_to_the_letter(
    ask: Callable[..., DecodedRequest], stop: Any, expected: tuple[str, ...]
) -> None:
    assert ask(stop=stop).requests[0].sampling.stop == expected


@pytest.mark.parametrize(
    ("ask", "body"), [(completions, requests.COMPLETION_SCHEMA), (chat, requests.CHAT_COMPLETION_SCHEMA)]
)
def test_null_means_absent_for_every_optional_field(ask: Callable[..., DecodedRequest], body: Json) -> None:
    nulls = dict.fromkeys(set(body["properties"]) - set(body["required"]))
    assert ask(**nulls).requests == ask().requests


def test_echo_and_log_probabilities_are_asked_for_in_each_apis_own_way() -> None:
    assert completions(echo=True).requests[0].echo
    assert [completions(logprobs=count).requests[0].sampling.logprobs for count in (None, 0, 5)] == [None, 0, 5]
    assert chat(logprobs=True).requests[0].sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).requests[0].sampling.logprobs == 20
    assert chat(logprobs=False).requests[0].sampling.logprobs is None


@pytest.mark.parametrize("fields", [{"max_tokens": 9}, {"max_completion_tokens": 9}])
def test_a_chats_length_has_two_names(fields: Json) -> None:
    assert chat(**fields).requests[0].sampling.max_tokens == 9
    assert chat(max_tokens=9, max_completion_tokens=9).requests[0].sampling.max_tokens == 9


def template_messages(*messages: Json) -> list[Any]:
    prompt = chat(messages=messages).requests[0].prompt
    assert isinstance(prompt, Chat)
    return list(prompt.messages)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_gives_the_template_each_role_as_it_is(role: str) -> None:
    assert template_messages({"role": role, "content": "x", "name": "n"}) == [
        {"role": role, "content": "x", "name": "n"}
    ]


def test_joins_the_text_parts_of_a_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "prompt_cache_breakpoint": {}}]
    assert template_messages({"role": "user", "content": parts}) == [{"role": "user", "content": "ab"}]


def test_gives_the_template_tool_calls_as_objects_and_their_results() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None}
    told = {"role": "tool", "content": "rain", "tool_call_id": "1"}
    called = {**CALL, "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    assert template_messages(asked, told) == [{"role": "assistant", "content": "", "tool_calls": [called]}, told]


def test_takes_its_own_answer_back_as_a_message() -> None:
    message = responses.encode(chat(), [HELLO])["choices"][0]["message"]
    assert template_messages(MESSAGES[0], message)[1] == {"role": "assistant", "content": "Héllo"}


@pytest.mark.parametrize(("choice", "offered"), [(None, (TOOL,)), ("auto", (TOOL,)), ("none", ())])
def test_offers_tools_to_the_template_unless_none_may_be_chosen(choice: str | None, offered: tuple[Json, ...]) -> None:
    prompt = chat(tools=[TOOL], tool_choice=choice).requests[0].prompt
    assert isinstance(prompt, Chat)
    assert prompt.tools == offered


def test_takes_labels_and_what_the_api_does_anyway() -> None:
    labels = {
        "user": "u",
        "safety_identifier": "s",
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "parallel_tool_calls": False,
        "store": False,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "service_tier": "auto",
    }
    assert chat(**labels).requests == chat().requests
    assert completions(user="u", logit_bias={}, best_of=2, n=2).requests == completions(n=2).requests


# What is refused


@ask
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
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("seed", 2**63),
        ("stop", 7),
        ("stop", ["a"] * 17),
        ("logit_bias", {"50256": -100}),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("user", 7),
        ("prefix", "a"),
    ],
)
def test_names_the_one_field_that_is_wrong(ask: Callable[..., DecodedRequest], field: str, value: Any) -> None:
    error = refused(ask, **{field: value})
    assert error.field == field
    assert str(error).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"suffix": "a"}, "suffix: insertion is not supported."),
        ({"best_of": 2}, "best_of: only n completions are generated"),
        ({"best_of": 2, "n": 3}, "best_of: "),
        ({"echo": True, "logprobs": 0}, "echo: log probabilities of prompts are not supported"),
        ({"logprobs": 21}, "logprobs: input should be less than or equal to 20"),
        ({"logprobs": True}, "logprobs: input should be a valid integer"),
    ],
)
def test_says_why_completions_refuse_a_field(fields: Json, expected: str) -> None:
    assert str(refused(completions, **fields)).startswith(expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio: only text is generated."),
        ({"modalities": ["text", "audio"]}, "modalities: only text is generated."),
        ({"functions": [{"name": "f"}]}, "functions: deprecated and not supported. Use tools."),
        ({"function_call": "none"}, "function_call: deprecated and not supported. Use tool_choice."),
        ({"moderation": {"model": "m"}}, "moderation: "),
        ({"prediction": {"type": "content", "content": "a"}}, "prediction: "),
        ({"reasoning_effort": "low"}, "reasoning_effort: "),
        ({"verbosity": "low"}, "verbosity: "),
        ({"web_search_options": {}}, "web_search_options: "),
        ({"store": True}, "store: completions are not stored."),
        ({"service_tier": "flex"}, "service_tier: input should be 'auto' or 'default'."),
        ({"response_format": {"type": "json_object"}}, "response_format: .*json_object and json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format: "),
        ({"tool_choice": "required"}, "tool_choice: .*returned as text."),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice: .*returned as text."),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type: only function tools are supported"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: "),
        ({"tools": [{**TOOL, "function": {"name": "f", "strict": True}}]}, "tools.0.function.strict: "),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs to be true."),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"logprobs": 1}, "logprobs: "),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens: differs from max_completion_tokens"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation: "),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options: usage: unknown field. Allowed: inc"),
        ({"messages": []}, "messages: list should have at least 1 item"),
    ],
)
def test_says_why_a_chat_refuses_a_field(fields: Json, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{expected}"):
        chat(**fields)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Hi", "messages.0: input should be an object."),
        ({"content": "a"}, "messages.0.role: field required."),
        ({"role": "function", "content": "a"}, "messages.0.role: input should be 'system'"),
        ({"role": "user"}, "messages.0: content is required"),
        ({"role": "user", "content": None}, "messages.0: content is required"),
        ({"role": "assistant", "content": None}, "messages.0: content is required"),
        ({"role": "assistant", "tool_calls": []}, "messages.0: content is required"),
        ({"role": "user", "content": 7}, "messages.0.content: input should be a valid array."),
        ({"role": "user", "content": []}, "messages.0.content: list should have at least 1 item"),
        ({"role": "user", "content": ["a"]}, "messages.0.content.0: input should be an object."),
        ({"role": "user", "content": [IMAGE]}, "messages.0.content.0.type: only text parts are supported, not images"),
        (
            {"role": "user", "content": [AUDIO]},
            "messages.0.content.0.type: only text parts are supported, not images, audio",
        ),
        ({"role": "user", "content": "a", "mood": 1}, "messages.0: mood: unknown field. Allowed: content, name"),
        (
            {"role": "user", "content": "a", "tool_calls": [CALL]},
            "messages.0: tool_calls .* allowed for role assistant only.",
        ),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "messages.0: tool_call_id is required"),
        ({"role": "tool", "content": "a"}, "messages.0: tool_call_id is required for role tool"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "messages.0: refusal: unknown field"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "city"}}]},
            "messages.0.tool_calls.0.function.arguments: invalid JSON",
        ),
    ],
)
def test_says_what_is_wrong_with_a_message(message: Any, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{expected}"):
        chat(messages=[message])


@ask
def test_decode_returns_the_model_and_requires_it(ask: Callable[..., DecodedRequest]) -> None:
    assert ask(model="other").model == "other"
    assert refused(ask, model=None).field == "model"


@ask
def test_names_all_wrong_fields_at_once(ask: Callable[..., DecodedRequest]) -> None:
    error = refused(ask, max_tokens=0, top_p=2, beam=1)
    assert all(f"{name}: " in str(error) for name in ("max_tokens", "top_p", "beam"))
    assert error.field is None


@pytest.mark.parametrize("decode", [requests.decode_completion, requests.decode_chat_completion])
@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"7", b'{"model": "\\ud800"}', b"[" * 10_000])
def test_refuses_a_body_that_is_no_json_object(decode: Decode, body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^the body: "):
        decode(body)


@pytest.mark.parametrize(
    ("params", "body"),
    [(completion_create_params, requests.COMPLETION_SCHEMA), (chat_create_params, requests.CHAT_COMPLETION_SCHEMA)],
)
def test_knows_every_field_that_the_client_can_send(params: Any, body: Json) -> None:
    fields = {*params.CompletionCreateParamsBase.__annotations__, "stream"}
    assert fields <= set(body["properties"])


# Any body at all

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["text", "user", "none"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bool, Json]:
    """A body of either API in which a few fields, or a field of a message, are anything."""
    is_chat = draw(st.booleans())
    known = sorted((requests.CHAT_COMPLETION_SCHEMA if is_chat else requests.COMPLETION_SCHEMA)["properties"])
    body: Json = {"model": "m", **({"messages": [{**MESSAGES[0]}]} if is_chat else {"prompt": "Hi"})}
    if is_chat and draw(st.booleans()):
        body["messages"][0][draw(st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id"]))] = draw(
            anything
        )
    return is_chat, body | draw(st.dictionaries(st.sampled_from(known), anything, max_size=3))


@given(bodies())
def test_any_body_is_decoded_as_its_schema_says_or_refused_in_a_sentence(asked: tuple[bool, Json]) -> None:
    is_chat, body = asked
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


@given(st.binary() | anything.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    for decode in (requests.decode_chat_completion, requests.decode_completion):
        with pytest.raises(RequestError):
            decode(body)


@pytest.mark.parametrize("schema", [requests.COMPLETION_SCHEMA, requests.CHAT_COMPLETION_SCHEMA])
def test_schemas_stand_on_their_own_and_show_no_private_name(schema: Json) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    written = json.dumps(schema)
    assert "$ref" not in written
    assert "$defs" not in written
    assert '"_' not in written


# How it is answered


def strictly(model: type[pydantic.BaseModel], content: Json) -> None:
    """`content` is of the client's type, says nothing beyond it, and loses nothing in it."""
    parsed = model.model_validate(content, strict=True)
    assert not list(unknown(parsed))
    assert parsed.model_dump(exclude_unset=True) == content


def unknown(value: Any) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        yield from value.model_extra or {}
        value = list(dict(value).values())
    if isinstance(value, list):
        for element in value:
            yield from unknown(element)


def token(text: str, logprob: float = -0.5, *, special: bool = False, top: tuple[Token, ...] = ()) -> Token:
    return Token(1, text, logprob, special, top)


TOKENS = (
    token("Hé", top=(token("Hé"), token("Ho", -1.5))),
    token("llo", -2.0, top=(token("p", -0.1), token("\ufffd", MIN_LOGPROB))),
    token("<|end|>", -0.1, special=True, top=(token("<|end|>", -0.1),)),
)
HELLO = Completion("Héllo", finish_reason=FinishReason.EOS_TOKEN, prompt_tokens=3, completion_tokens=3, tokens=TOKENS)
CUT = Completion("Hé", finish_reason=FinishReason.LENGTH, prompt_tokens=3, completion_tokens=1, tokens=TOKENS[:1])
STOPPED = Completion("", finish_reason=FinishReason.STOP_SEQUENCE, prompt_tokens=4, completion_tokens=2)


def test_answers_a_chat_in_the_clients_form() -> None:
    asked = chat(n=2)
    answer = responses.encode(asked, [HELLO, CUT])
    strictly(ChatCompletion, answer)
    assert answer == {
        "id": asked.id,
        "object": "chat.completion",
        "created": asked.created,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Héllo", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "Hé", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


def test_answers_completions_in_order_and_counts_each_prompt_once() -> None:
    answer = responses.encode(completions(prompt=["a", "b"], n=2), [HELLO, CUT, STOPPED, STOPPED])
    strictly(CompletionObject, answer)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "Héllo"),
        (1, "Hé"),
        (2, ""),
        (3, ""),
    ]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length", "stop", "stop"]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15}


def test_tells_log_probabilities_of_completions_with_the_chosen_token_among_its_rivals() -> None:
    answer = responses.encode(completions(logprobs=2), [HELLO])
    strictly(CompletionObject, answer)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["Hé", "llo"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"Hé": -0.5, "Ho": -1.5}, {"p": -0.1, "\ufffd": MIN_LOGPROB, "llo": -2.0}],
        "text_offset": [0, 2],
    }


def test_tells_log_probabilities_of_a_chat_with_bytes_where_they_are_known() -> None:
    answer = responses.encode(chat(logprobs=True, top_logprobs=2), [HELLO])
    strictly(ChatCompletion, answer)
    assert answer["choices"][0]["logprobs"]["content"] == [
        {
            "token": "Hé",
            "logprob": -0.5,
            "bytes": [72, 195, 169],
            "top_logprobs": [
                {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169]},
                {"token": "Ho", "logprob": -1.5, "bytes": [72, 111]},
            ],
        },
        {
            "token": "llo",
            "logprob": -2.0,
            "bytes": [108, 108, 111],
            "top_logprobs": [
                {"token": "p", "logprob": -0.1, "bytes": [112]},
                {"token": "\ufffd", "logprob": MIN_LOGPROB, "bytes": None},
            ],
        },
    ]


def test_tells_the_tier_where_one_was_asked_for() -> None:
    answer = responses.encode(chat(service_tier="auto"), [HELLO])
    strictly(ChatCompletion, answer)
    assert answer["service_tier"] == "default"


@pytest.mark.parametrize(("ask", "prefix"), [(completions, "cmpl-"), (chat, "chatcmpl-")])
def test_every_answer_has_its_own_id_and_the_time_of_its_request(
    ask: Callable[..., DecodedRequest], prefix: str
) -> None:
    before = int(time.time())
    first, second = ask(), ask()
    assert first.id.startswith(prefix)
    assert first.id != second.id
    assert before <= first.created <= time.time()


def test_describes_the_model() -> None:
    listed = models.model_list(["m"], created=5, context_tokens=None)
    assert listed == {"object": "list", "data": [models.model_card("m", created=5, context_tokens=None)]}
    strictly(Model, listed["data"][0])
    assert models.model_card("m", created=5, context_tokens=4096) == {**listed["data"][0], "max_model_len": 4096}


# How it is streamed


def chunks(events: Iterable[str]) -> list[Any]:
    """The content of events, each of which is whole and one line."""
    contents = []
    for event in events:
        assert event.startswith("data: ")
        assert event.endswith("\n\n")
        assert len(event.splitlines()) == 2
        contents.append("[DONE]" if event == "data: [DONE]\n\n" else json.loads(event.removeprefix("data: ")))
    return contents


def check(asked: DecodedRequest, chunk: Json) -> None:
    if asked.is_chat:
        strictly(ChatCompletionChunk, chunk)
        return
    # The client's type is that of a whole answer, whose finish reason is never null.
    ended = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
    strictly(CompletionObject, chunk | {"choices": ended})


def delta(
    index: int,
    text: str,
    prompt_tokens: int,
    completion_tokens: int,
    finish_reason: FinishReason | None = None,
    tokens: tuple[Token, ...] = (),
) -> CompletionDelta:
    return CompletionDelta(
        index=index,
        deltas=(TextDelta(text),) if text else (),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        finish_reason=finish_reason,
        tokens=tokens,
    )


def streamed(asked: DecodedRequest, pieces: list[CompletionDelta]) -> list[Any]:
    stream = EventEncoder(asked)
    events = [*stream.begin(), *(event for piece in pieces for event in stream.delta(piece)), *stream.end()]
    assert stream.end() == stream.delta(pieces[-1]) == stream.error(NotFound("late")) == []
    contents = chunks(events)
    assert contents.pop() == "[DONE]"
    for chunk in contents:
        check(asked, chunk)
        assert (chunk["id"], chunk["created"], chunk["model"]) == (asked.id, asked.created, "m")
    return contents


PIECES = [
    delta(0, "Hé", 3, 1, tokens=TOKENS[:1]),
    delta(1, "", 3, 1),
    delta(0, "", 3, 2, tokens=TOKENS[1:2]),
    delta(1, "Ho\u2028", 3, 2, FinishReason.LENGTH),
    delta(0, "llo", 3, 3, FinishReason.EOS_TOKEN, tokens=TOKENS[2:]),
]


def test_streams_a_chat_beginning_with_who_speaks() -> None:
    choices = [chunk["choices"] for chunk in streamed(chat(stream=True, n=2), PIECES)]
    assert all(len(of_chunk) == 1 for of_chunk in choices)
    assert [(choice["index"], choice["delta"], choice["finish_reason"]) for (choice,) in choices] == [
        (0, {"role": "assistant", "content": ""}, None),
        (1, {"role": "assistant", "content": ""}, None),
        (0, {"content": "Hé"}, None),
        (1, {"content": "Ho\u2028"}, "length"),
        (0, {"content": "llo"}, "stop"),
    ]


def test_streams_completions_of_several_prompts() -> None:
    chunks_ = streamed(completions(stream=True, prompt=["a", "b"]), PIECES)
    assert [(c["index"], c["text"], c["finish_reason"]) for chunk in chunks_ for c in chunk["choices"]] == [
        (0, "Hé", None),
        (1, "Ho\u2028", "length"),
        (0, "llo", "stop"),
    ]


def test_an_end_without_text_has_an_empty_delta() -> None:
    last = streamed(chat(stream=True), [delta(0, "", 3, 1, FinishReason.EOS_TOKEN)])[-1]
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


@ask
def test_tells_no_usage_in_a_stream_unless_asked(ask: Callable[..., DecodedRequest]) -> None:
    assert not any("usage" in chunk for chunk in streamed(ask(stream=True, n=2), PIECES))


@pytest.mark.parametrize(
    ("asked", "prompt_tokens"),
    [
        (chat(stream=True, stream_options={"include_usage": True}, n=2), 3),
        (completions(stream=True, stream_options={"include_usage": True}, prompt=["a", "b"]), 6),
    ],
)
def test_counts_the_tokens_of_a_stream_in_a_last_chunk_without_choices(
    asked: DecodedRequest, prompt_tokens: int
) -> None:
    *before, last = streamed(asked, PIECES)
    assert all(chunk["usage"] is None for chunk in before)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 5,
        "total_tokens": prompt_tokens + 5,
    }


def test_streams_log_probabilities_also_while_text_is_held_back() -> None:
    of_chat = streamed(chat(stream=True, logprobs=True, n=2), PIECES)
    told = [c for chunk in of_chat for c in chunk["choices"] if c["index"] == 0 and c["logprobs"]]
    assert [c["delta"] for c in told] == [{"content": "Hé"}, {"content": ""}, {"content": "llo"}]
    assert [[t["token"] for t in c["logprobs"]["content"]] for c in told] == [["Hé"], ["llo"], []]


def test_offsets_of_streamed_tokens_count_on() -> None:
    of_completions = streamed(completions(stream=True, logprobs=0, n=2), PIECES)
    told = [c["logprobs"] for chunk in of_completions for c in chunk["choices"] if c["index"] == 0]
    assert [logprobs["text_offset"] for logprobs in told] == [[0], [2], []]


@given(st.text(), st.lists(st.text(), max_size=3), st.floats(MIN_LOGPROB, 0))
def test_any_text_and_probability_makes_whole_events(text: str, tokens: list[str], logprob: float) -> None:
    told = tuple(token(one, logprob, top=(token(one, logprob),)) for one in tokens)
    piece = delta(0, text, 1, len(tokens), FinishReason.LENGTH, told)
    for asked in (chat(stream=True, logprobs=True), completions(stream=True, logprobs=1)):
        (choice,) = streamed(asked, [piece])[-1]["choices"]
        assert (choice["delta"]["content"] if asked.is_chat and (text or tokens) else choice.get("text", "")) == text


# How it fails


@pytest.mark.parametrize(
    ("error", "kind", "param", "code"),
    [
        (InvalidRequest("No."), "invalid_request_error", None, None),
        (InvalidRequest("No.", "top_p"), "invalid_request_error", "top_p", None),
        (errors.PromptTooLong("No.", "messages"), "invalid_request_error", "messages", "context_length_exceeded"),
        (errors.Unauthorized("No."), "authentication_error", None, "invalid_api_key"),
        (errors.Forbidden("No."), "permission_error", None, None),
        (NotFound("No."), "not_found_error", None, None),
        (errors.BodyTooLarge("No."), "invalid_request_error", None, None),
        (errors.Overloaded("No."), "rate_limit_error", None, "rate_limit_exceeded"),
        (errors.GenerationFailed("No."), "server_error", None, None),
        (errors.Draining("No."), "server_error", None, None),
        (errors.DeadlineExceeded("No."), "timeout", None, None),
    ],
)
def test_describes_an_error_as_the_api_does(
    error: RequestError, kind: str, param: str | None, code: str | None
) -> None:
    assert responses.encode_error(error) == {"error": {"message": "No.", "type": kind, "param": param, "code": code}}


def test_tells_what_was_generated_before_the_time_was_over() -> None:
    described = responses.encode_error(errors.DeadlineExceeded("Too late.", ("Hé", "")))["error"]
    assert described["partial"] == ["Hé", ""]


# What the client makes of it


def client(status: int, content: str, kind: str) -> client_package.OpenAI:
    answer = httpx2.Response(status, text=content, headers={"content-type": kind})
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: answer), trust_env=False)
    return client_package.OpenAI(base_url="http://m/v1", api_key="k", http_client=http, max_retries=0)


def test_the_client_reads_a_stream_to_its_end() -> None:
    stream = EventEncoder(chat(stream=True))
    events = [*stream.begin(), *stream.delta(delta(0, "Héllo", 3, 3, FinishReason.EOS_TOKEN)), *stream.end()]
    with client(200, "".join(events), "text/event-stream") as connected:
        told = list(connected.chat.completions.create(model="m", messages=[], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == "Héllo"


def test_the_client_raises_the_error_that_ends_a_stream() -> None:
    stream = EventEncoder(completions(stream=True))
    events = [
        *stream.begin(),
        *stream.delta(delta(0, "Hé", 3, 1)),
        *stream.error(errors.GenerationFailed("No luck.")),
    ]
    assert stream.end() == []
    told: list[str] = []
    with client(200, "".join(events), "text/event-stream") as connected:
        chunks = connected.completions.create(model="m", prompt="a", stream=True)
        with pytest.raises(client_package.APIError, match=r"^No luck\.$") as raised:
            told.extend(chunk.choices[0].text for chunk in chunks)
    assert told == ["Hé"]
    assert raised.value.type == "server_error"


def test_the_client_knows_the_field_that_was_refused() -> None:
    error = refused(chat, top_p=2)
    content = json.dumps(responses.encode_error(error))
    with (
        client(error.status, content, "application/json") as connected,
        pytest.raises(client_package.BadRequestError) as raised,
    ):
        connected.chat.completions.create(model="m", messages=[])
    assert raised.value.param == "top_p"
