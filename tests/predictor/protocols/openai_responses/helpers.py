"""Requests, completions and checks of the Responses API."""

import json
from typing import Any

import pydantic

from predictor.protocols.openai_responses import requests
from predictor.protocols.openai_responses.requests import DecodedRequest
from predictor.types import Completion, FinishReason, OutputDelta, Token, ToolCallDelta
from tests.predictor.protocols.openai.helpers import unknown

Json = dict[str, Any]
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "default": None}}


def decode(**fields: Any) -> DecodedRequest:
    return requests.decode(json.dumps({"model": "m", "input": "Hi"} | fields).encode())


def completion(*deltas: OutputDelta, finish_reason: FinishReason = FinishReason.EOS_TOKEN, **fields: Any) -> Completion:
    """A completion of 5 tokens; the Responses API reads nothing of its output but the deltas."""
    return Completion("", finish_reason=finish_reason, prompt_tokens=3, completion_tokens=5, deltas=deltas, **fields)


def token(text: str, logprob: float = -0.5, *, special: bool = False, top: tuple[Token, ...] = ()) -> Token:
    return Token(1, text, logprob, special, top)


def call(number: int = 1, arguments: str = '{"city": "Ulm"}') -> ToolCallDelta:
    return ToolCallDelta(number - 1, arguments, f"call_{number}", "weather")


def check(model: type[pydantic.BaseModel], content: Json) -> None:
    """`content` is of the client's type, and has nothing beyond it except what OpenAI adds, too."""
    parsed = model.model_validate(content)
    assert set(unknown(parsed)) <= {"store", "name"}
    assert parsed.model_dump(mode="json", by_alias=True, exclude_unset=True) == content
