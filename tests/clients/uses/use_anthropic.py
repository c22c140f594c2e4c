"""Anthropic's SDK: messages, tools, streams, token counts."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from lessons import CITIES_QUESTION, EXPRESSION, JSON_QUESTION, MODEL, PARAMETERS, QUESTION, REPORT, SUM, WORKING, Sum
from lessons import calculator as evaluate

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
ASK: list[Any] = [{"role": "user", "content": QUESTION}]
TOOL: Any = {"name": "calculator", "description": "Evaluate a sum.", "input_schema": PARAMETERS}


@pytest.fixture
def client(server_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server_url, api_key="none", max_retries=0) as client:
        yield client


def create(client: anthropic.Anthropic, messages: list[Any], **options: Any) -> Any:
    return client.messages.create(model=MODEL, max_tokens=200, messages=messages, **options)


def test_message(client: anthropic.Anthropic) -> None:
    message = create(client, ASK, system="You are a careful calculator.")
    assert (message.content[0].text, message.stop_reason) == (WORKING, "end_turn")
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0


def test_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=200, messages=ASK) as stream:
        assert "".join(stream.text_stream) == WORKING
        assert stream.get_final_message().stop_reason == "end_turn"


def test_stop_sequence(client: anthropic.Anthropic) -> None:
    message = create(client, ASK, stop_sequences=["1+"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "1+")


def test_tool_use_and_its_result(client: anthropic.Anthropic) -> None:
    message = create(client, ASK, tools=[TOOL])
    [use] = message.content
    assert (message.stop_reason, use.type, use.name, use.input) == (
        "tool_use",
        "tool_use",
        "calculator",
        {"expression": EXPRESSION},
    )
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "42"}
    messages = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert create(client, messages, tools=[TOOL]).content[0].text == REPORT


def test_tool_use_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=200, messages=ASK, tools=[TOOL]) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    assert message.content[0].input == {"expression": EXPRESSION}
    assert parts
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "calculator"}], ids=["any", "tool"])
def test_tool_choice_forces_a_call(client: anthropic.Anthropic, choice: Any) -> None:
    message = create(client, [{"role": "user", "content": "Who are you?"}], tools=[TOOL], tool_choice=choice)
    assert next(block.name for block in message.content if block.type == "tool_use") == "calculator"


def test_parse_returns_the_model(client: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": JSON_QUESTION}]
    message = client.messages.parse(model=MODEL, max_tokens=200, messages=messages, output_format=Sum)
    assert message.parsed_output == SUM


def test_tool_runner_uses_the_tool(client: anthropic.Anthropic) -> None:
    tool = anthropic.beta_tool(evaluate, name="calculator")
    runner = client.beta.messages.tool_runner(model=MODEL, max_tokens=200, messages=ASK, tools=[tool])
    assert [message.content[-1].type for message in runner] == ["tool_use", "text"]


def test_count_tokens(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=ASK, tools=[TOOL]).input_tokens
    assert counted == create(client, ASK, tools=[TOOL]).usage.input_tokens


def test_unknown_model_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=5, messages=ASK)


def test_system_of_blocks_and_content_of_blocks(client: anthropic.Anthropic) -> None:
    system = [{"type": "text", "text": "You are a careful calculator.", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    assert create(client, messages, system=system, metadata={"user_id": "1"}).content[0].text == WORKING


def test_tool_choice_none_and_single_tool_use(client: anthropic.Anthropic) -> None:
    assert create(client, ASK, tools=[TOOL], tool_choice={"type": "none"}).content[0].text == WORKING
    weather: Any = {"name": "get_weather", "description": "Get the weather.", "input_schema": PLACE}
    messages = [{"role": "user", "content": CITIES_QUESTION}]
    assert [block.input["place"] for block in create(client, messages, tools=[weather]).content] == ["Paris", "Berlin"]
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(create(client, messages, tools=[weather], tool_choice=choice).content) == 1


def test_max_tokens_is_the_stop_reason(client: anthropic.Anthropic) -> None:
    assert client.messages.create(model=MODEL, max_tokens=3, messages=ASK).stop_reason == "max_tokens"


def test_asynchronous_client(server_url: str) -> None:
    async def run() -> str:
        client = anthropic.AsyncAnthropic(base_url=server_url, api_key="none", max_retries=0)
        async with client, client.messages.stream(model=MODEL, max_tokens=200, messages=ASK) as stream:
            return await stream.get_final_text()

    assert asyncio.run(run()) == WORKING


def test_models(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
