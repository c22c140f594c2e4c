"""OpenAI's SDK: completions, chat, tools, structured output."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from lessons import (
    CITIES_QUESTION,
    EXPRESSION,
    FUNCTION,
    JSON_QUESTION,
    MODEL,
    QUESTION,
    REPORT,
    SUM,
    TOOL,
    WEATHER_TOOL,
    WORKING,
    Sum,
)
from pydantic import BaseModel

ASK = [{"role": "user", "content": QUESTION}]
NAMED = {"type": "function", "function": {"name": "calculator"}}
STRICT_TOOL = {"type": "function", "function": {**FUNCTION, "strict": True}}


@pytest.fixture
def client(openai_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=openai_url, api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"temperature": 0, **options}).choices[0]


def test_chat(client: openai.OpenAI) -> None:
    assert chat(client, ASK).message.content == WORKING


def test_chat_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=ASK, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == WORKING
    assert len(deltas) > 1


def test_completion(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="17+25=", max_tokens=30, temperature=0)
    assert completion.choices[0].text == " " + WORKING


def test_completion_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt="17+25=", max_tokens=30, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == " " + WORKING


def test_tool_call_and_its_result(client: openai.OpenAI) -> None:
    choice = chat(client, ASK, tools=[TOOL])
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "calculator")
    assert json.loads(call.function.arguments) == {"expression": EXPRESSION}
    result = {"role": "tool", "tool_call_id": call.id, "content": "42"}
    answer = chat(client, [*ASK, choice.message, result], tools=[TOOL])
    assert (answer.finish_reason, answer.message.content, answer.message.tool_calls) == ("stop", REPORT, None)


def test_parallel_tool_calls(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": CITIES_QUESTION}]
    choice = chat(client, messages, tools=[WEATHER_TOOL])
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [
        {"place": "Paris"},
        {"place": "Berlin"},
    ]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    single = chat(client, messages, tools=[WEATHER_TOOL], parallel_tool_calls=False)
    assert len(single.message.tool_calls) == 1


def test_tool_call_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": CITIES_QUESTION}], tools=[WEATHER_TOOL], temperature=0
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.index, json.loads(event.arguments)["place"]) for event in done] == [(0, "Paris"), (1, "Berlin")]
    assert final.finish_reason == "tool_calls"
    assert len({call.id for call in final.message.tool_calls}) == 2
    assert len({event.chunk.id for event in events if event.type == "chunk"}) == 1


def test_tool_choice_none_calls_no_tool(client: openai.OpenAI) -> None:
    message = chat(client, ASK, tools=[TOOL], tool_choice="none").message
    assert (message.content, message.tool_calls) == (WORKING, None)


def test_parse_returns_the_model(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": JSON_QUESTION}], response_format=Sum, temperature=0
    )
    assert completion.choices[0].message.parsed == SUM


def test_parse_stream_returns_the_model(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": JSON_QUESTION}], response_format=Sum, temperature=0
    ) as stream:
        assert stream.until_done().get_final_completion().choices[0].message.parsed == SUM


def test_parse_of_a_tool_returns_its_arguments(client: openai.OpenAI) -> None:
    class Calculator(BaseModel):
        """Evaluate a sum."""

        expression: str

    tool = openai.pydantic_function_tool(Calculator, name="calculator")
    completion = client.chat.completions.parse(model=MODEL, messages=ASK, tools=[tool], temperature=0)
    [call] = completion.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Calculator(expression=EXPRESSION)


def test_json_object(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": JSON_QUESTION}]
    content = chat(client, messages, response_format={"type": "json_object"}).message.content
    assert Sum.model_validate_json(content) == SUM


def test_reasoning_effort(client: openai.OpenAI) -> None:
    assert chat(client, ASK, reasoning_effort="low").message.content == WORKING
