"""Tool calls of the demo model over OpenAI's chat completions."""

import json
from typing import Any

from httpx import Client

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Calculate the value of an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
BODY = {
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
