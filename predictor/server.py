"""KServe's model server with our routes: health that tells the truth, v2 infer, and one place for every error.

The SDK's app is kept (metrics, v1, metadata); a route added here before the start wins over the SDK's of the same path.
"""

import asyncio
import json
import logging
import logging.config
import socket
import threading
from importlib.metadata import version
from typing import Any

import kserve
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve.model_server import app as kserve_app
from starlette.exceptions import HTTPException

from predictor.errors import (
    Forbidden,
    GenerationFailed,
    InvalidRequest,
    ModelNotReady,
    NotFound,
    PortInUse,
    RequestError,
    StartupError,
    Unavailable,
)
from predictor.model import Phase, Predictor
from predictor.protocol import v2
from predictor.settings import Settings

logger = logging.getLogger(__name__)

DISTRIBUTION = "kserve-llm"
RETRY_AFTER_SECONDS = 5
"""What a 503 suggests; a load or a restart is not over sooner."""


class Server(kserve.ModelServer):
    """Opens the port, then loads the model behind it; ends when it is told to, or when the load fails."""

    def __init__(self, predictor: Predictor, settings: Settings) -> None:
        repository = kserve.ModelRepository()
        repository.update(predictor)
        super().__init__(
            http_port=settings.http_port,
            registered_models=repository,
            workers=1,
            enable_grpc=False,
            enable_latency_logging=False,
            grace_period=settings.shutdown_grace_seconds,
        )
        self._predictor = predictor
        self._load = threading.Thread(target=self._run_load, name="load", daemon=True)
        self._loaded: asyncio.Future[None] | None = None

    @property
    def loading(self) -> bool:
        """Whether the load still runs, which nothing can interrupt."""
        return self._load.is_alive()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; running requests are finished first.

        Raises:
            StartupError: the port is taken, or the model cannot be loaded.
        """
        _check_port(self.http_port)
        equip(kserve_app, self._predictor)
        try:
            # A model that is not ready must not be given to start(): it would refuse to start at all.
            self.start([])
        finally:
            self._predictor.stop()

    async def _serve(self) -> None:
        """What `start` runs on its event loop; overridden so that the load begins once the port is about to open."""
        serving: asyncio.Future[Any] = asyncio.gather(*self.servers)
        loaded = self._loaded = asyncio.get_running_loop().create_future()
        self._load.start()
        await asyncio.wait({serving, loaded}, return_when=asyncio.FIRST_COMPLETED)
        # A load that a stop has cut off is no failure.
        failed = loaded.done() and loaded.exception() is not None and self._predictor.phase is not Phase.STOPPED
        if failed:
            self._rest_server._server.should_exit = True
        await serving
        if failed:
            loaded.result()

    def _run_load(self) -> None:
        """The load, in a daemon thread: a SIGTERM in the middle of it must not wait for its end."""
        outcome: StartupError | None = None
        try:
            self._predictor.load()
        except StartupError as error:
            outcome = error
        except Exception as error:
            logger.exception("the load failed")
            outcome = StartupError(f"The model cannot be loaded: {error}")
        loaded = self._loaded
        if loaded is None or loaded.get_loop().is_closed():
            return

        def settle() -> None:
            if outcome is None:
                loaded.set_result(None)
            else:
                loaded.set_exception(outcome)

        loaded.get_loop().call_soon_threadsafe(settle)


def equip(app: FastAPI, predictor: Predictor) -> None:
    """Add our routes and error handlers to KServe's app."""
    app.include_router(routes(predictor))
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)


