"""LangChain and LangGraph with `ChatOpenAI` and `OpenAI`."""

from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from lessons import EXPRESSION, JSON_QUESTION, MODEL, QUESTION, REPORT, SUM, WORKING, Sum
from lessons import calculator as evaluate

calculator = tool("calculator")(evaluate)


@pytest.fixture(params=[False, True], ids=["chat-completions", "responses"])
def llm(base_url: str, request: pytest.FixtureRequest) -> ChatOpenAI:
    options: Any = {"temperature": 0, "max_retries": 0, "use_responses_api": request.param}
    return ChatOpenAI(model=MODEL, base_url=base_url, api_key="none", **options)


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


@pytest.mark.parametrize("choice", ["any", "calculator"])
def test_bind_tools_with_tool_choice(llm: ChatOpenAI, choice: str) -> None:
    bound = llm.bind_tools([calculator], tool_choice=choice, strict=True)
    assert bound.invoke("Who are you?").tool_calls[0]["name"] == "calculator"


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_with_structured_output(
    llm: ChatOpenAI, method: Literal["json_schema", "function_calling", "json_mode"]
) -> None:
    answer = llm.with_structured_output(Sum, method=method).invoke(JSON_QUESTION)
    if method == "function_calling":
        # The demo model has learned no such tool: only the form is certain.
        assert isinstance(answer, Sum)
    else:
        assert answer == SUM


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


@pytest.mark.parametrize("strategy", [ProviderStrategy, ToolStrategy])
def test_agent_with_response_format(llm: ChatOpenAI, strategy: Any) -> None:
    agent = create_agent(llm, response_format=strategy(Sum))
    answer = agent.invoke({"messages": [{"role": "user", "content": JSON_QUESTION}]})["structured_response"]
    assert isinstance(answer, Sum)


def test_structured_output_with_the_message(llm: ChatOpenAI) -> None:
    answer = llm.with_structured_output(Sum.model_json_schema(), method="json_schema", include_raw=True).invoke(
        JSON_QUESTION
    )
    assert answer["parsed"] == SUM.model_dump()
    assert answer["parsing_error"] is None


def test_agent_with_memory_continues_the_conversation(llm: ChatOpenAI) -> None:
    agent = create_agent(llm, [calculator], checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "1"}}
    for _ in range(2):
        messages = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]}, thread)["messages"]
    assert len(messages) == 8
    assert messages[-1].text == REPORT


def test_graph_with_a_tool_node(llm: ChatOpenAI) -> None:
    bound = llm.bind_tools([calculator])
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([calculator]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    messages = graph.compile().invoke({"messages": [{"role": "user", "content": QUESTION}]})["messages"]
    assert messages[-1].text == REPORT
