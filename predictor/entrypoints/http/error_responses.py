"""Errors as HTTP responses, in the error format of the route's protocol."""

import re
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from predictor.errors import (
    BodyTooLarge,
    GenerationFailed,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    NotNow,
    RequestError,
    Unauthorized,
    UnsupportedMediaType,
)
from predictor.observability import request_record
from predictor.protocols.anthropic import responses as anthropic
from predictor.protocols.openai import responses as openai
from predictor.protocols.server_sent_events import encode_event

_OPENAI = re.compile(r"/openai(/|$)|/v1(/(?!models(/|$))|$)|/((de)?tokenize|tokenizer_info|rerank|score)$")
"""All of /v1 except its models, which KServe v1 shares, and vLLM's tokenization, rerank and score."""
_ANTHROPIC = re.compile(r"/v1/messages(/|$)")
_GENERATE = re.compile(r"/v2/models/.*/generate(_stream)?")


def respond(error: RequestError, path: str) -> Response:
    """Return the response for `error` on `path`.

    OpenAI's and Anthropic's routes get their error objects, all others `{"error": "<message>"}`; generate_stream gets
    it as an event, by its specification.
    """
    body = _body(error, path)
    headers = {}
    if isinstance(error, NotNow):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnsupportedMediaType):
        headers["Accept-Encoding"] = "gzip, deflate"
    status = _status(error, path)
    if path.endswith("/generate_stream"):
        return Response(encode_event(body), status, headers, media_type="text/event-stream")
    return JSONResponse(body, status, headers)


def _body(error: RequestError, path: str) -> dict[str, Any]:
    if _ANTHROPIC.match(path):
        return anthropic.encode_error(error)
    return openai.encode_error(error) if _OPENAI.match(path) else {"error": str(error)}


def _status(error: RequestError, path: str) -> int:
    """Return the HTTP status; the generate extension of the Open Inference Protocol defines two of its own."""
    if _GENERATE.fullmatch(path):
        if isinstance(error, InvalidRequest):
            return 422
        if isinstance(error, GenerationFailed):
            return 424
    return error.status


async def _handle_request_error(request: Request, error: RequestError) -> Response:
    if isinstance(error, BodyTooLarge):
        # Part of the body is still unread; the middleware sends the response and discards the rest.
        raise error
    request_record.current().error = type(error).__name__
    return respond(error, request.url.path)


async def _handle_http_exception(request: Request, error: HTTPException) -> Response:
    """Convert FastAPI's own errors: unknown routes and methods."""
    path = request.url.path
    operation = f"{request.method} {path}"
    if error.status_code == 404:
        return respond(
            NotFound(
                f"Route not found: {operation}. Use /v2/models/NAME/infer, /v2/models/NAME/generate, "
                "/v1/chat/completions, /v1/responses, /v1/completions, /v1/messages, /v1/embeddings, /v1/rerank, "
                "/v1/score or /v1/models/NAME:predict."
            ),
            path,
        )
    if error.status_code == 405:
        # Starlette has the methods in a random order.
        allowed = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
        response = respond(MethodNotAllowed(f"Method not allowed: {operation}. Use {allowed}."), path)
        response.headers["Allow"] = allowed
        return response
    response = respond(InvalidRequest(f"{operation}: {error.detail}."), path)
    response.status_code = error.status_code
    return response


async def _handle_client_disconnect(request: Request, error: ClientDisconnect) -> Response:
    del request, error
    return Response(status_code=request_record.CLIENT_GONE)


HANDLERS: dict[Any, Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    RequestError: _handle_request_error,
    HTTPException: _handle_http_exception,
    ClientDisconnect: _handle_client_disconnect,
}
"""Exception handlers of the application."""
