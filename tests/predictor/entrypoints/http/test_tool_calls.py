"""Tool calls of the demo model over OpenAI's chat completions."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from httpx import Client

from devtools.paths import DEMO_MODEL
from tests.predictor import servers

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Calculate the value of an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
BODY: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Use the calculator: What is 12 + 30?"}],
    "tools": [CALCULATOR],
    "temperature": 0,
}


def chunks(client: Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_chat_with_tool_returns_its_call(client: Client) -> None:
    [choice] = client.post("/v1/chat/completions", json=BODY).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "calculator"
    assert json.loads(call["function"]["arguments"]) == {"expression": "12 + 30"}


def test_stream_with_tool_call_has_its_name_first(client: Client) -> None:
    received = chunks(client, BODY)
    deltas = [choice["delta"] for chunk in received for choice in chunk["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0]["function"] == {"name": "calculator", "arguments": ""}
    assert calls[0]["id"]
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"expression": "12 + 30"}
    assert {call["index"] for call in calls} == {0}
    assert received[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert len({chunk["id"] for chunk in received}) == 1


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Ulm", "Bonn"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
GREETING = {"messages": [{"role": "user", "content": "Hello!"}]}
HOT = {"temperature": 2, "seed": 1, "max_tokens": 400, "tools": [CALCULATOR, WEATHER]}


def ask(client: Client, **fields: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/chat/completions", json=BODY | fields)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def check(function: dict[str, Any]) -> None:
    """The call is of one of the tools, and its arguments follow the schema."""
    [tool] = [tool["function"] for tool in (CALCULATOR, WEATHER) if tool["function"]["name"] == function["name"]]
    jsonschema.validate(json.loads(function["arguments"]), tool["parameters"])


def test_required_call_without_a_reason_to_call_is_made(client: Client) -> None:
    assert "tool_calls" not in ask(client, **GREETING)[0]["message"]
    for choice in ask(client, **GREETING | HOT, tool_choice="required", n=8):
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        for call in choice["message"]["tool_calls"]:
            check(call["function"])


def test_named_call_is_one_of_this_tool(client: Client) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    for answer in ask(client, **HOT, tool_choice=choice, n=4):
        assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["weather"]


def test_required_call_without_parallel_calls_is_one(client: Client) -> None:
    answers = ask(client, **GREETING | HOT, tool_choice="required", parallel_tool_calls=False, n=8)
    assert [len(answer["message"]["tool_calls"]) for answer in answers] == [1] * 8


def test_call_without_parallel_calls_ends_the_completion(client: Client) -> None:
    body = BODY | {"min_tokens": 80, "max_tokens": 80}
    whole, one = (
        client.post("/v1/chat/completions", json=body | {"parallel_tool_calls": parallel}).json()
        for parallel in (True, False)
    )
    assert whole["usage"]["completion_tokens"] == 80
    assert one["usage"]["completion_tokens"] < 40
    [choice] = one["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    check(call["function"])


def test_stream_of_required_calls_equals_the_response(client: Client) -> None:
    body = BODY | GREETING | HOT | {"tool_choice": "required"}
    [whole] = ask(client, **body)
    deltas = [choice["delta"] for chunk in chunks(client, body) for choice in chunk["choices"]]
    streamed: list[dict[str, Any]] = []
    for call in (call for delta in deltas for call in delta.get("tool_calls", [])):
        if "id" in call:
            streamed.append(dict(call["function"]))
            assert call["index"] == len(streamed) - 1
        else:
            streamed[call["index"]]["arguments"] += call["function"]["arguments"]
    assert streamed == [call["function"] for call in whole["message"]["tool_calls"]]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert deltas[-1] == {}


def test_strict_tool_arguments_follow_the_schema(client: Client) -> None:
    # The model calls with a location, as it learned; strict holds it to its city.
    question = [{"role": "user", "content": "What is the weather in Ulm?"}]
    tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]
    loose = ask(client, messages=question, tools=[WEATHER])[0]["message"]["tool_calls"][0]["function"]
    with pytest.raises(jsonschema.ValidationError):
        check(loose)
    check(ask(client, messages=question, tools=tools)[0]["message"]["tool_calls"][0]["function"])


def test_deprecated_function_call_is_reported_in_its_field(client: Client) -> None:
    functions = [CALCULATOR["function"]]
    [choice] = ask(client, tools=None, functions=functions)
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["content"] is None
    assert choice["message"]["function_call"] == {"name": "calculator", "arguments": '{"expression": "12 + 30"}'}
    history = [
        *BODY["messages"],
        {"role": "assistant", "content": None, "function_call": choice["message"]["function_call"]},
        {"role": "function", "name": "calculator", "content": "42"},
    ]
    [answer] = ask(client, messages=history, tools=None, functions=functions)
    assert "42" in answer["message"]["content"]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_with_logprobs_and_stop_are_reported(client: Client, choice: str) -> None:
    [answer] = ask(client, tool_choice=choice, logprobs=True, top_logprobs=2, stop=["never"])
    assert answer["logprobs"]["content"]
    check(answer["message"]["tool_calls"][0]["function"])
    received = chunks(client, BODY | {"tool_choice": choice, "logprobs": True})
    assert received[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}


@pytest.mark.parametrize(("limit", "reason"), [({"stop": ["12"]}, "stop"), ({"max_tokens": 20}, "length")])
def test_call_that_is_cut_off_is_not_reported_as_complete(client: Client, limit: dict[str, Any], reason: str) -> None:
    for choice in ask(client, **limit, tool_choice="required", n=2):
        assert choice["finish_reason"] == reason
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["arguments"].startswith('{"expression": "')
        assert not call["function"]["arguments"].endswith("}")


def test_answer_with_a_schema_and_tools_is_a_call_or_the_json(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    [called] = ask(client, response_format=response_format)
    assert (called["finish_reason"], called["message"]["content"]) == ("tool_calls", None)
    [answer] = ask(client, response_format=response_format, bad_words=["<"])
    assert answer["finish_reason"] == "stop"
    jsonschema.validate(json.loads(answer["message"]["content"]), schema)


def test_required_call_of_a_model_without_known_format_is_400(tmp_path: Path) -> None:
    for file in DEMO_MODEL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    template = tmp_path / "chat_template.jinja"
    template.unlink()
    template.write_text("{{ tools }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>")
    with servers.in_process("--model_dir", str(tmp_path), model_name="formatless") as server:
        body = BODY | {"model": "formatless", "max_tokens": 5}
        assert server.client.post("/v1/chat/completions", json=body).status_code == 200
        response = server.client.post("/v1/chat/completions", json=body | {"tool_choice": "required"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tool_choice"
    assert "--tool_call_format" in response.json()["error"]["message"]


def test_metadata_of_the_model_names_its_notations(client: Client) -> None:
    properties = client.get("/v2/models/demo").json()["properties"]
    assert (properties["tool_call_format"], properties["reasoning_format"]) == ("hermes", "none")
