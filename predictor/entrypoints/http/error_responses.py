"""Errors as HTTP responses, each in the form of the protocol whose route was asked."""

import json
import re

from starlette.responses import JSONResponse, Response

from predictor.errors import GenerationFailed, InvalidRequest, NotNow, RequestError, Unauthorized
from predictor.protocols import openai

_OPENAI = re.compile(r"/openai(/|$)|/v1(/(?!models(/|$))|$)")
"""All of /v1 but its models, which are KServe's too."""
_GENERATE = re.compile(r"/v2/models/.*/generate(_stream)?")


def respond(error: RequestError, path: str) -> Response:
    """The response to a request for `path` that failed.

    OpenAI's routes get OpenAI's error object, all others `{"error": "<one sentence>"}`; generate_stream gets it as an
    event, as its specification has it.
    """
    body = openai.encode_error(error) if _OPENAI.match(path) else {"error": str(error)}
    headers = {}
    if isinstance(error, NotNow):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    status = _status(error, path)
    if path.endswith("/generate_stream"):
        return Response(f"data: {json.dumps(body)}\n\n", status, headers, media_type="text/event-stream")
    return JSONResponse(body, status, headers)


def _status(error: RequestError, path: str) -> int:
    """The generate extension of the Open Inference Protocol has statuses of its own for two errors."""
    if _GENERATE.fullmatch(path):
        if isinstance(error, InvalidRequest):
            return 422
        if isinstance(error, GenerationFailed):
            return 424
    return error.status
