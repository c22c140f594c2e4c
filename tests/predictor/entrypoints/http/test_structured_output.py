"""Structured output over HTTP: the demo model writes what it never learned, since its tokens are restricted."""

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.predictor import servers

ANSWER = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}, "unit": {"enum": ["none", "apples"]}},
    "required": ["sum", "unit"],
    "additionalProperties": False,
}


def test_infer_guided_json_validates(client: httpx.Client) -> None:
    response = client.post(
        "/v2/models/demo/infer",
        json={
            "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [3], "data": ["1+1=", "2+2=", "3+3="]}],
            "parameters": {"guided_json": json.dumps(ANSWER), "temperature": 2.0, "seed": 1, "max_tokens": 300},
        },
    )
    texts = response.json()["outputs"][0]["data"]
    assert len(texts) == 3
    for text in texts:
        jsonschema.validate(json.loads(text), ANSWER)


def test_generate_stream_of_a_choice_is_one_of_them(client: httpx.Client) -> None:
    body = {"text_input": "17+25=", "parameters": {"guided_choice": ["forty-two", "no idea"], "max_tokens": 30}}
    response = client.post("/v2/models/demo/generate_stream", json=body)
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]
    assert "".join(event["text_output"] for event in events) in {"forty-two", "no idea"}


def test_chat_unconstrained_neighbour_is_unchanged(client: httpx.Client) -> None:
    def ask(**fields: Any) -> list[str]:
        body = {"model": "demo", "prompt": ["17+25=", "60-91="], "max_tokens": 30, "temperature": 0, **fields}
        return [choice["text"] for choice in client.post("/v1/completions", json=body).json()["choices"]]

    plain = ask()
    constrained = ask(structured_outputs={"regex": "[a-c]{5}"})
    assert all(len(text) == 5 and set(text) <= set("abc") for text in constrained)
    assert ask() == plain


def test_max_tokens_cuts_structured_output_with_reason_length(client: httpx.Client) -> None:
    body = {"model": "demo", "prompt": "1", "max_tokens": 3, "structured_outputs": {"regex": "a{50}"}}
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    assert (choice["finish_reason"], set(choice["text"])) == ("length", {"a"})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_unsupported_structured_output_is_400_with_the_reason(
    client: httpx.Client, fields: dict[str, Any], reason: str
) -> None:
    response = client.post("/v1/completions", json={"model": "demo", "prompt": "1", **fields})
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_structured_output_that_contradicts_min_tokens_is_400(client: httpx.Client) -> None:
    body = {"model": "demo", "prompt": "1", "min_tokens": 5, "structured_outputs": {"choice": ["a"]}}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert "min_tokens" in response.json()["error"]["message"]


THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|><think>"
    "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
)


def test_answer_of_a_reasoning_model_is_structured_after_the_reasoning(weights: Path) -> None:
    template = weights / "chat_template.jinja"
    template.unlink()
    template.write_text(THINKING)
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    body = {"model": "thinking", "messages": messages, "max_tokens": 100, "temperature": 0}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}
    with servers.in_process("--model_dir", str(weights), model_name="thinking") as server:
        thought, answered = (
            server.client.post("/v1/chat/completions", json={**body, "reasoning_effort": effort}).json()
            for effort in ("high", "none")
        )
    # The model has not learned to end its reasoning.
    [choice] = thought["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert choice["message"]["reasoning_content"] == choice["message"]["reasoning"]
    assert thought["usage"]["completion_tokens_details"]["reasoning_tokens"] > 90
    [choice] = answered["choices"]
    assert "reasoning" not in choice["message"]
    jsonschema.validate(json.loads(choice["message"]["content"]), ANSWER)
