"""pydantic-ai, over chat completions and over Responses."""

from typing import Any

import pytest
from lessons import JSON_QUESTION, MODEL, QUESTION, REPORT, SUM, WORKING, Sum
from lessons import calculator as evaluate
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

GREEDY: Any = {"temperature": 0, "max_tokens": 200}


@pytest.fixture(params=[OpenAIChatModel], ids=["chat-completions"])
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
