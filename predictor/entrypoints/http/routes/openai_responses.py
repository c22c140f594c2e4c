"""OpenAI's Responses API; responses are not stored."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from predictor.entrypoints.http import openapi
from predictor.entrypoints.http.openapi import EVENTS, GENERATION_ERRORS, OPENAI_ERROR, json_responses, request_schema
from predictor.entrypoints.http.streaming import (
    EventStream,
    complete,
    count_tokens,
    decode_body,
    encode_completions,
)
from predictor.errors import NotFound
from predictor.generation.service import LLMService
from predictor.protocols.openai_responses import requests, responses
from predictor.protocols.openai_responses.streaming import EventEncoder


def create_router(service: LLMService) -> APIRouter:
    """Build the routes below /v1/responses and /openai/v1/responses."""
    router = APIRouter(tags=["OpenAI"])

    async def create(request: Request) -> Response:
        decoded = await decode_body(request, "openai", requests.decode)
        service.models.require(decoded.model)
        if decoded.stream:
            return await EventStream.start(request, service, [decoded.request], EventEncoder(decoded))
        completions = await complete(request, service, [decoded.request])
        return await encode_completions(completions, lambda: responses.encode(decoded, completions))

    async def count_input_tokens(request: Request) -> dict[str, Any]:
        model, chat = await decode_body(request, "openai", requests.decode_input)
        service.models.require(model)
        input_tokens = await count_tokens(request, service, chat)
        return {"object": "response.input_tokens", "input_tokens": input_tokens}

    async def reject(response_id: str) -> dict[str, Any]:
        raise NotFound(f"Response {response_id} not found: responses are not stored. Keep them in the client.")

    for prefix in ("/openai/v1", "/v1"):
        router.add_api_route(
            f"{prefix}/responses",
            create,
            methods=["POST"],
            **request_schema(requests.RESPONSE_SCHEMA),
            **json_responses(openapi.RESPONSE, 400, *GENERATION_ERRORS, also=EVENTS, error=OPENAI_ERROR),
        )
        router.add_api_route(
            f"{prefix}/responses/input_tokens",
            count_input_tokens,
            methods=["POST"],
            **request_schema(requests.RESPONSE_SCHEMA),
            **json_responses(openapi.RESPONSE_INPUT_TOKENS, 400, *GENERATION_ERRORS, error=OPENAI_ERROR),
        )
        stored = f"{prefix}/responses/{{response_id}}"
        for path, methods in (
            (stored, ["GET", "DELETE"]),
            (f"{stored}/input_items", ["GET"]),
            (f"{stored}/cancel", ["POST"]),
        ):
            router.add_api_route(path, reject, methods=methods, include_in_schema=False)
    return router
