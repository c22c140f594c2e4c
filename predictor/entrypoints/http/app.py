"""`create_app`: the HTTP application of one `LLMService`."""

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware import Middleware

from predictor.entrypoints.api_keys import KeyFile
from predictor.entrypoints.http import error_responses, middleware, openapi
from predictor.entrypoints.http.routes import admin, health, kserve_v1, open_inference, openai
from predictor.entrypoints.kserve_model import Predictor
from predictor.generation.service import LLMService
from predictor.protocols.open_inference import SERVER
from predictor.settings import Settings

if TYPE_CHECKING:
    from predictor.observability.tracing import Tracing


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
    authentication = [Middleware(middleware.ApiKeyMiddleware, keys=api_keys)] if api_keys else []
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        exception_handlers=error_responses.HANDLERS,
        middleware=[
            Middleware(
                middleware.RequestLogMiddleware,
                count=service.count_request,
                trace=tracing.export_http if tracing else None,
            ),
            Middleware(middleware.DrainMiddleware, is_open=lambda: not service.is_shutting_down),
            *authentication,
            Middleware(middleware.MaxBodySizeMiddleware, max_bytes=settings.max_request_bytes),
        ],
    )
    predictor = Predictor(service)
    routers = (
        health.create_router(service),
        open_inference.create_router(service, predictor),
        kserve_v1.create_router(service),
        openai.create_router(service),
        admin.create_router(predictor) if settings.enable_admin_routes else admin.create_disabled_router(),
    )
    for router in routers:
        app.include_router(router)
    document = openapi.document(SERVER, [route for router in routers for route in router.routes])
    app.openapi = lambda: document  # type: ignore[method-assign]
    return app
