"""Reasoning in every client: a server whose model works out the tens before it answers."""

from typing import Any

import agents
import anthropic
import litellm
import openai
import pydantic_ai
import pytest
from langchain_openai import ChatOpenAI
from lessons import QUESTION
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

MODEL = "reasoning"
REASONING = "1+2+1=4"
ANSWER = "42"
ASK: list[Any] = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


def test_openai_sdk_chat_and_its_history(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model=MODEL, messages=ASK)
    message = completion.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == (ANSWER, REASONING, REASONING)
    assert 0 < completion.usage.completion_tokens_details.reasoning_tokens < completion.usage.completion_tokens
    again = client.chat.completions.create(model=MODEL, messages=[*ASK, message, *ASK])
    assert again.choices[0].message.content == ANSWER


def test_openai_sdk_chat_stream(client: openai.OpenAI) -> None:
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    ]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == REASONING
    assert "".join(delta.content or "" for delta in deltas) == ANSWER


def test_openai_sdk_responses_and_their_history(client: openai.OpenAI) -> None:
    include: Any = ["reasoning.encrypted_content"]
    response = client.responses.create(model=MODEL, input=QUESTION, include=include, store=False)
    assert response.output[0].content[0].text == REASONING
    again = client.responses.create(model=MODEL, input=[*ASK, *response.output, *ASK], store=False)
    assert response.output_text == again.output_text == ANSWER


def test_anthropic_sdk(server_url: str) -> None:
    client = anthropic.Anthropic(base_url=server_url, api_key="none", max_retries=0)
    options: Any = {
        "model": MODEL,
        "max_tokens": 2000,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    content = client.messages.create(messages=ASK, **options).content
    assert [(block.type, getattr(block, block.type)) for block in content] == [
        ("thinking", REASONING),
        ("text", ANSWER),
    ]
    history = [*ASK, {"role": "assistant", "content": content}, *ASK]
    with client.messages.stream(messages=history, **options) as stream:
        assert "".join(event.thinking for event in stream if event.type == "thinking") == REASONING
        assert stream.get_final_text() == ANSWER


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "deepseek"])
def test_litellm(base_url: str, provider: str) -> None:
    options: Any = {"model": f"{provider}/{MODEL}", "api_base": base_url, "api_key": "none", "messages": ASK}
    message = litellm.completion(**options).choices[0].message
    assert (message.reasoning_content, message.content) == (REASONING, ANSWER)
    chunks = litellm.stream_chunk_builder(list(litellm.completion(stream=True, **options)))
    assert chunks.choices[0].message.reasoning_content == REASONING


def test_langchain_responses_and_their_history(base_url: str) -> None:
    llm = ChatOpenAI(model=MODEL, base_url=base_url, api_key="none", use_responses_api=True)
    message = llm.invoke(QUESTION)
    assert [block["type"] for block in message.content] == ["reasoning", "text"]
    assert llm.invoke([*ASK, message, *ASK]).text == ANSWER


@pytest.mark.parametrize("model", [agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel])
def test_openai_agents(base_url: str, model: Any) -> None:
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
    agent = agents.Agent(name="Calculator", model=model(model=MODEL, openai_client=client))
    result = agents.Runner.run_sync(agent, QUESTION)
    assert [item.type for item in result.new_items] == ["reasoning_item", "message_output_item"]
    assert agents.Runner.run_sync(agent, [*result.to_input_list(), *ASK]).final_output == ANSWER


@pytest.mark.parametrize("model", [OpenAIChatModel, OpenAIResponsesModel])
def test_pydantic_ai(base_url: str, model: Any) -> None:
    agent = pydantic_ai.Agent(model(MODEL, provider=OpenAIProvider(base_url=base_url, api_key="none")))
    messages = agent.run_sync(QUESTION).all_messages()
    assert [part.part_kind for part in messages[-1].parts] == ["thinking", "text"]
    assert agent.run_sync(QUESTION, message_history=messages).output == ANSWER


def test_llama_index(base_url: str) -> None:
    llm = OpenAILike(model=MODEL, api_base=base_url, api_key="none", is_chat_model=True)
    blocks = llm.chat([ChatMessage(role="user", content=QUESTION)]).message.blocks
    assert [block.block_type for block in blocks] == ["thinking", "text"]
    assert blocks[0].content == REASONING
