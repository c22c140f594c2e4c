"""KServe's v1 protocol: predict."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from predictor.entrypoints.http import openapi
from predictor.entrypoints.http.openapi import GENERATION_ERRORS, json_responses, request_schema
from predictor.entrypoints.http.streaming import complete, decode_body, encode_completions
from predictor.errors import NotFound
from predictor.generation.service import LLMService
from predictor.protocols import kserve_v1


def create_router(service: LLMService) -> APIRouter:
    """Build the routes below /v1/models/NAME; include them before OpenAI's, whose NAME would match `NAME:predict`."""
    router = APIRouter(prefix="/v1", tags=["KServe v1"])

    @router.post(
        "/models/{model_name}:predict",
        **request_schema(kserve_v1.REQUEST_SCHEMA),
        **json_responses(openapi.PREDICTIONS, 400, *GENERATION_ERRORS),
    )
    async def predict(request: Request) -> Response:
        service.models.require(request.path_params["model_name"])
        requests = await decode_body(request, "v1", kserve_v1.decode)
        completions = await complete(request, service, requests)
        return await encode_completions(completions, lambda: kserve_v1.encode(requests, completions))

    @router.get("/models/{model_name}:predict", include_in_schema=False)
    async def predict_by_get() -> None:
        """Reject GET, which would match the path of a model's readiness."""
        raise HTTPException(405, headers={"Allow": "POST"})

    @router.post("/models/{model_name}:explain", include_in_schema=False)
    async def explain(request: Request) -> None:
        name = request.path_params["model_name"]
        service.models.require(name)
        raise NotFound(f"`:explain` is not supported. POST /v1/models/{name}:predict.")

    return router
