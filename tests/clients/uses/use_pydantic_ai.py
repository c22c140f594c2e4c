"""pydantic-ai, over chat completions and over Responses."""

import asyncio
from typing import Any

import pytest
from lessons import JSON_QUESTION, MODEL, QUESTION, REPORT, SUM, WORKING, Sum
from lessons import calculator as evaluate
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

GREEDY: Any = {"temperature": 0, "max_tokens": 200}


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat-completions", "responses"])
def model(base_url: str, request: pytest.FixtureRequest) -> Any:
    return request.param(MODEL, provider=OpenAIProvider(base_url=base_url, api_key="none"), settings=GREEDY)


def test_text(model: Any) -> None:
    assert Agent(model).run_sync(QUESTION).output == WORKING


def test_tool(model: Any) -> None:
    agent = Agent(model)
    agent.tool_plain(name="calculator")(evaluate)
    assert agent.run_sync(QUESTION).output == REPORT


def test_stream(model: Any) -> None:
    agent = Agent(model)
    agent.tool_plain(name="calculator")(evaluate)
    assert agent.run_stream_sync(QUESTION).get_output() == REPORT


def test_native_output(model: Any) -> None:
    assert Agent(model, output_type=NativeOutput(Sum)).run_sync(JSON_QUESTION).output == SUM


def test_tool_output(model: Any) -> None:
    """The demo model has learned no such tool: only the form of the answer is certain."""
    assert isinstance(Agent(model, output_type=ToolOutput(Sum)).run_sync(JSON_QUESTION).output, Sum)


def test_native_output_stream(model: Any) -> None:
    async def run() -> list[Sum]:
        async with Agent(model, output_type=NativeOutput(Sum)).run_stream(JSON_QUESTION) as result:
            return [partial async for partial in result.stream_output(debounce_by=None)]

    assert asyncio.run(run())[-1] == SUM
