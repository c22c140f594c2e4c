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
from predictor.entrypoints.http.streaming import (
    EventStream,
    complete,
    count_tokens,
    decode_body,
    encode_completions,
)
from predictor.generation.service import LLMService
from predictor.protocols.anthropic import requests, responses
from predictor.protocols.anthropic.streaming import EventEncoder


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
        completions = await complete(request, service, [decoded.request])
        return await encode_completions(completions, lambda: responses.encode(decoded, completions[0]))

    @router.post(
        "/v1/messages/count_tokens",
        **request_schema(requests.COUNT_TOKENS_SCHEMA),
        **json_responses(openapi.INPUT_TOKENS, 400, *GENERATION_ERRORS, error=ANTHROPIC_ERROR),
    )
    async def count_input_tokens(request: Request) -> JSONResponse:
        model, chat = await decode_body(request, "anthropic", requests.decode_count_tokens)
        service.models.require(model)
        return JSONResponse({"input_tokens": await count_tokens(request, service, chat)})

    return router
