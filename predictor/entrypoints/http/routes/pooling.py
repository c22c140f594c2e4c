"""Embeddings in OpenAI's form, rerank in Jina's and Cohere's, score in vLLM's."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from predictor.entrypoints.http import openapi
from predictor.entrypoints.http.openapi import GENERATION_ERRORS, OPENAI_ERROR, json_responses, request_schema
from predictor.entrypoints.http.streaming import cancel_on_disconnect, decode_body, encode_json
from predictor.generation.service import LLMService
from predictor.protocols import scoring
from predictor.protocols.openai import embeddings
from predictor.protocols.sampling_fields import timeout_seconds
from predictor.types import Pooled, PoolingRequest


def create_router(service: LLMService) -> APIRouter:
    """Build the routes of models that embed or classify."""
    router = APIRouter(tags=["Pooling"])
    models = service.models

    async def respond(request: Request, work: PoolingRequest, encode: Callable[[Pooled], dict[str, Any]]) -> Response:
        pooled = await cancel_on_disconnect(request.receive, service.pool(work, timeout_seconds(request.headers)))
        return await encode_json(pooled.vectors.size, lambda: encode(pooled))

    async def create_embeddings(request: Request) -> Response:
        decoded = await decode_body(request, "openai", embeddings.decode)
        models.require(decoded.model)
        return await respond(request, decoded.request, lambda pooled: embeddings.encode(decoded, pooled))

    async def rerank(request: Request) -> Response:
        decoded = await decode_body(request, "rerank", scoring.decode_rerank)
        name = decoded.model or models.default
        models.require(name)
        return await respond(request, decoded.request, lambda pooled: scoring.encode_rerank(decoded, pooled, name))

    async def score(request: Request) -> Response:
        pairs, model = await decode_body(request, "score", scoring.decode_score)
        name = model or models.default
        models.require(name)
        return await respond(request, pairs, lambda pooled: scoring.encode_score(pooled, name))

    for paths, endpoint, body, response in (
        (
            ("/v1/embeddings", "/openai/v1/embeddings"),
            create_embeddings,
            embeddings.EMBEDDING_SCHEMA,
            openapi.EMBEDDINGS,
        ),
        (("/v1/rerank", "/rerank"), rerank, scoring.RERANK_SCHEMA, openapi.RERANKED),
        (("/v1/score", "/score"), score, scoring.SCORE_SCHEMA, openapi.SCORES),
    ):
        for path in paths:
            router.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                **request_schema(body),
                **json_responses(response, 400, *GENERATION_ERRORS, error=OPENAI_ERROR),
            )
    return router
