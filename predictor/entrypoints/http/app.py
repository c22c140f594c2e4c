"""`create_app`: the HTTP application of one `LLMService`."""

from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from predictor.entrypoints.api_keys import KeyFile
from predictor.entrypoints.http import error_responses, middleware, openapi
from predictor.entrypoints.http.routes import (
    admin,
    anthropic,
    health,
    kserve_v1,
    open_inference,
    openai,
    openai_responses,
    playground,
    pooling,
    tokenization,
)
from predictor.entrypoints.kserve_model import Predictor
from predictor.generation.service import LLMService
from predictor.observability.request_record import IGNORED_FIELDS_HEADER
from predictor.protocols.open_inference import SERVER
from predictor.protocols.open_inference_binary import HEADER_LENGTH
from predictor.settings import Settings

if TYPE_CHECKING:
    from predictor.observability.tracing import Tracing

EXPOSED_HEADERS = ("x-request-id", IGNORED_FIELDS_HEADER, "Retry-After", HEADER_LENGTH)
"""Response headers that a script of another origin may read, in addition to those that every script may."""


def create_app(
    service: LLMService, settings: Settings, *, api_keys: KeyFile | None = None, tracing: "Tracing | None" = None
) -> FastAPI:
    """Build a new application; several can serve different models in one process.

    Args:
        service: generates; may still be loading.
        settings: limits and optional routes.
        api_keys: accepted bearer keys; None: requests need none.
        tracing: exports a span for each request; None: off.
    """
    cors = [_cors(settings.origins)] if settings.origins else []
    authentication = [Middleware(middleware.ApiKeyMiddleware, keys=api_keys)] if api_keys else []
    body_limit = Middleware(middleware.MaxBodySizeMiddleware, max_bytes=settings.max_request_bytes)
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=error_responses.HANDLERS,
        middleware=[
            Middleware(middleware.ConnectionMiddleware, is_terminating=lambda: service.is_terminating),
            *cors,
            Middleware(middleware.NormalizePathMiddleware),
            Middleware(
                middleware.RequestLogMiddleware,
                count=service.count_request,
                trace=tracing.export_http if tracing else None,
            ),
            Middleware(middleware.DrainMiddleware, is_open=lambda: not service.is_shutting_down),
            *authentication,
            body_limit,
            Middleware(middleware.DecodeBodyMiddleware),
            body_limit,
        ],
    )
    predictor = Predictor(service)
    routers = (
        health.create_router(service, has_page=settings.playground),
        open_inference.create_router(service, predictor),
        kserve_v1.create_router(service),
        openai.create_router(service),
        openai_responses.create_router(service),
        anthropic.create_router(service),
        pooling.create_router(service),
        tokenization.create_router(service),
        admin.create_router(predictor) if settings.enable_admin_routes else admin.create_disabled_router(),
        *([playground.create_router()] if settings.playground else []),
    )
    document = openapi.document(SERVER, [route for router in routers for route in router.routes])
    app.openapi = lambda: document  # type: ignore[method-assign]
    for router in routers:
        _add_head(router)
        app.include_router(router)
    return app


def _add_head(router: APIRouter) -> None:
    """Answer HEAD wherever GET is answered, which FastAPI leaves to the application; uvicorn drops the body."""
    for route in router.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")


def _cors(origins: tuple[str, ...]) -> Middleware:
    """Return the middleware that lets scripts of these origins send requests and read responses, errors included."""
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=EXPOSED_HEADERS,
    )
