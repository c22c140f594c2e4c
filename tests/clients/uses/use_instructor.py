"""instructor, in its modes for OpenAI's API and Anthropic's."""

import instructor
import openai
import pytest
from lessons import JSON_QUESTION, MODEL, SUM, Sum

ASK = [{"role": "user", "content": JSON_QUESTION}]


def client(base_url: str, mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none", max_retries=0), mode=mode)


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
