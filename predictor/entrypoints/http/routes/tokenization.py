"""vLLM's tokenization routes."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from predictor.entrypoints.http import openapi
from predictor.entrypoints.http.openapi import GENERATION_ERRORS, OPENAI_ERROR, json_responses, request_schema
from predictor.entrypoints.http.streaming import cancel_on_disconnect, decode_body, encode_json
from predictor.generation.service import LLMService
from predictor.protocols import tokenization
from predictor.protocols.sampling_fields import timeout_seconds


def create_router(service: LLMService) -> APIRouter:
    """Build the routes /tokenize, /detokenize and /tokenizer_info."""
    router = APIRouter(tags=["Tokenization"])

    @router.post(
        "/tokenize",
        **request_schema(tokenization.TOKENIZE_SCHEMA),
        **json_responses(openapi.TOKENS, 400, *GENERATION_ERRORS, error=OPENAI_ERROR),
    )
    async def tokenize(request: Request) -> Response:
        decoded = await decode_body(request, "tokenize", tokenization.decode_tokenize)
        service.models.require(decoded.model or service.models.default)
        work = service.tokenize(
            decoded.prompt,
            timeout_seconds(request.headers),
            add_special_tokens=decoded.add_special_tokens,
            with_texts=decoded.with_texts,
        )
        tokens = await cancel_on_disconnect(request.receive, work)
        return await encode_json(
            len(tokens.token_ids), lambda: tokenization.encode_tokenize(tokens, service.context_tokens)
        )

    @router.post(
        "/detokenize",
        **request_schema(tokenization.DETOKENIZE_SCHEMA),
        **json_responses(openapi.TEXT, 400, *GENERATION_ERRORS, error=OPENAI_ERROR),
    )
    async def detokenize(request: Request) -> JSONResponse:
        model, token_ids = await decode_body(request, "tokenize", tokenization.decode_detokenize)
        service.models.require(model or service.models.default)
        work = service.detokenize(token_ids, timeout_seconds(request.headers))
        return JSONResponse({"prompt": await cancel_on_disconnect(request.receive, work)})

    @router.get("/tokenizer_info", **json_responses(openapi.TOKENIZER, 401, 503, error=OPENAI_ERROR))
    async def tokenizer_info() -> dict[str, Any]:
        return service.tokenizer_info()

    return router
