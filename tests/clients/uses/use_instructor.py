"""instructor, in its modes for OpenAI's API and Anthropic's."""

import anthropic
import instructor
import openai
import pytest
from lessons import JSON_QUESTION, MODEL, SUM, Sum

ASK = [{"role": "user", "content": JSON_QUESTION}]


def client(base_url: str, mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none", max_retries=0), mode=mode)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT])
def test_tools_modes(base_url: str, mode: instructor.Mode) -> None:
    """The demo model has learned no such tool: only the form of the answer is certain."""
    answer = client(base_url, mode).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Sum, temperature=0, max_retries=0
    )
    assert isinstance(answer, Sum)


@pytest.mark.parametrize("mode", [instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON_O1])
def test_json_modes(base_url: str, mode: instructor.Mode) -> None:
    answer = client(base_url, mode).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Sum, temperature=0, max_retries=0
    )
    assert isinstance(answer, Sum)


def test_json_schema_mode_answers_the_sum(base_url: str) -> None:
    answer = client(base_url, instructor.Mode.JSON_SCHEMA).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Sum, temperature=0, max_retries=0
    )
    # instructor answers with a subclass.
    assert answer.model_dump() == SUM.model_dump()


def test_list_of_models(base_url: str) -> None:
    messages = [{"role": "user", "content": JSON_QUESTION}]
    answers = client(base_url, instructor.Mode.TOOLS).chat.completions.create(
        model=MODEL, messages=messages, response_model=list[Sum], max_tokens=400, max_retries=0
    )
    assert all(isinstance(answer, Sum) for answer in answers)


def test_partial_stream(base_url: str) -> None:
    partial = client(base_url, instructor.Mode.JSON_SCHEMA).chat.completions.create_partial(
        model=MODEL, messages=ASK, response_model=Sum, max_retries=0
    )
    states = [answer.model_dump() for answer in partial]
    assert states[-1] == SUM.model_dump()
    assert len(states) > 2


def test_anthropic_tools_mode(server_url: str) -> None:
    mode = instructor.Mode.ANTHROPIC_TOOLS
    sdk = anthropic.Anthropic(base_url=server_url, api_key="none", max_retries=0)
    answer = instructor.from_anthropic(sdk, mode=mode).messages.create(
        model=MODEL, messages=ASK, response_model=Sum, max_tokens=200, max_retries=0
    )
    assert isinstance(answer, Sum)