def routes(predictor: Predictor) -> APIRouter:
    """The v2 routes of one model."""
    router = APIRouter(prefix="/v2", default_response_class=JSONResponse)

    def known(model_name: str) -> None:
        if model_name != predictor.name:
            raise NotFound(f"There is no model {model_name!r} here, only {predictor.name!r}.")

    async def require_ready() -> None:
        if not await predictor.healthy():
            raise ModelNotReady(f"The model {predictor.name} is not ready: {predictor.phase}.")

    @router.get("")
    async def server_metadata() -> dict[str, Any]:
        return {"name": DISTRIBUTION, "version": version(DISTRIBUTION), "extensions": []}

    @router.get("/health/live")
    async def server_live() -> dict[str, bool]:
        if not predictor.live:
            raise Unavailable("The step loop has ended; the server has to be restarted.")
        return {"live": True}

    @router.get("/health/ready")
    async def server_ready() -> dict[str, bool]:
        await require_ready()
        return {"ready": True}

    @router.get("/models/{model_name}/ready")
    async def model_ready(model_name: str) -> dict[str, Any]:
        known(model_name)
        await require_ready()
        return {"name": predictor.name, "ready": True}

    @router.get("/models/{model_name}")
    async def model_metadata(model_name: str) -> dict[str, Any]:
        known(model_name)
        return {
            "name": predictor.name,
            "platform": "transformers_safetensors",
            "inputs": predictor.get_input_types(),
            "outputs": predictor.get_output_types(),
        }

    @router.post("/models/{model_name}/infer")
    async def infer(model_name: str, request: Request) -> JSONResponse:
        known(model_name)
        if "inference-header-content-length" in request.headers:
            raise InvalidRequest("Binary tensors are not served; send the tensor's data inside the JSON.")
        try:
            response, _ = await predictor(v2.parse(await request.body(), model_name), headers=dict(request.headers))
        except RequestError:
            raise
        except Exception as error:
            logger.exception("infer failed")
            raise GenerationFailed("The server failed on this request; its log says why.") from error
        return JSONResponse(v2.serialize(response))

    @router.post("/repository/models/{model_name}/{action}")
    async def repository(action: str) -> None:
        raise Forbidden(f"This server does not {action} models on request; it serves {predictor.name}, as deployed.")

    return router


def configure_logging(level: str) -> None:
    """One line per event on stderr, ours and KServe's alike; probes and the SDK's per-request traces left out.

    Args:
        level: the least severe level that is written.
    """
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"no_probes": {"()": _NoProbes}},
            "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}
            },
            "root": {"handlers": ["stderr"], "level": level},
            "loggers": {
                # A handler of its own keeps the SDK from installing its configuration.
                "kserve": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
                "kserve.trace": {"level": "ERROR"},
                "uvicorn.access": {"filters": ["no_probes"]},
                "httpx": {"level": "WARNING"},
                "ContinuousBatchingLogger": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
            },
        }
    )


class _NoProbes(logging.Filter):
    """Leaves out access lines of probes and scrapes, several a minute for as long as the pod lives."""

    def filter(self, record: logging.LogRecord) -> bool:
        path = str(record.args[2]) if isinstance(record.args, tuple) and len(record.args) > 2 else ""
        return not (path.startswith("/v2/health") or path.endswith("/ready") or path == "/metrics")


def _check_port(port: int) -> None:
    """Uvicorn would report a taken port with a traceback of ours around it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104
        except OSError as error:
            raise PortInUse(
                f"Port {port} cannot be opened ({error.strerror}); choose another with --http_port."
            ) from None


async def _answer_request_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestError):
        raise error
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if isinstance(error, Unavailable) else None
    return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)


async def _answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    """The SDK's own routes validate with FastAPI, whose answer would repeat the whole request."""
    if not isinstance(error, RequestValidationError):
        raise error
    fields = ", ".join(".".join(map(str, issue["loc"])) for issue in error.errors())
    return JSONResponse({"error": f"The request is malformed at {fields}."}, status_code=400)


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    detail = error.detail if isinstance(error.detail, str) else json.dumps(error.detail)
    return JSONResponse(
        {"error": f"{request.method} {request.url.path}: {detail}."},
        status_code=error.status_code,
        headers=error.headers,
    )
