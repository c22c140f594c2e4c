"""Structured output in the words of OpenAI and vLLM, in every protocol."""

import json
from typing import Any

import pytest

from predictor.errors import InvalidRequest
from predictor.protocols import kserve_v1, open_inference, open_inference_generate
from predictor.protocols.openai import requests
from predictor.types import GrammarKind, SamplingParams, StructuredOutput

SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}}
OF_SCHEMA = StructuredOutput(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
ANY_OBJECT = StructuredOutput(GrammarKind.JSON_SCHEMA, '{"type": "object"}')


def chat(fields: dict[str, Any]) -> SamplingParams:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return requests.decode_chat_completion(json.dumps(body).encode()).requests[0].sampling


def completion(fields: dict[str, Any]) -> SamplingParams:
    return (
        requests.decode_completion(json.dumps({"model": "m", "prompt": "Hi", **fields}).encode()).requests[0].sampling
    )


def generate(fields: dict[str, Any]) -> SamplingParams:
    body = {"text_input": "Hi", "parameters": fields}
    return open_inference_generate.decode(json.dumps(body).encode(), "m", None).request.sampling


def predict(fields: dict[str, Any]) -> SamplingParams:
    return kserve_v1.decode(json.dumps({"instances": ["Hi"], "parameters": fields}).encode())[0].sampling


@pytest.mark.parametrize("decode", [chat, completion, generate, predict])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, OF_SCHEMA),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            OF_SCHEMA,
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, ANY_OBJECT),
        ({"structured_outputs": {"json": SCHEMA}}, OF_SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, OF_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(GrammarKind.REGEX, "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(GrammarKind.CHOICE, '["a", "b"]')),
        ({"structured_outputs": {"grammar": "start: /a/"}}, StructuredOutput(GrammarKind.GRAMMAR, "start: /a/")),
        ({"structured_outputs": {}, "guided_regex": "a"}, StructuredOutput(GrammarKind.REGEX, "a")),
        ({"guided_json": SCHEMA}, OF_SCHEMA),
        ({"guided_choice": ["a"]}, StructuredOutput(GrammarKind.CHOICE, '["a"]')),
        ({"guided_grammar": "start: /a/"}, StructuredOutput(GrammarKind.GRAMMAR, "start: /a/")),
        # Parameters of Open Inference are scalars: JSON in a string.
        ({"response_format": '{"type": "json_object"}'}, ANY_OBJECT),
        ({"structured_outputs": '{"choice": ["a"]}'}, StructuredOutput(GrammarKind.CHOICE, '["a"]')),
        ({"guided_json": json.dumps(SCHEMA)}, OF_SCHEMA),
        ({"guided_choice": '["a"]'}, StructuredOutput(GrammarKind.CHOICE, '["a"]')),
    ],
)
def test_decode_structured_output_gives_its_grammar(
    decode: Any, fields: dict[str, Any], expected: StructuredOutput | None
) -> None:
    assert decode(fields).structured_output == expected


def test_decode_structured_output_of_infer_is_a_string_parameter() -> None:
    payload = open_inference.parse(
        json.dumps(
            {
                "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}],
                "parameters": {"guided_json": json.dumps(SCHEMA)},
            }
        ).encode(),
        "m",
    )
    assert open_inference.decode(payload)[0].sampling.structured_output == OF_SCHEMA


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"guided_regex": "a", "guided_json": SCHEMA}, "not guided_json and guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "not response_format and guided_regex"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag: not supported"),
        ({"grammar": 'root ::= "a"'}, "grammar: not supported. Use structured_outputs"),
    ],
)
def test_decode_invalid_structured_output_raises_with_its_name(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        chat(fields)
