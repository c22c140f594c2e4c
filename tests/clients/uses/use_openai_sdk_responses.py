"""OpenAI's SDK: the Responses API."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from lessons import EXPRESSION, FUNCTION, JSON_QUESTION, MODEL, QUESTION, REPORT, SUM, WORKING, Sum

TOOL: Any = {"type": "function", "strict": False, **FUNCTION}
STRICT_TOOL: Any = {"type": "function", "strict": True, **FUNCTION}


@pytest.fixture
def client(openai_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=openai_url, api_key="none", max_retries=0) as client:
        yield client


def test_text(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, instructions="You are a careful calculator.", input=QUESTION, temperature=0, store=False
    )
    assert (response.status, response.output_text) == ("completed", WORKING)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_conversation_of_items(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="Hello!", temperature=0, store=False)
    items: list[Any] = [
        {"role": "user", "content": "Hello!"},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
    ]
    assert client.responses.create(model=MODEL, input=items, temperature=0, store=False).output_text == WORKING


def test_text_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, store=False) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == WORKING


def test_tool_call_and_its_result(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=QUESTION, tools=[TOOL], temperature=0, store=False)
    [call] = [item for item in response.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("calculator", {"expression": EXPRESSION})
    items: list[Any] = [
        {"role": "user", "content": QUESTION},
        *response.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "42"},
    ]
    answer = client.responses.create(model=MODEL, input=items, tools=[TOOL], temperature=0, store=False)
    assert answer.output_text == REPORT


def test_tool_call_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, tools=[TOOL], temperature=0, store=False) as stream:
        events = list(stream)
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads(done.arguments) == {"expression": EXPRESSION}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "calculator"}], ids=["required", "named"])
def test_tool_choice_forces_a_call(client: openai.OpenAI, choice: Any) -> None:
    response = client.responses.create(
        model=MODEL, input="Who are you?", tools=[STRICT_TOOL], tool_choice=choice, temperature=0, store=False
    )
    call = next(item for item in response.output if item.type == "function_call")
    assert list(json.loads(call.arguments)) == ["expression"]


def test_parse_returns_the_model(client: openai.OpenAI) -> None:
    response = client.responses.parse(model=MODEL, input=JSON_QUESTION, text_format=Sum, temperature=0, store=False)
    assert response.output_parsed == SUM


def test_json_object(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input=JSON_QUESTION, text={"format": {"type": "json_object"}}, temperature=0, store=False
    )
    assert Sum.model_validate_json(response.output_text) == SUM


def test_reasoning_effort(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input=QUESTION, reasoning={"effort": "low"}, temperature=0, store=False
    )
    assert response.output_text == WORKING


def test_previous_response_id_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=MODEL, input=QUESTION, previous_response_id="resp_1")


def test_count_of_input_tokens(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model=MODEL, input=QUESTION, tools=[TOOL]).input_tokens
    response = client.responses.create(model=MODEL, input=QUESTION, tools=[TOOL], store=False)
    assert counted == response.usage.input_tokens


def test_extra_fields_of_agents(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input=QUESTION,
        tools=[TOOL],
        tool_choice={
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "calculator"}],
        },
        include=["reasoning.encrypted_content"],
        metadata={"session": "1"},
        parallel_tool_calls=False,
        prompt_cache_key="1",
        reasoning={"effort": "medium", "summary": "auto"},
        service_tier="auto",
        store=False,
        text={"verbosity": "low"},
        truncation="disabled",
    )
    assert [item.type for item in response.output] == ["function_call"]
