"""Liveness, readiness, version and Prometheus metrics."""

from importlib.metadata import version as installed_version
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder

from predictor.entrypoints.http import openapi
from predictor.entrypoints.http.openapi import json_responses
from predictor.entrypoints.http.routes import playground
from predictor.errors import ModelNotReady, NotNow
from predictor.generation.service import LLMService
from predictor.protocols.open_inference import SERVER

LINKS = {"models": "/v1/models", "ready": "/v2/health/ready", "metrics": "/metrics", "openapi": "/openapi.json"}


def create_router(service: LLMService, *, has_page: bool = False) -> APIRouter:
    """Build the routes of probes and of Prometheus, and of `/`, where browsers find the page if there is one."""
    router = APIRouter(tags=["health"])
    version = installed_version(SERVER)

    @router.get("/", include_in_schema=False)
    async def root(request: Request, response: Response) -> Any:
        if has_page and playground.is_requested(request):
            return playground.respond()
        response.headers["Vary"] = "Accept"
        # KServe's v1 clients compare the status.
        return {"status": "alive", "name": SERVER, "version": version, "links": LINKS}

    @router.get("/version", include_in_schema=False)
    async def server_version() -> dict[str, str]:
        return {"version": version}

    @router.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(REGISTRY), headers={"content-type": content_type})

    @router.get("/v2/health/live", **json_responses(openapi.LIVE, 503))
    async def server_live() -> dict[str, bool]:
        if not service.is_live:
            raise NotNow("The step loop makes no progress. The server has to be restarted.")
        return {"live": True}

    @router.get("/health", include_in_schema=False)
    @router.get("/ping", include_in_schema=False)
    @router.get("/v2/health/ready", **json_responses(openapi.READY, 503))
    async def server_ready() -> dict[str, bool]:
        require_ready(service)
        return {"ready": True}

    return router


def require_ready(service: LLMService) -> None:
    """Check that the model is ready, or that requests are held until it is.

    Raises:
        ModelNotReady: it is not; the message has the reason.
    """
    if not service.accepts_requests:
        raise ModelNotReady(
            f"Model {service.models.default} is not ready: {service.not_ready_reason}.", service.retry_after_seconds
        )
