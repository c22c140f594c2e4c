"""Requests, completions and checks of the Responses API."""

import json
from typing import Any

import pydantic

from predictor.protocols.openai_responses import requests
from predictor.protocols.openai_responses.requests import DecodedRequest
from predictor.types import Completion, FinishReason, Token, ToolCall
from tests.predictor.protocols.openai.helpers import unknown

Json = dict[str, Any]
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "default": None}}


def decode(**fields: Any) -> DecodedRequest:
    return requests.decode(json.dumps({"model": "m", "input": "Hi"} | fields).encode())


def completion(text: str = "", finish_reason: FinishReason = FinishReason.EOS_TOKEN, **fields: Any) -> Completion:
    return Completion(text, finish_reason=finish_reason, prompt_tokens=3, completion_tokens=5, **fields)


def token(text: str, logprob: float = -0.5, *, special: bool = False, top: tuple[Token, ...] = ()) -> Token:
    return Token(1, text, logprob, special, top)


def call(number: int = 1) -> ToolCall:
    return ToolCall(f"call_{number}", "weather", '{"city": "Ulm"}')


def check(model: type[pydantic.BaseModel], content: Json) -> None:
    """`content` is of the client's type, and has nothing beyond it except what OpenAI adds, too."""
    parsed = model.model_validate(content)
    assert set(unknown(parsed)) <= {"store", "name"}
    assert parsed.model_dump(mode="json", by_alias=True, exclude_unset=True) == content
