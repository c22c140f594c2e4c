"""LiteLLM's `openai/`, `hosted_vllm/`, `text-completion-openai/` and `anthropic/` providers."""

import json
from typing import Any

import litellm
import pytest
from lessons import EXPRESSION, JSON_QUESTION, MODEL, QUESTION, REPORT, SUM, TOOL, WORKING, Sum

ASK = [{"role": "user", "content": QUESTION}]


@pytest.fixture(params=["openai", "hosted_vllm"])
def options(base_url: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    return {
        "model": f"{request.param}/{MODEL}",
        "base_url": base_url,
        "api_key": "none",
        "temperature": 0,
        "max_retries": 0,
    }


def test_completion(options: dict[str, Any]) -> None:
    assert litellm.completion(messages=ASK, **options).choices[0].message.content == WORKING


def test_stream(options: dict[str, Any]) -> None:
    chunks = list(litellm.completion(messages=ASK, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == WORKING
    assert litellm.stream_chunk_builder(chunks, messages=ASK).usage.completion_tokens > 0


def test_text_completion(base_url: str) -> None:
    completion = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="17+25=", api_base=base_url, api_key="none", max_tokens=30
    )
    assert completion.choices[0].text == " " + WORKING


def test_tool_call_and_its_result(options: dict[str, Any]) -> None:
    message = litellm.completion(messages=ASK, tools=[TOOL], **options).choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == {"expression": EXPRESSION}
    result = {"role": "tool", "tool_call_id": call.id, "content": "42"}
    answer = litellm.completion(messages=[*ASK, message, result], tools=[TOOL], **options)
    assert answer.choices[0].message.content == REPORT


def test_tool_call_stream(options: dict[str, Any]) -> None:
    chunks = list(litellm.completion(messages=ASK, tools=[TOOL], stream=True, **options))
    choice = litellm.stream_chunk_builder(chunks, messages=ASK).choices[0]
    [call] = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"expression": EXPRESSION}
    assert choice.finish_reason == "tool_calls"


def test_tool_choice_required(options: dict[str, Any]) -> None:
    completion = litellm.completion(messages=ASK, tools=[TOOL], tool_choice="required", **options)
    assert completion.choices[0].message.tool_calls[0].function.name == "calculator"


def test_response_format(options: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": JSON_QUESTION}]
    content = litellm.completion(messages=messages, response_format=Sum, **options).choices[0].message.content
    assert Sum.model_validate_json(content) == SUM


@pytest.mark.parametrize("effort", ["none", "low", "high"])
def test_reasoning_effort(options: dict[str, Any], effort: str) -> None:
    completion = litellm.completion(
        messages=ASK, reasoning_effort=effort, allowed_openai_params=["reasoning_effort"], **options
    )
    assert completion.choices[0].message.content == WORKING


def test_responses(base_url: str) -> None:
    response = litellm.responses(
        model=f"openai/{MODEL}", input=QUESTION, api_base=base_url, api_key="none", temperature=0
    )
    assert response.output[0].content[0].text == WORKING


def test_anthropic_provider(server_url: str) -> None:
    completion = litellm.completion(
        model=f"anthropic/{MODEL}", messages=ASK, tools=[TOOL], api_base=server_url, api_key="none", temperature=0
    )
    [call] = completion.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"expression": EXPRESSION}
