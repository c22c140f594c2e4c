"""Anthropic's client with a running predictor."""

from collections.abc import Iterator

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam

QUESTION: list[MessageParam] = [{"role": "user", "content": "What is 17 + 25?"}]
ANSWER = "7+5=12 1+2+1=4 42"
CALCULATOR: ToolParam = {
    "name": "calculator",
    "description": "Calculate the value of an arithmetic expression.",
    "input_schema": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
}
GREEDY = {"temperature": 0}
TOOL_QUESTION: list[MessageParam] = [{"role": "user", "content": "Use the calculator: What is 12 + 30?"}]


@pytest.fixture
def anthropic_client(server_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server_url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


def test_anthropic_client_creates_a_message(anthropic_client: anthropic.Anthropic) -> None:
    message = anthropic_client.messages.create(model="demo", max_tokens=50, messages=QUESTION, extra_body=GREEDY)
    [block] = message.content
    assert block.type == "text"
    assert block.text == ANSWER
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0


def test_anthropic_client_stream_is_the_message(anthropic_client: anthropic.Anthropic) -> None:
    whole = anthropic_client.messages.create(model="demo", max_tokens=50, messages=QUESTION, extra_body=GREEDY)
    with anthropic_client.messages.stream(model="demo", max_tokens=50, messages=QUESTION, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == ANSWER
        message = stream.get_final_message()
    assert (message.usage, message.stop_reason) == (whole.usage, "end_turn")


def test_anthropic_client_stop_sequence_is_named(anthropic_client: anthropic.Anthropic) -> None:
    message = anthropic_client.messages.create(
        model="demo", max_tokens=50, messages=QUESTION, extra_body=GREEDY, stop_sequences=["=4", "=12"]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "=12")


def test_anthropic_client_max_tokens_cuts_the_message(anthropic_client: anthropic.Anthropic) -> None:
    message = anthropic_client.messages.create(model="demo", max_tokens=2, messages=QUESTION, extra_body=GREEDY)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 2)


def test_anthropic_client_prefilled_answer_is_continued(anthropic_client: anthropic.Anthropic) -> None:
    prefilled: list[MessageParam] = [*QUESTION, {"role": "assistant", "content": ANSWER[:7]}]
    message = anthropic_client.messages.create(model="demo", max_tokens=50, messages=prefilled, extra_body=GREEDY)
    [block] = message.content
    assert block.type == "text"
    assert block.text == ANSWER[7:]


def test_anthropic_client_tool_is_called_and_its_result_used(anthropic_client: anthropic.Anthropic) -> None:
    with anthropic_client.messages.stream(
        model="demo", max_tokens=99, messages=TOOL_QUESTION, tools=[CALCULATOR], extra_body=GREEDY
    ) as stream:
        called = stream.get_final_message()
    [call] = called.content
    assert called.stop_reason == "tool_use"
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("calculator", {"expression": "12 + 30"})
    conversation: list[MessageParam] = [
        *TOOL_QUESTION,
        {"role": "assistant", "content": [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "42"}]},
    ]
    answer = anthropic_client.messages.create(
        model="demo", max_tokens=99, messages=conversation, tools=[CALCULATOR], extra_body=GREEDY
    )
    [block] = answer.content
    assert block.type == "text"
    assert block.text == "12 + 30 = 42"


def test_anthropic_client_counts_the_tokens_of_the_prompt(anthropic_client: anthropic.Anthropic) -> None:
    message = anthropic_client.messages.create(
        model="demo", max_tokens=1, messages=TOOL_QUESTION, tools=[CALCULATOR], system="Be brief."
    )
    counted = anthropic_client.messages.count_tokens(
        model="demo", messages=TOOL_QUESTION, tools=[CALCULATOR], system="Be brief."
    )
    assert counted.input_tokens == message.usage.input_tokens
    long: list[MessageParam] = [{"role": "user", "content": "1 " * 5000}]
    assert anthropic_client.messages.count_tokens(model="demo", messages=long).input_tokens > 5000


def test_anthropic_client_errors_are_its_own_types(anthropic_client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="other"):
        anthropic_client.messages.create(model="other", max_tokens=5, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError, match="none that a server runs"):
        anthropic_client.messages.create(
            model="demo",
            max_tokens=5,
            messages=QUESTION,
            tools=[{"type": "web_search_20250305", "name": "web_search"}],
        )
