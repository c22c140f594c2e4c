"""Open Inference Protocol v2 with its generate extension."""

from functools import partial
from importlib.metadata import version as installed_version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from predictor import served_models
from predictor.entrypoints import kserve_server, response_encoding
from predictor.entrypoints.http import openapi
from predictor.entrypoints.http.openapi import GENERATION_ERRORS, OCTETS, json_responses, request_schema, sse_responses
from predictor.entrypoints.http.routes.health import require_ready
from predictor.entrypoints.http.streaming import (
    EventStream,
    cancel_on_disconnect,
    complete,
    decode_body,
    encode_completions,
)
from predictor.entrypoints.kserve_model import Predictor
from predictor.generation.service import LLMService
from predictor.protocols import open_inference, open_inference_generate
from predictor.protocols.open_inference_binary import HEADER_LENGTH

MODEL_PATHS = ("/models/{model_name}", "/models/{model_name}/versions/{model_version}")


def create_router(service: LLMService, predictor: Predictor) -> APIRouter:
    """Build the routes below /v2."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("", **json_responses(openapi.SERVER, 401))
    async def server_metadata() -> dict[str, Any]:
        version = installed_version(open_inference.SERVER)
        return {"name": open_inference.SERVER, "version": version, "extensions": list(open_inference.EXTENSIONS)}

    @router.get("/models", **json_responses(openapi.MODEL_NAMES, 401))
    async def list_models() -> dict[str, Any]:
        return {"models": list(service.models.names)}

    async def model_metadata(request: Request) -> dict[str, Any]:
        name, _ = _require_model(request, service)
        return {
            "name": name,
            "versions": [served_models.VERSION],
            "platform": open_inference.PLATFORM,
            "inputs": predictor.get_input_types(),
            "outputs": predictor.get_output_types(),
            "properties": service.metadata,
        }

    async def model_ready(request: Request) -> dict[str, Any]:
        name, _ = _require_model(request, service)
        require_ready(service)
        return {"name": name, "ready": True}

    async def infer(request: Request) -> Response:
        name, version = _require_model(request, service)
        parse = partial(open_inference.parse, model_name=name, header_length=request.headers.get(HEADER_LENGTH))
        payload = await decode_body(request, "v2", parse)
        inference = kserve_server.infer(predictor, payload, dict(request.headers))
        response = await cancel_on_disconnect(request.receive, inference)
        content, header_length = await response_encoding.encode(
            open_inference.num_values(response), partial(open_inference.serialize, payload, response, version)
        )
        if header_length is None:
            return Response(content, media_type="application/json")
        headers = {HEADER_LENGTH: str(header_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def generate(request: Request) -> Response:
        name, version = _require_model(request, service)
        decode = partial(open_inference_generate.decode, model_name=name, version=version)
        decoded = await decode_body(request, "generate", decode)
        completions = await complete(request, service, [decoded.request])
        return await encode_completions(completions, lambda: open_inference_generate.encode(decoded, completions))

    async def generate_stream(request: Request) -> Response:
        name, version = _require_model(request, service)
        decode = partial(open_inference_generate.decode_stream, model_name=name, version=version)
        decoded = await decode_body(request, "generate_stream", decode)
        return await EventStream.start(
            request, service, [decoded.request], open_inference_generate.EventEncoder(decoded)
        )

    generate_schema = request_schema(open_inference_generate.REQUEST_SCHEMA)
    for path in MODEL_PATHS:
        router.add_api_route(path, model_metadata, **json_responses(openapi.MODEL, 401, 404))
        router.add_api_route(f"{path}/ready", model_ready, **json_responses(openapi.MODEL_READY, 404, 503))
        router.add_api_route(
            f"{path}/infer",
            infer,
            methods=["POST"],
            **request_schema(open_inference.REQUEST_SCHEMA),
            **json_responses(openapi.INFERRED, 400, *GENERATION_ERRORS, also=OCTETS),
        )
        router.add_api_route(
            f"{path}/generate",
            generate,
            methods=["POST"],
            **generate_schema,
            **json_responses(openapi.GENERATED, 422, 424, *GENERATION_ERRORS),
        )
        router.add_api_route(
            f"{path}/generate_stream",
            generate_stream,
            methods=["POST"],
            **generate_schema,
            **sse_responses(openapi.GENERATED_EVENT, 422, 424, *GENERATION_ERRORS),
        )
    return router


def _require_model(request: Request, service: LLMService) -> tuple[str, str | None]:
    """Return the model and version of the path; raises NotFound."""
    name, version = request.path_params["model_name"], request.path_params.get("model_version")
    service.models.require(name, version)
    return name, version
