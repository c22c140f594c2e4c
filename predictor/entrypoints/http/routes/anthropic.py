"""Anthropic's messages."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from predictor.entrypoints.http import openapi
from predictor.entrypoints.http.openapi import (
    ANTHROPIC_ERROR,
    EVENTS,
    GENERATION_ERRORS,
    json_responses,
    request_schema,
)
from predictor.entrypoints.http.streaming import EventStream, cancel_on_disconnect, complete, decode_body
from predictor.generation.service import LLMService
from predictor.protocols.anthropic import requests, responses
from predictor.protocols.anthropic.streaming import EventEncoder
from predictor.protocols.sampling_fields import timeout_seconds


def create_router(service: LLMService) -> APIRouter:
    """Build the routes below /v1/messages."""
    router = APIRouter(tags=["Anthropic"])

    @router.post(
        "/v1/messages",
        **request_schema(requests.MESSAGES_SCHEMA),
        **json_responses(openapi.MESSAGE, 400, *GENERATION_ERRORS, also=EVENTS, error=ANTHROPIC_ERROR),
    )
    async def create_message(request: Request) -> Response:
        decoded = await decode_body(request, "anthropic", requests.decode_messages)
        service.models.require(decoded.model)
        if decoded.stream:
            return await EventStream.start(request, service, [decoded.request], EventEncoder(decoded))
        [completion] = await complete(request, service, [decoded.request])
        return JSONResponse(responses.encode(decoded, completion))

    @router.post(
        "/v1/messages/count_tokens",
        **request_schema(requests.COUNT_TOKENS_SCHEMA),
        **json_responses(openapi.INPUT_TOKENS, 400, *GENERATION_ERRORS, error=ANTHROPIC_ERROR),
    )
    async def count_tokens(request: Request) -> JSONResponse:
        model, chat = await decode_body(request, "anthropic", requests.decode_count_tokens)
        service.models.require(model)
        work = service.tokenize(chat, timeout_seconds(request.headers), add_special_tokens=False, with_texts=False)
        tokens = await cancel_on_disconnect(request.receive, work)
        return JSONResponse({"input_tokens": len(tokens.token_ids)})

    return router
