"""vLLM's tokenization: a text or chat -> token ids, and back.

A chat has the fields of OpenAI's chat completions; those that only matter for the completion have no effect.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from predictor.errors import InvalidRequest
from predictor.protocols.field_tables import HARMLESS_PARAMETERS
from predictor.protocols.json_body import json_schema, loads
from predictor.protocols.json_object import JSONObject, validate
from predictor.protocols.openai.requests import to_chat
from predictor.protocols.openai.schemas import ChatCompletionRequest
from predictor.types import Chat, Tokenization


class _TokenizeText(JSONObject):
    harmless = HARMLESS_PARAMETERS

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class _TokenizeChat(ChatCompletionRequest):
    model: str | None = None  # type: ignore[assignment]
    return_token_strs: bool = False


class _Detokenize(JSONObject):
    harmless = HARMLESS_PARAMETERS

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


TOKENIZE_SCHEMA = {"anyOf": [json_schema(_TokenizeText), json_schema(_TokenizeChat)]}
DETOKENIZE_SCHEMA = json_schema(_Detokenize)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """A prompt to tokenize, and the options of the response."""

    model: str | None
    prompt: str | Chat
    add_special_tokens: bool
    with_texts: bool


def decode_tokenize(body: bytes) -> TokenizeRequest:
    """Decode a request for the tokens of a text or chat.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong or not supported; the message names it.
    """
    content = loads(body)
    if isinstance(content, dict) and (content.get("prompt") is None) is (content.get("messages") is None):
        raise InvalidRequest("The body needs either prompt or messages.")
    if isinstance(content, dict) and content.get("messages") is not None:
        chat = validate(_TokenizeChat, content)
        return TokenizeRequest(
            model=chat.model, prompt=to_chat(chat), add_special_tokens=False, with_texts=chat.return_token_strs
        )
    text = validate(_TokenizeText, content)
    return TokenizeRequest(
        model=text.model,
        prompt=text.prompt,
        add_special_tokens=text.add_special_tokens,
        with_texts=text.return_token_strs,
    )


def encode_tokenize(tokenization: Tokenization, context_tokens: int | None) -> dict[str, Any]:
    """Return the response as a JSON object."""
    return {
        "count": len(tokenization.token_ids),
        "max_model_len": context_tokens,
        "tokens": tokenization.token_ids,
        "token_strs": tokenization.texts,
    }


def decode_detokenize(body: bytes) -> tuple[str | None, list[int]]:
    """Return the model and the token ids of a request for their text.

    Raises:
        InvalidRequest: not JSON, or a field is missing or wrong; the message names it.
    """
    content = validate(_Detokenize, loads(body))
    return content.model, content.tokens
