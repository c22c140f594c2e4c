"""OpenAI's SDK: completions, chat, tools, structured output."""

import asyncio
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


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_tool_choice_forces_a_call(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    options: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Who are you?"}],
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 200,
        "temperature": 0,
    }
    if stream:
        with client.chat.completions.stream(model=MODEL, **options) as events:
            completion = events.until_done().get_final_completion()
    else:
        completion = client.chat.completions.create(model=MODEL, **options)
    call = completion.choices[0].message.tool_calls[0]
    assert call.function.name == "calculator"
    assert isinstance(json.loads(call.function.arguments)["expression"], str)


def test_tool_choice_none_calls_no_tool(client: openai.OpenAI) -> None:
    message = chat(client, ASK, tools=[TOOL], tool_choice="none").message
    assert (message.content, message.tool_calls) == (WORKING, None)


def test_strict_tool_has_arguments_of_its_schema(client: openai.OpenAI) -> None:
    for seed in range(5):
        choice = chat(client, ASK, tools=[STRICT_TOOL], tool_choice="required", temperature=2, seed=seed)
        for call in choice.message.tool_calls:
            arguments = json.loads(call.function.arguments)
            assert list(arguments) == ["expression"]
            assert isinstance(arguments["expression"], str)


def test_deprecated_functions(client: openai.OpenAI) -> None:
    choice = chat(client, ASK, functions=[FUNCTION])
    assert choice.finish_reason == "function_call"
    assert json.loads(choice.message.function_call.arguments) == {"expression": EXPRESSION}
    result = {"role": "function", "name": "calculator", "content": "42"}
    answer = chat(client, [*ASK, choice.message.model_dump(exclude_none=True), result], functions=[FUNCTION])
    assert answer.message.content == REPORT


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


def test_asynchronous_client(openai_url: str) -> None:
    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=openai_url, api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=ASK, tools=[TOOL], stream=True, stream_options={"include_usage": True}
            )
            return [chunk async for chunk in stream]

    *chunks, last = asyncio.run(run())
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert calls[0].id
    assert json.loads("".join(call.function.arguments for call in calls)) == {"expression": EXPRESSION}
    assert last.usage.total_tokens > 0


def test_tool_calls_with_log_probabilities(client: openai.OpenAI) -> None:
    choice = chat(client, ASK, tools=[TOOL], logprobs=True, top_logprobs=2)
    assert choice.message.tool_calls[0].function.name == "calculator"
    assert choice.logprobs.content


def test_n_structured_answers(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": JSON_QUESTION}],
        response_format=Sum,
        n=3,
        temperature=1.5,
        seed=1,
        max_tokens=300,
    )
    assert [isinstance(choice.message.parsed, Sum) for choice in completion.choices] == [True] * 3


def test_extra_fields_without_effect(client: openai.OpenAI) -> None:
    choice = chat(
        client,
        [{"role": "developer", "content": "You are a careful calculator."}, *ASK],
        metadata={"session": "1"},
        modalities=["text"],
        prediction={"type": "content", "content": "42"},
        prompt_cache_key="1",
        safety_identifier="1",
        service_tier="auto",
        store=False,
        user="1",
        verbosity="low",
    )
    assert choice.message.content == WORKING


def test_allowed_tools(client: openai.OpenAI) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    choice = chat(
        client, ASK, tools=[TOOL, WEATHER_TOOL], tool_choice={"type": "allowed_tools", "allowed_tools": allowed}
    )
    assert {call.function.name for call in choice.message.tool_calls} == {"get_weather"}
