"""OpenAI's completions, chat completions and models; /v1/models is KServe v1's list as well."""

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from predictor.entrypoints.http import openapi
from predictor.entrypoints.http.openapi import EVENTS, GENERATION_ERRORS, OPENAI_ERROR, json_responses, request_schema
from predictor.entrypoints.http.routes.health import require_ready
from predictor.entrypoints.http.streaming import EventStream, complete, decode_body, encode_completions
from predictor.generation.service import LLMService
from predictor.protocols.openai import requests, responses
from predictor.protocols.openai.models import model_card, model_list
from predictor.protocols.openai.streaming import EventEncoder


def create_router(service: LLMService) -> APIRouter:
    """Build the routes below /v1 and /openai/v1."""
    router = APIRouter(tags=["OpenAI"])
    models = service.models
    created = int(time.time())

    @router.get("/openai/v1/models", **json_responses(openapi.OPENAI_MODELS, 401, error=OPENAI_ERROR))
    async def list_models() -> dict[str, Any]:
        return model_list(models.names, created=created, context_tokens=service.context_tokens, lineage=service.lineage)

    @router.get("/openai/v1/models/{model_name}", **json_responses(openapi.OPENAI_MODEL, 401, 404, error=OPENAI_ERROR))
    async def get_model(request: Request) -> dict[str, Any]:
        name = request.path_params["model_name"]
        models.require(name)
        return model_card(name, created=created, context_tokens=service.context_tokens, lineage=service.lineage)

    @router.get("/v1/models", **json_responses(openapi.BOTH_MODELS, 401))
    async def list_models_for_both() -> dict[str, Any]:
        """List models for OpenAI's clients and KServe v1's; each ignores the fields of the other."""
        return {**await list_models(), "models": list(models.names)}

    @router.get("/v1/models/{model_name}", **json_responses(openapi.BOTH_MODEL, 401, 404, 503))
    async def get_model_for_both(request: Request) -> dict[str, Any]:
        """Return OpenAI's model and KServe v1's readiness in one object."""
        model = await get_model(request)
        require_ready(service)
        return {**model, "name": model["id"], "ready": True}

    async def respond(request: Request, decoded: requests.DecodedRequest) -> Response:
        models.require(decoded.model)
        if decoded.stream:
            return await EventStream.start(request, service, decoded.requests, EventEncoder(decoded))
        completions = await complete(request, service, decoded.requests)
        return await encode_completions(completions, lambda: responses.encode(decoded, completions))

    async def completions(request: Request) -> Response:
        return await respond(request, await decode_body(request, "openai", requests.decode_completion))

    async def chat_completions(request: Request) -> Response:
        return await respond(request, await decode_body(request, "openai", requests.decode_chat_completion))

    for prefix in ("/openai/v1", "/v1"):
        for path, endpoint, body, response in (
            ("/completions", completions, requests.COMPLETION_SCHEMA, openapi.COMPLETION),
            ("/chat/completions", chat_completions, requests.CHAT_COMPLETION_SCHEMA, openapi.CHAT_COMPLETION),
        ):
            router.add_api_route(
                prefix + path,
                endpoint,
                methods=["POST"],
                **request_schema(body),
                **json_responses(response, 400, *GENERATION_ERRORS, also=EVENTS, error=OPENAI_ERROR),
            )
    return router
