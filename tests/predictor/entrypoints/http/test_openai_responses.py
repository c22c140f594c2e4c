"""OpenAI's Responses API with its client and the demo model."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response

from devtools.paths import DEMO_MODEL
from tests.predictor import servers
from tests.predictor.protocols.openai_responses.helpers import check
from tests.predictor.servers import InProcessServer

QUESTION = "What is 17 + 25?"
ANSWER = "7+5=12 1+2+1=4 42"
CALL_QUESTION = "Use the calculator: What is 12 + 30?"
CALCULATOR: Any = {
    "type": "function",
    "name": "calculator",
    "description": "Calculate the value of an arithmetic expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    "strict": False,
}


class Sum(pydantic.BaseModel):
    working: str
    result: int


def create(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/responses", json={"model": "demo", "input": QUESTION, "temperature": 0, **fields})


def test_create_returns_the_text(openai_client: openai.OpenAI) -> None:
    response = openai_client.responses.create(
        model="demo", input=QUESTION, instructions="You are a calculator.", temperature=0
    )
    assert (response.status, response.output_text) == ("completed", ANSWER)
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_create_conforms_to_the_clients_type(client: httpx.Client) -> None:
    content = create(client, top_logprobs=2, metadata={"a": "b"}, tools=[CALCULATOR]).json()
    check(Response, content)


def test_stream_returns_the_text_in_parts(openai_client: openai.OpenAI) -> None:
    with openai_client.responses.stream(model="demo", input=QUESTION, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == final.output_text == ANSWER
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_call_and_its_output_are_answered(openai_client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "tools": [CALCULATOR], "temperature": 0}
    first = openai_client.responses.create(input=CALL_QUESTION, **fields)
    [call] = first.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("calculator", {"expression": "12 + 30"})
    items: Any = [
        {"role": "user", "content": CALL_QUESTION},
        *first.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "42"},
    ]
    assert openai_client.responses.create(input=items, **fields).output_text == "12 + 30 = 42"


def test_call_is_streamed(openai_client: openai.OpenAI) -> None:
    with openai_client.responses.stream(model="demo", input=CALL_QUESTION, tools=[CALCULATOR], temperature=0) as stream:
        final = stream.get_final_response()
    [call] = final.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"expression": "12 + 30"}


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "calculator"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "calculator"}]},
    ],
    ids=["required", "function", "allowed_tools"],
)
def test_tool_choice_forces_a_call(client: httpx.Client, choice: Any) -> None:
    fields = {"input": "Who are you?", "tools": [CALCULATOR | {"strict": True}], "parallel_tool_calls": False}
    plain = create(client, **fields).json()
    assert [item["type"] for item in plain["output"]] == ["message"]
    [item] = create(client, **fields, tool_choice=choice).json()["output"]
    assert (item["type"], item["name"]) == ("function_call", "calculator")
    assert list(json.loads(item["arguments"])) == ["expression"]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    """A server whose chat template begins the reasoning, which the demo model never ends."""
    directory = tmp_path_factory.mktemp("thinking")
    for file in DEMO_MODEL.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    template = directory / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("'<|assistant|>' }}{%- endif", "'<|assistant|><think>\n' }}{%- endif")
    )
    flags = ["--model_dir", str(directory), "--reasoning_format", "think"]
    with servers.in_process(*flags, model_name="thinking") as server:
        yield server


def test_reasoning_is_an_item_of_its_own(thinking: InProcessServer) -> None:
    fields: Any = {"model": "thinking", "input": QUESTION, "temperature": 0, "max_output_tokens": 8}
    with openai.OpenAI(base_url=f"{thinking.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        whole = client.responses.create(**fields)
        events = list(client.responses.create(**fields, stream=True))
    [item] = whole.output
    assert item.type == "reasoning"
    assert item.status == whole.status == "incomplete"
    assert item.content
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens == whole.usage.output_tokens == 8
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == item.content[0].text != ""
    assert events[-1].type == "response.incomplete"


def test_tool_choice_none_returns_text(client: httpx.Client) -> None:
    response = create(client, tools=[CALCULATOR], tool_choice="none").json()
    assert [item["type"] for item in response["output"]] == ["message"]
    assert response["output"][0]["content"][0]["text"] == ANSWER


def test_parse_returns_an_object(openai_client: openai.OpenAI) -> None:
    response = openai_client.responses.parse(
        model="demo", input=f"{QUESTION} Answer as JSON.", text_format=Sum, temperature=0, max_output_tokens=300
    )
    assert response.output_parsed == Sum(working="7+5=12 1+2+1=4", result=42)


def test_stream_with_a_format_returns_an_object(openai_client: openai.OpenAI) -> None:
    with openai_client.responses.stream(
        model="demo", input=f"{QUESTION} Answer as JSON.", text_format=Sum, temperature=0, max_output_tokens=300
    ) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == Sum(working="7+5=12 1+2+1=4", result=42)


class Expression(pydantic.BaseModel):
    expression: str


def test_parse_of_a_strict_tool_returns_its_arguments(openai_client: openai.OpenAI) -> None:
    tool: Any = openai.pydantic_function_tool(Expression, name="calculator")["function"] | {"type": "function"}
    response = openai_client.responses.parse(
        model="demo", input=CALL_QUESTION, tools=[tool], tool_choice="required", temperature=0
    )
    [call] = response.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"expression": "12 + 30"}
    assert response.tools[0].type == "function"
    assert response.tools[0].strict is True


def test_max_output_tokens_makes_it_incomplete(openai_client: openai.OpenAI) -> None:
    response = openai_client.responses.create(
        model="demo", input=QUESTION, temperature=0, max_output_tokens=3, include=["message.output_text.logprobs"]
    )
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    [item] = response.output
    assert item.type == "message"
    [part] = item.content
    assert part.type == "output_text"
    assert [logprob.token for logprob in part.logprobs or []] == ["7", "+", "5"]


def test_client_raises_its_own_errors(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.create(model="other", input=QUESTION)
    with pytest.raises(openai.BadRequestError, match="not stored") as raised:
        openai_client.responses.create(model="demo", input=QUESTION, previous_response_id="resp_1")
    assert raised.value.param == "previous_response_id"


def test_input_tokens_are_those_of_the_response(openai_client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "input": CALL_QUESTION, "instructions": "Calculate.", "tools": [CALCULATOR]}
    counted = openai_client.responses.input_tokens.count(**fields)
    usage = openai_client.responses.create(**fields).usage
    assert usage is not None
    assert counted.input_tokens == usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="not stored"):
        openai_client.responses.input_tokens.count(**fields, previous_response_id="resp_1")


def test_stored_responses_are_not_found(openai_client: openai.OpenAI) -> None:
    for request in (
        openai_client.responses.retrieve,
        openai_client.responses.delete,
        openai_client.responses.cancel,
        openai_client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError, match="responses are not stored"):
            request("resp_1")


def test_stream_of_a_failed_step_ends_with_the_failed_response(
    openai_client: openai.OpenAI, server: InProcessServer
) -> None:
    server.hold.error = RuntimeError("no memory")
    events = list(openai_client.responses.create(model="demo", input=QUESTION, stream=True))
    server.hold.open()
    assert [event.type for event in events] == ["response.created", "response.in_progress", "error", "response.failed"]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert "Generation failed" in events[-1].response.error.message
    server.wait_until_idle()


def test_route_is_counted_and_logged_as_openai(client: httpx.Client, server: InProcessServer) -> None:
    counted = server.metric("requests_total", protocol="openai", status="200")
    response = create(client, mood=1)
    assert response.headers["x-ignored-fields"] == "mood"
    server.wait_for_metric("requests_total", counted + 1, protocol="openai", status="200")
