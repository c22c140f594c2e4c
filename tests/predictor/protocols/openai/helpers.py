"""Requests, completions and checks of OpenAI's protocol."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai as client_package
import pydantic
import pytest

from predictor.errors import InvalidRequest
from predictor.protocols.openai import requests
from predictor.protocols.openai.requests import DecodedRequest
from predictor.types import (
    MIN_LOGPROB,
    Chat,
    Completion,
    FinishReason,
    Token,
)

Json = dict[str, Any]
MESSAGES = [{"role": "user", "content": "Hi"}]


def completions(**fields: Any) -> DecodedRequest:
    return requests.decode_completion(json.dumps({"model": "m", "prompt": "Hi"} | fields).encode())


def chat(**fields: Any) -> DecodedRequest:
    return requests.decode_chat_completion(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode())


both_apis = pytest.mark.parametrize("decode_fields", [completions, chat])


def rejected(decode_fields: Callable[..., DecodedRequest], **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        decode_fields(**fields)
    return raised.value


def decoded_chat(**fields: Any) -> Chat:
    prompt = chat(**fields).requests[0].prompt
    assert isinstance(prompt, Chat)
    return prompt


def template_messages(*messages: Json) -> list[Any]:
    return list(decoded_chat(messages=messages).messages)


def assert_conforms(model: type[pydantic.BaseModel], content: Json) -> None:
    """`content` is of the client's type, says nothing beyond it, and loses nothing in it."""
    parsed = model.model_validate(content, strict=True)
    assert not list(unknown(parsed))
    assert parsed.model_dump(exclude_unset=True) == content


def unknown(value: Any) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        yield from value.model_extra or {}
        value = list(dict(value).values())
    if isinstance(value, list):
        for element in value:
            yield from unknown(element)


def token(text: str, logprob: float = -0.5, *, special: bool = False, top: tuple[Token, ...] = ()) -> Token:
    return Token(1, text, logprob, special, top)


TOKENS = (
    token("Hé", top=(token("Hé"), token("Ho", -1.5))),
    token("llo", -2.0, top=(token("p", -0.1), token("\ufffd", MIN_LOGPROB))),
    token("<|end|>", -0.1, special=True, top=(token("<|end|>", -0.1),)),
)
HELLO = Completion("Héllo", finish_reason=FinishReason.EOS_TOKEN, prompt_tokens=3, completion_tokens=3, tokens=TOKENS)
CUT = Completion("Hé", finish_reason=FinishReason.LENGTH, prompt_tokens=3, completion_tokens=1, tokens=TOKENS[:1])
STOPPED = Completion("", finish_reason=FinishReason.STOP_SEQUENCE, prompt_tokens=4, completion_tokens=2)


def client(status: int, content: str, kind: str) -> client_package.OpenAI:
    response = httpx2.Response(status, text=content, headers={"content-type": kind})
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: response), trust_env=False)
    return client_package.OpenAI(base_url="http://m/v1", api_key="k", http_client=http, max_retries=0)
