"""OpenAPI document of the routes: JSON schemas of request bodies, responses and errors, and all status codes.

Schemas of request bodies come from the protocols' pydantic models. Schemas of responses are written here, since
responses are plain dicts.
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

_ERRORS = {
    400: "The request is malformed.",
    401: "The API key is missing or invalid, on a server that requires one.",
    404: "Model or version not found.",
    413: "The request body is too large.",
    415: "The Content-Encoding is not supported.",
    422: "The request is malformed.",
    424: "Generation failed.",
    429: "The server is overloaded, or a limit of the API key is reached; Retry-After has the seconds to wait.",
    500: "Internal server error.",
    503: "The server is not ready, or shutting down.",
    504: "The request timed out.",
}
GENERATION_ERRORS = (401, 404, 413, 415, 429, 500, 503, 504)
"""Error statuses of every route that generates; each protocol adds its own for malformed requests."""


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

ANTHROPIC_ERROR = _object(
    {"type": {"const": "error"}, "error": _object({"type": _STRING, "message": _STRING}), "request_id": _STRING}
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
_PROMPT_TOKEN = _object(
    {"id": _INTEGER, "text": _STRING, "logprob": _or_null(_NUMBER), "special": _BOOLEAN}
    | {"rank": _or_null(_INTEGER), "top": _list(_TOKEN)}
)
_GENERATED = {"text_output": _STRING, "model_name": _STRING}
_PROMPT_LOGPROBS = {"prompt_logprobs": _list(_PROMPT_TOKEN)}
GENERATED = _object(_GENERATED, model_version=_STRING, details=_object(_DETAILS, **_PROMPT_LOGPROBS))
GENERATED_EVENT = _object(
    _GENERATED, model_version=_STRING, details=_object(_DETAILS, token=_TOKEN, **_PROMPT_LOGPROBS)
)

_OPENAI_MODEL = {"id": _STRING, "object": {"const": "model"}, "created": _INTEGER, "owned_by": _STRING}
_MODEL_DETAILS = {"max_model_len": _INTEGER, "root": _STRING, "parent": _STRING}
_OPENAI_MODELS = {
    "object": {"const": "list"},
    "data": _list(_object(_OPENAI_MODEL, **_MODEL_DETAILS)),
}
OPENAI_MODEL = _object(_OPENAI_MODEL, **_MODEL_DETAILS)
OPENAI_MODELS = _object(_OPENAI_MODELS)
BOTH_MODEL = _object(_OPENAI_MODEL | {"name": _STRING, "ready": _BOOLEAN}, **_MODEL_DETAILS)
BOTH_MODELS = _object(_OPENAI_MODELS | {"models": _STRINGS})


def _openai_response(name: str, output: dict[str, Schema]) -> Schema:
    choice = {
        "index": _INTEGER,
        **output,
        "logprobs": _or_null({"type": "object"}),
        "finish_reason": {"type": "string", "enum": ["stop", "length", "tool_calls", "function_call"]},
    }
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _INTEGER)
    details = _object({"reasoning_tokens": _INTEGER})
    prompt_logprobs = {"prompt_logprobs": _list(_or_null({"type": "object"}))}
    head = {"id": _STRING, "object": {"const": name}, "created": _INTEGER, "model": _STRING}
    counts = _object(usage, completion_tokens_details=details)
    return _object(
        {**head, "choices": _list(_object(choice, **prompt_logprobs)), "usage": counts},
        service_tier=_STRING,
        **prompt_logprobs,
    )


COMPLETION = _openai_response("text_completion", {"text": _STRING})
_FUNCTION_CALL = _object({"name": _STRING, "arguments": _STRING})
_TOOL_CALL = _object({"id": _STRING, "type": {"const": "function"}, "function": _FUNCTION_CALL})
_MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": _or_null(_STRING), "refusal": {"type": "null"}},
    tool_calls=_list(_TOOL_CALL),
    function_call=_FUNCTION_CALL,
    reasoning_content=_STRING,
    reasoning=_STRING,
)
CHAT_COMPLETION = _openai_response("chat.completion", {"message": _MESSAGE})

_PARTS = _list(
    _object(
        {"type": {"enum": ["output_text", "reasoning_text"]}, "text": _STRING},
        annotations=_list({}),
        logprobs=_list({"type": "object"}),
    )
)
_OUTPUT_ITEM = _object(
    {
        "type": {"enum": ["reasoning", "message", "function_call"]},
        "id": _STRING,
        "status": {"enum": ["completed", "incomplete"]},
    },
    role={"const": "assistant"},
    content=_PARTS,
    summary=_list({}),
    call_id=_STRING,
    name=_STRING,
    arguments=_STRING,
)
RESPONSE = _object(
    {
        "id": _STRING,
        "object": {"const": "response"},
        "created_at": _INTEGER,
        "model": _STRING,
        "status": {"enum": ["completed", "incomplete"]},
        "output": _list(_OUTPUT_ITEM),
        "incomplete_details": _or_null(_object({"reason": {"const": "max_output_tokens"}})),
        "error": {"type": "null"},
        "usage": _object(
            dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), _INTEGER),
            input_tokens_details=_object(dict.fromkeys(("cached_tokens", "cache_write_tokens"), _INTEGER)),
            output_tokens_details=_object({"reasoning_tokens": _INTEGER}),
        ),
        "store": {"const": False},
    },
    background={"const": False},
    instructions=_or_null(_STRING),
    max_output_tokens=_or_null(_INTEGER),
    max_tool_calls=_or_null(_INTEGER),
    metadata={"type": "object", "additionalProperties": _STRING},
    parallel_tool_calls=_BOOLEAN,
    previous_response_id={"type": "null"},
    prompt_cache_key=_or_null(_STRING),
    reasoning=_object({"effort": _or_null(_STRING), "summary": {"type": "null"}}),
    safety_identifier=_or_null(_STRING),
    service_tier={"const": "default"},
    temperature=_or_null(_NUMBER),
    text=_object({"format": {"type": "object"}, "verbosity": _STRING}),
    tool_choice={"anyOf": [_STRING, {"type": "object"}]},
    tools=_list({"type": "object"}),
    top_logprobs=_INTEGER,
    top_p=_or_null(_NUMBER),
    truncation={"const": "disabled"},
    user=_or_null(_STRING),
)
RESPONSE_INPUT_TOKENS = _object({"object": {"const": "response.input_tokens"}, "input_tokens": _INTEGER})
INPUT_TOKENS = _object({"input_tokens": _INTEGER})
_BLOCK = _object(
    {"type": {"type": "string", "enum": ["text", "thinking", "tool_use"]}},
    text=_STRING,
    citations={"type": "null"},
    thinking=_STRING,
    signature=_STRING,
    id=_STRING,
    name=_STRING,
    input={"type": "object"},
)
MESSAGE = _object(
    {
        "id": _STRING,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": _STRING,
        "content": _list(_BLOCK),
        "stop_reason": {"type": "string", "enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        "stop_sequence": _or_null(_STRING),
        "usage": _object(
            dict.fromkeys(
                ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"), _INTEGER
            ),
            output_tokens_details=_object({"thinking_tokens": _INTEGER}),
        ),
    }
)

TOKENS = _object(
    {
        "count": _INTEGER,
        "max_model_len": _INTEGER,
        "tokens": _list(_INTEGER),
        "token_strs": _or_null(_STRINGS),
    }
)
TEXT = _object({"prompt": _STRING})
TOKENIZER = _object(
    {"tokenizer_class": _STRING}
    | dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _or_null(_STRING))
    | {"chat_template": {}}
)

_PROMPT_USAGE = _object(dict.fromkeys(("prompt_tokens", "total_tokens"), _INTEGER))
_EMBEDDING = {"anyOf": [_list(_NUMBER), _STRING]}
EMBEDDINGS = _object(
    {
        "object": {"const": "list"},
        "data": _list(_object({"object": {"const": "embedding"}, "index": _INTEGER, "embedding": _EMBEDDING})),
        "model": _STRING,
        "usage": _PROMPT_USAGE,
    }
)
RERANKED = _object(
    {
        "id": _STRING,
        "model": _STRING,
        "usage": _PROMPT_USAGE,
        "results": _list(_object({"index": _INTEGER, "relevance_score": _NUMBER}, document=_object({"text": _STRING}))),
    }
)
SCORES = _object(
    {
        "id": _STRING,
        "object": {"const": "list"},
        "created": _INTEGER,
        "model": _STRING,
        "data": _list(_object({"index": _INTEGER, "object": {"const": "score"}, "score": _NUMBER})),
        "usage": _PROMPT_USAGE,
    }
)

PREDICTIONS = _object({"predictions": _STRINGS})


class _EventResponse(Response):
    media_type = EVENTS


def json_responses(schema: Schema, *errors: int, also: str | None = None, error: Schema = ERROR) -> dict[str, Any]:
    """Return the options of a route that responds with JSON.

    Args:
        schema: of the body of a successful response.
        errors: statuses of error responses.
        also: another media type of successful responses.
        error: schema of the body of error responses.
    """
    content = {JSON: {"schema": schema}} | ({} if also is None else {also: {}})
    responses = {status: _response(_ERRORS[status], {JSON: {"schema": error}}) for status in errors}
    return {"responses": {200: _response("Success.", content), **responses}, "response_class": JSONResponse}


def sse_responses(event: Schema, *errors: int) -> dict[str, Any]:
    """Return the options of a route that responds with server-sent events only, errors included."""
    responses = {status: _response(_ERRORS[status], {EVENTS: {"schema": _event(ERROR)}}) for status in errors}
    success = _response("Events.", {EVENTS: {"schema": _event(event)}})
    return {"responses": {200: success, **responses}, "response_class": _EventResponse}


def request_schema(schema: Schema) -> dict[str, Any]:
    """Return the options of a route that reads a JSON body."""
    return {"openapi_extra": {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}}


def document(title: str, routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI document of the routes; path parameters are derived from the paths."""
    content = get_openapi(title=title, version=version(title), routes=routes)
    for path, operations in content["paths"].items():
        operations["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _STRING} for name in re.findall(r"{(\w+)}", path)
        ]
    return content


def _event(content: Schema) -> Schema:
    """Return the schema of a server-sent event with JSON data, in the form of OpenAPI 3.2."""
    return _object({"data": {"type": "string", "contentMediaType": JSON, "contentSchema": content}})


def _response(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": content}
