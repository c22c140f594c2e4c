"""Generate extension: bodies and streams."""

import json

from predictor.protocols import open_inference_generate
from predictor.types import FinishReason, SamplingParams, Token
from tests.predictor.protocols.deltas import delta


def test_decode_without_parameters_uses_the_specifications_defaults() -> None:
    decoded = open_inference_generate.decode(b'{"text_input": "Hi"}', "m", None)
    assert decoded.request.sampling == SamplingParams(max_tokens=20, temperature=1.0)


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
