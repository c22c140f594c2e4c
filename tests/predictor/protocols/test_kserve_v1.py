"""KServe v1: bodies."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.errors import InvalidRequest
from predictor.observability import request_record
from predictor.observability.request_record import RequestRecord
from predictor.protocols import kserve_v1, open_inference_generate
from predictor.types import Chat, Completion, FinishReason, GenerationRequest, Token

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["instances", "text_input", "parameters", "role", "stop"]), inner, max_size=3)
    ),
)


@pytest.mark.parametrize(
    ("instance", "expected"),
    [
        (5, "instances.0: expected a prompt or a list of messages."),
        ({"text": "a"}, "instances.0: expected a prompt or a list of messages."),
        ([], "instances.0.messages: list should have at least 1 item"),
        (["a"], "instances.0.messages.0: input should be an object."),
        ([{"role": "user"}], "instances.0.messages.0.content: field required."),
        ("", "instances.0.prompt: string should have at least 1 character."),
    ],
)
def test_decode_invalid_instance_raises_with_its_path(instance: Any, expected: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        kserve_v1.decode(json.dumps({"instances": [instance]}).encode())
    assert str(raised.value).startswith(expected)


@given(st.binary() | any_json.map(lambda value: json.dumps(value).encode()))
def test_decode_any_bytes_raises_without_class_names(body: bytes) -> None:
    for decode in (kserve_v1.decode, lambda raw: open_inference_generate.decode(raw, "m", None)):
        reason = ""
        try:
            decode(body)
        except InvalidRequest as error:
            reason = str(error)
        assert not any(
            word in reason
            for word in ("_PredictRequest", "_GenerateRequest", "_Message", "Sampling", "_Parameters", "set_int_max")
        )


def test_decode_prompts_and_chats_keeps_their_order() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    body = json.dumps({"instances": ["a", chat], "parameters": {"max_tokens": 3}}).encode()
    requests = kserve_v1.decode(body)
    assert [request.prompt for request in requests] == ["a", Chat(tuple(chat))]
    assert {request.sampling.max_tokens for request in requests} == {3}
    completion = Completion("b", finish_reason=FinishReason.LENGTH, prompt_tokens=1, completion_tokens=1)
    assert kserve_v1.encode(requests, [completion, completion]) == {"predictions": ["b", "b"]}
    [several] = kserve_v1.decode(b'{"instances": ["a"], "parameters": {"best_of": 2}}')
    candidates = [
        replace(completion, text=text, tokens=(Token(7, text, value),)) for text, value in (("c", -2), ("d", -1))
    ]
    assert kserve_v1.encode([several], candidates) == {"predictions": ["d"]}


def test_decode_unknown_fields_are_ignored_and_recorded() -> None:
    body = json.dumps({"instances": ["a"], "signature": 1, "parameters": {"max_token": 5, "user": "u"}}).encode()
    with request_record.bind(RequestRecord()) as record:
        assert kserve_v1.decode(body) == [GenerationRequest("a")]
        assert kserve_v1.decode(b'{"instances": ["a"], "parameters": null}') == [GenerationRequest("a")]
    assert record.ignored_fields == ["signature", "parameters.max_token"]


@pytest.mark.parametrize("body", [b"", b"{}", b'{"instances": []}', b'{"instances": [7]}', b'{"instances": [""]}'])
def test_decode_invalid_body_raises(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"instances|is empty"):
        kserve_v1.decode(body)
