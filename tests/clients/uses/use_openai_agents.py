"""OpenAI's Agents SDK, over chat completions and over Responses."""

import asyncio
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from lessons import JSON_QUESTION, MODEL, QUESTION, REPORT, SUM, WORKING, Sum
from lessons import calculator as evaluate

calculator = function_tool(evaluate, name_override="calculator")


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chat-completions", "responses"])
def model(base_url: str, request: pytest.FixtureRequest) -> Any:
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
    return request.param(model=MODEL, openai_client=client)


def agent(model: Any, **options: Any) -> Agent:
    settings = ModelSettings(temperature=0, max_tokens=200)
    return Agent(name="Calculator", model=model, **{"model_settings": settings, **options})


def test_text(model: Any) -> None:
    assert Runner.run_sync(agent(model), QUESTION).final_output == WORKING


def test_tool(model: Any) -> None:
    result = Runner.run_sync(agent(model, tools=[calculator]), QUESTION)
    assert result.final_output == REPORT
    assert [item.type for item in result.new_items] == [
        "tool_call_item",
        "tool_call_output_item",
        "message_output_item",
    ]


def test_tool_stream(model: Any) -> None:
    async def run() -> tuple[str, list[str]]:
        result = Runner.run_streamed(agent(model, tools=[calculator]), QUESTION)
        names = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
        return result.final_output, names

    output, names = asyncio.run(run())
    assert output == REPORT
    assert {"tool_called", "tool_output", "message_output_created"} <= set(names)


def test_required_tool(model: Any) -> None:
    settings = ModelSettings(temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False)
    result = Runner.run_sync(agent(model, tools=[calculator], model_settings=settings), QUESTION)
    assert result.final_output == REPORT


def test_output_type(model: Any) -> None:
    assert Runner.run_sync(agent(model, output_type=Sum), JSON_QUESTION).final_output == SUM


def test_conversation(model: Any) -> None:
    first = Runner.run_sync(agent(model, tools=[calculator]), QUESTION)
    items = [*first.to_input_list(), {"role": "user", "content": QUESTION}]
    assert Runner.run_sync(agent(model, tools=[calculator]), items).final_output == REPORT
