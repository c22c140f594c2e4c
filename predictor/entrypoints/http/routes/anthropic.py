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
from predictor.entrypoints.http.streaming import EventStream, complete, decode_body
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
        [completion] = await complete(request, service, [decoded.request])
        return JSONResponse(responses.encode(decoded, completion))

    return router
