"""Generate extension: bodies and streams."""

import json
from typing import Any

import pytest

from predictor.errors import InvalidRequest
from predictor.observability import request_record
from predictor.observability.request_record import RequestRecord
from predictor.protocols import open_inference_generate
from predictor.types import FinishReason, SamplingParams, Token
from tests.predictor.protocols.deltas import delta


def test_decode_without_parameters_uses_the_specifications_defaults() -> None:
    decoded = open_inference_generate.decode(b'{"text_input": "Hi"}', "m", None)
    assert decoded.request.sampling == SamplingParams(max_tokens=20, temperature=1.0)


def test_decode_parameters_next_to_the_text_are_those_of_parameters() -> None:
    def sampling(**fields: Any) -> SamplingParams:
        body = json.dumps({"text_input": "Hi"} | fields).encode()
        return open_inference_generate.decode(body, "m", None).request.sampling

    parameters = {"max_tokens": 5, "temperature": 0, "top_k": 3, "seed": 7, "stop": ["a"]}
    assert sampling(**parameters) == sampling(parameters=parameters)
    assert sampling(max_tokens=5, parameters={"max_tokens": 6}).max_tokens == 6
    assert sampling(max_tokens=5, parameters={"top_k": 3}).max_tokens == 5
    assert sampling(stop="a", stop_words=["b"]).stop == ("a", "b")
    with request_record.bind(RequestRecord()) as record:
        for unset in ({"parameters": None}, {"stop_words": "", "bad_words": ""}, {"stream": False, "id": "1"}):
            assert sampling(**unset) == sampling()
        assert record.ignored_fields == []
        assert sampling(max_token=1, parameters={"top": 1}) == sampling()
    assert record.ignored_fields == ["max_token", "parameters.top"]


def test_decode_exclude_input_in_output_echoes_only_if_false() -> None:
    for exclude in (True, False):
        body = json.dumps({"text_input": "Hi", "parameters": {"exclude_input_in_output": exclude}}).encode()
        assert open_inference_generate.decode(body, "m", None).request.echo is not exclude


def test_stream_details_of_a_completion_without_tokens_have_none() -> None:
    decoded = open_inference_generate.decode(b'{"text_input": "Hi", "id": "7", "details": true}', "m", None)
    [event] = open_inference_generate.EventEncoder(decoded).delta(delta(0, "", 1, 0, FinishReason.LENGTH))
    assert json.loads(event.removeprefix("data: ")) == {
        "text_output": "",
        "id": "7",
        "model_name": "m",
        "details": {"finish_reason": "length", "logprobs": []},
    }


def test_decode_stream_with_several_candidates_raises() -> None:
    body = b'{"text_input": "Hi", "best_of": 2}'
    assert open_inference_generate.decode(body, "m", None).request.n == 2
    with pytest.raises(InvalidRequest, match="best_of is not possible in a stream"):
        open_inference_generate.decode_stream(body, "m", None)


def test_stream_event_is_one_line_for_clients_that_split_at_any_line_separator() -> None:
    decoded = open_inference_generate.decode(b'{"text_input": "a"}', "m", None)
    [event] = open_inference_generate.EventEncoder(decoded).delta(delta(0, "é\u2028\u0085", 1, 1))
    line, end = event.splitlines()
    assert json.loads(line.removeprefix("data: "))["text_output"] == "é\u2028\u0085"
    assert end == ""


def test_stream_details_are_in_the_last_event() -> None:
    decoded = open_inference_generate.decode(b'{"text_input": "Hi", "parameters": {"details": true}}', "m", "1")
    stream = open_inference_generate.EventEncoder(decoded)
    token = Token(7, "a", -0.5)
    [first] = stream.delta(delta(0, "a", 1, 1, tokens=(token,)))
    assert json.loads(first.removeprefix("data: ")) == {"text_output": "a", "model_name": "m", "model_version": "1"}
    assert stream.delta(delta(0, "", 1, 1)) == []
    [last] = stream.delta(delta(0, "", 1, 2, FinishReason.LENGTH, (token,)))
    details = json.loads(last.removeprefix("data: "))["details"]
    assert (details["finish_reason"], details["token"]["id"], len(details["logprobs"])) == ("length", 7, 2)
