"""LangChain and LangGraph with `ChatOpenAI` and `OpenAI`."""

from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from lessons import EXPRESSION, JSON_QUESTION, MODEL, QUESTION, REPORT, SUM, WORKING, Sum
from lessons import calculator as evaluate

calculator = tool("calculator")(evaluate)


def chat_model(base_url: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=base_url, api_key="none", temperature=0, max_retries=0, **options)


@pytest.fixture(params=[False], ids=["chat-completions"])
def llm(base_url: str, request: pytest.FixtureRequest) -> ChatOpenAI:
    return chat_model(base_url, use_responses_api=request.param)


def test_invoke(llm: ChatOpenAI) -> None:
    message = llm.invoke(QUESTION)
    assert message.text == WORKING
    assert message.usage_metadata["output_tokens"] > 0


def test_stream(llm: ChatOpenAI) -> None:
    chunks = [chunk.text for chunk in llm.stream(QUESTION)]
    assert "".join(chunks) == WORKING
    assert len(chunks) > 1


def test_batch(llm: ChatOpenAI) -> None:
    assert [message.text for message in llm.batch([QUESTION] * 3)] == [WORKING] * 3


def test_completion(base_url: str) -> None:
    llm = OpenAI(model=MODEL, base_url=base_url, api_key="none", temperature=0, max_retries=0)
    assert llm.invoke("17+25=") == " " + WORKING


def test_bind_tools(llm: ChatOpenAI) -> None:
    [call] = llm.bind_tools([calculator]).invoke(QUESTION).tool_calls
    assert (call["name"], call["args"]) == ("calculator", {"expression": EXPRESSION})


def test_bind_tools_stream(llm: ChatOpenAI) -> None:
    chunks = list(llm.bind_tools([calculator]).stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    [call] = whole.tool_calls
    assert (call["name"], call["args"]) == ("calculator", {"expression": EXPRESSION})


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_with_structured_output(llm: ChatOpenAI, method: Literal["json_schema", "json_mode"]) -> None:
    assert llm.with_structured_output(Sum, method=method).invoke(JSON_QUESTION) == SUM


def test_agent_uses_the_tool(llm: ChatOpenAI) -> None:
    agent = create_agent(llm, [calculator])
    messages = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[-1].text == REPORT


def test_agent_stream_uses_the_tool(llm: ChatOpenAI) -> None:
    agent = create_agent(llm, [calculator])
    tokens = agent.stream({"messages": [{"role": "user", "content": QUESTION}]}, stream_mode="messages")
    texts = [chunk.text for chunk, _ in tokens if chunk.type == "AIMessageChunk"]
    assert "".join(texts) == REPORT


@pytest.mark.parametrize("strategy", [ProviderStrategy])
def test_agent_with_response_format(llm: ChatOpenAI, strategy: Any) -> None:
    agent = create_agent(llm, response_format=strategy(Sum))
    answer = agent.invoke({"messages": [{"role": "user", "content": JSON_QUESTION}]})["structured_response"]
    assert isinstance(answer, Sum)
