"""LlamaIndex with `OpenAILike`."""

import asyncio

import pytest
from lessons import JSON_QUESTION, MODEL, QUESTION, REPORT, SUM, WORKING, Sum
from lessons import calculator as evaluate
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

ASK = [ChatMessage(role="user", content=QUESTION)]
calculator = FunctionTool.from_defaults(evaluate, name="calculator", description="Evaluate a sum.")


@pytest.fixture
def llm(base_url: str) -> OpenAILike:
    return OpenAILike(
        model=MODEL,
        api_base=base_url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        temperature=0,
        max_tokens=200,
        max_retries=0,
    )


def test_chat(llm: OpenAILike) -> None:
    assert llm.chat(ASK).message.content == WORKING


def test_stream_chat(llm: OpenAILike) -> None:
    assert "".join(response.delta or "" for response in llm.stream_chat(ASK)) == WORKING


def test_complete(base_url: str) -> None:
    llm = OpenAILike(model=MODEL, api_base=base_url, api_key="none", max_tokens=30, max_retries=0)
    assert llm.complete("17+25=").text == " " + WORKING


def test_chat_with_tools(llm: OpenAILike) -> None:
    response = llm.chat_with_tools([calculator], user_msg=QUESTION)
    [call] = llm.get_tool_calls_from_response(response)
    assert (call.tool_name, call.tool_kwargs) == ("calculator", {"expression": "17 + 25"})


def test_agent_uses_the_tool(llm: OpenAILike) -> None:
    async def run() -> str:
        return str(await FunctionAgent(tools=[calculator], llm=llm).run(QUESTION))

    assert asyncio.run(run()) == REPORT


def test_structured_output_by_tool(llm: OpenAILike) -> None:
    """The demo model has learned no such tool: only the form of the answer is certain."""
    assert isinstance(llm.as_structured_llm(Sum).chat([ChatMessage(role="user", content=JSON_QUESTION)]).raw, Sum)


def test_structured_output_by_schema(base_url: str) -> None:
    llm = OpenAILike(
        model=MODEL,
        api_base=base_url,
        api_key="none",
        is_chat_model=True,
        should_use_structured_outputs=True,
        temperature=0,
        max_retries=0,
    )
    response = llm.as_structured_llm(Sum).chat([ChatMessage(role="user", content=JSON_QUESTION)])
    assert response.raw == SUM


def test_stream_chat_with_tools(llm: OpenAILike) -> None:
    *_, last = llm.stream_chat_with_tools([calculator], user_msg=QUESTION)
    [call] = llm.get_tool_calls_from_response(last)
    assert call.tool_kwargs == {"expression": "17 + 25"}


def test_required_tool(llm: OpenAILike) -> None:
    response = llm.chat_with_tools([calculator], user_msg="Who are you?", tool_required=True)
    assert llm.get_tool_calls_from_response(response)[0].tool_name == "calculator"
