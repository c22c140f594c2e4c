"""What the OpenAPI document says of the routes: bodies, answers and errors as JSON schemas, and every status declared.

Describes and serves nothing. The schemas of bodies are the protocols' own, made of what reads them; those of answers
stand here, since answers are plain dicts.
"""

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from predictor.types import FinishReason

Schema = dict[str, Any]

JSON, EVENTS, OCTETS = "application/json", "text/event-stream", "application/octet-stream"

_FAILURES = {
    400: "The request is malformed.",
    401: "The key is missing or unknown; only where the server asks for keys.",
    404: "No such model or version.",
    413: "The body is too large.",
    422: "The request is malformed.",
    424: "The engine failed on this request.",
    429: "The server is busy.",
    500: "The server failed.",
    503: "The server is not ready, or shutting down.",
    504: "The request's time is over.",
}
GENERATING = (401, 404, 413, 429, 500, 503, 504)
"""What may become of anything that generates, beside what its protocol says of a malformed request."""


def _object(required: dict[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": required | optional}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_STRING, _INTEGER, _NUMBER, _BOOLEAN = ({"type": name} for name in ("string", "integer", "number", "boolean"))
_STRINGS = _list(_STRING)

ERROR = _object({"error": _STRING})
OPENAI_ERROR = _object(
    {
        "error": _object(
            {"message": _STRING, "type": _STRING, "param": _or_null(_STRING), "code": _or_null(_STRING)},
            partial=_STRINGS,
        )
    }
)

LIVE = _object({"live": _BOOLEAN})
READY = _object({"ready": _BOOLEAN})
SERVER = _object({"name": _STRING, "version": _STRING, "extensions": _STRINGS})
MODEL_NAMES = _object({"models": _STRINGS})
MODEL_READY = _object({"name": _STRING, "ready": _BOOLEAN})

_TENSOR = {"name": _STRING, "datatype": _STRING, "shape": _list(_INTEGER)}
MODEL = _object(
    {"name": _STRING, "versions": _STRINGS, "platform": _STRING}
    | {"inputs": _list(_object(_TENSOR)), "outputs": _list(_object(_TENSOR))},
    properties={"type": "object", "additionalProperties": _STRING},
)
INFERRED = _object(
    {"model_name": _STRING, "id": _STRING, "outputs": _list(_object(_TENSOR, data=_list({}), parameters=_object({})))},
    model_version=_STRING,
)

_TOKEN = _object({"id": _INTEGER, "text": _STRING, "logprob": _NUMBER, "special": _BOOLEAN})
_DETAILS = {
    "finish_reason": {"type": "string", "enum": [reason.value for reason in FinishReason]},
    "logprobs": _list(_TOKEN),
}
_GENERATED = {"text_output": _STRING, "model_name": _STRING}
GENERATED = _object(_GENERATED, model_version=_STRING, details=_object(_DETAILS))
GENERATED_EVENT = _object(_GENERATED, model_version=_STRING, details=_object(_DETAILS | {"token": _TOKEN}))

_OPENAI_MODEL = {"id": _STRING, "object": {"const": "model"}, "created": _INTEGER, "owned_by": _STRING}
_OPENAI_MODELS = {
    "object": {"const": "list"},
    "data": _list(_object(_OPENAI_MODEL, max_model_len=_INTEGER)),
}
OPENAI_MODEL = _object(_OPENAI_MODEL, max_model_len=_INTEGER)
OPENAI_MODELS = _object(_OPENAI_MODELS)
BOTH_MODEL = _object(_OPENAI_MODEL | {"name": _STRING, "ready": _BOOLEAN}, max_model_len=_INTEGER)
BOTH_MODELS = _object(_OPENAI_MODELS | {"models": _STRINGS})


def _openai_answer(name: str, said: dict[str, Schema]) -> Schema:
    choice = {
        "index": _INTEGER,
        **said,
        "logprobs": _or_null({"type": "object"}),
        "finish_reason": {"type": "string", "enum": ["stop", "length"]},
    }
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _INTEGER)
    head = {"id": _STRING, "object": {"const": name}, "created": _INTEGER, "model": _STRING}
    return _object({**head, "choices": _list(_object(choice)), "usage": _object(usage)}, service_tier=_STRING)


COMPLETION = _openai_answer("text_completion", {"text": _STRING})
_MESSAGE = _object({"role": {"const": "assistant"}, "content": _STRING, "refusal": {"type": "null"}})
CHAT_COMPLETION = _openai_answer("chat.completion", {"message": _MESSAGE})

PREDICTIONS = _object({"predictions": _STRINGS})


class _Events(Response):
    media_type = EVENTS


def gives(answer: Schema, *failures: int, also: str | None = None, error: Schema = ERROR) -> dict[str, Any]:
    """Options of a route that answers with JSON.

    Args:
        answer: schema of the answer.
        failures: statuses that it may have instead.
        also: another media type of the answer.
        error: schema of the answer then.
    """
    content = {JSON: {"schema": answer}} | ({} if also is None else {also: {}})
    failed = {status: _response(_FAILURES[status], {JSON: {"schema": error}}) for status in failures}
    return {"responses": {200: _response("The answer.", content), **failed}, "response_class": JSONResponse}


def streams(event: Schema, *failures: int) -> dict[str, Any]:
    """Options of a route that answers with server-sent events and nothing else, errors included."""
    failed = {status: _response(_FAILURES[status], {EVENTS: {"schema": _event(ERROR)}}) for status in failures}
    described = {200: _response("Events.", {EVENTS: {"schema": _event(event)}}), **failed}
    return {"responses": described, "response_class": _Events}


def takes(body: Schema) -> dict[str, Any]:
    """Options of a route that reads a JSON body; to be put beside what it gives."""
    return {"openapi_extra": {"requestBody": {"required": True, "content": {JSON: {"schema": body}}}}}


def document(title: str, routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI document of these routes; path parameters are told from the paths."""
    described = get_openapi(title=title, version=version(title), routes=routes)
    for path, operations in described["paths"].items():
        operations["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _STRING} for name in re.findall(r"{(\w+)}", path)
        ]
    return described


def _event(content: Schema) -> Schema:
    """Of each server-sent event, whose data is JSON; written as OpenAPI 3.2 has it."""
    return _object({"data": {"type": "string", "contentMediaType": JSON, "contentSchema": content}})


def _response(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": content}
