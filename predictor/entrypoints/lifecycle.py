"""KServe's model server around our routes: the port opens first, errors have one place, and the end is orderly.

SIGTERM or SIGINT: not ready at once, new requests are refused, running ones finish or meet the drain limit, exit 0.
A second signal ends what still runs.
"""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import kserve
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from kserve.model_server import app as kserve_app
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from predictor.entrypoints import grpc_server
from predictor.entrypoints.api_keys import KeyFile
from predictor.entrypoints.http import error_responses, middleware, routes
from predictor.entrypoints.kserve_model import Phase, Predictor
from predictor.errors import (
    BodyTooLarge,
    InvalidRequest,
    InvalidSettings,
    MethodNotAllowed,
    NotFound,
    PortInUse,
    RequestError,
    StartupError,
)
from predictor.observability import request_record
from predictor.settings import Settings

if TYPE_CHECKING:
    from predictor.observability.tracing import Tracing

logger = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 0.1
FAREWELL_SECONDS = 5
"""What connections get to write the last of their answers, once nothing is generated any more."""


class Server(kserve.ModelServer):
    """Opens the port, then loads the model behind it; ends when it is told to, or when the load fails.

    Raises:
        InvalidSettings: the keys cannot be read, or what a setting needs is not installed.
    """

    def __init__(self, predictor: Predictor, settings: Settings) -> None:
        repository = kserve.ModelRepository()
        repository.update(predictor)
        super().__init__(
            http_port=settings.http_port,
            registered_models=repository,
            workers=1,
            enable_grpc=False,
            enable_latency_logging=False,
            grace_period=FAREWELL_SECONDS,
        )
        self._predictor = predictor
        self._settings = settings
        self._load = threading.Thread(target=self._run_load, name="load", daemon=True)
        self._loaded: asyncio.Future[None] | None = None
        self._drain: asyncio.Task[None] | None = None
        self._told_again = False
        self._keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
        self._tracing = _tracing(settings)

    @property
    def still_working(self) -> bool:
        """Whether a thread is at something that nothing can interrupt: the load, or a step that hangs."""
        return self._load.is_alive() or not self._predictor.has_ended

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; running requests are finished first.

        Raises:
            StartupError: a port is taken, or the model cannot be loaded.
        """
        _check_port(self.http_port, "--http_port")
        if self._settings.enable_grpc:
            _check_port(self._settings.grpc_port, "--grpc_port")
        equip(kserve_app, self._predictor, self._settings, self._keys, self._tracing)
        try:
            # A model that is not ready must not be given to start(): it would refuse to start at all.
            self.start([])
        finally:
            self._predictor.stop()
            if self._tracing:
                self._tracing.close()

    async def _serve(self) -> None:
        """What `start` runs on its event loop; overridden so that the load begins once the port is about to open."""
        loop = asyncio.get_running_loop()

        def hear(number: int, _: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._hear, number)

        # Uvicorn installs this for SIGTERM and SIGINT; its own would close the port before the requests have ended.
        self._rest_server._server.handle_exit = hear
        async with contextlib.AsyncExitStack() as stack:
            if self._settings.enable_grpc:
                await stack.enter_async_context(
                    grpc_server.serving(
                        self._predictor,
                        port=self._settings.grpc_port,
                        max_message_bytes=self._settings.max_request_bytes,
                        keys=self._keys,
                        tracing=self._tracing,
                    )
                )
            await self._serve_and_load(asyncio.gather(*self.servers))

    async def _serve_and_load(self, serving: "asyncio.Future[Any]") -> None:
        loop = asyncio.get_running_loop()
        loaded = self._loaded = loop.create_future()
        self._load.start()
        await asyncio.wait({serving, loaded}, return_when=asyncio.FIRST_COMPLETED)
        # A load that a stop has cut off is no failure.
        failed = loaded.done() and loaded.exception() is not None and self._predictor.phase is not Phase.STOPPED
        if failed:
            self._close_port()
        checks = loop.create_task(self._predictor.check_itself())
        await serving
        checks.cancel()
        if failed:
            loaded.result()

    def _hear(self, number: int) -> None:
        if self._drain is None:
            logger.info("%s: finishing what runs, taking nothing new", signal.Signals(number).name)
            self._drain = asyncio.get_running_loop().create_task(self._end())
        else:
            logger.warning("%s again: ending what still runs", signal.Signals(number).name)
            self._told_again = True

    async def _end(self) -> None:
        self._predictor.drain()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.shutdown_grace_seconds):
                    # A step loop that is dead or hangs finishes nothing.
                    while self._predictor.busy and self._predictor.live and not self._told_again:  # noqa: ASYNC110
                        await asyncio.sleep(DRAIN_POLL_SECONDS)
            if self._predictor.busy:
                logger.warning("not everything has finished: it is cut off")
            # Whatever still runs fails now, and says so to its client. The step loop is joined: not on this thread.
            await asyncio.to_thread(self._predictor.stop)
        finally:
            self._close_port()

    def _close_port(self) -> None:
        self._rest_server._server.should_exit = True

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


def equip(
    app: FastAPI, predictor: Predictor, settings: Settings, keys: KeyFile | None, tracing: "Tracing | None"
) -> None:
    """Add our routes, error handlers and middlewares to KServe's app."""
    routes.add(app, predictor, with_admin_routes=settings.enable_admin_routes)
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    # The last one added is the outermost.
    app.add_middleware(middleware.MaxBodySizeMiddleware, max_bytes=settings.max_request_bytes)
    if keys is not None:
        app.add_middleware(middleware.ApiKeyMiddleware, keys=keys)
    app.add_middleware(
        middleware.DrainMiddleware, is_open=lambda: predictor.phase not in (Phase.DRAINING, Phase.STOPPED)
    )
    trace = tracing.export_http if tracing else None
    app.add_middleware(middleware.RequestLogMiddleware, count=predictor.count_request, trace=trace)


def _tracing(settings: Settings) -> "Tracing | None":
    """Imported where it is wanted only: OpenTelemetry is an extra, and would delay every start."""
    if not settings.tracing:
        return None
    try:
        from predictor.observability.tracing import Tracing
    except ImportError as error:
        raise InvalidSettings(
            f"--tracing needs OpenTelemetry, and {error.name} is not installed; pip install 'kserve-llm[tracing]'."
        ) from None
    return Tracing(settings.served_model_name)


def _check_port(port: int, flag: str) -> None:
    """Uvicorn would report a taken port with a traceback of ours around it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104
        except OSError as error:
            raise PortInUse(f"Port {port} cannot be opened ({error.strerror}); choose another with {flag}.") from None


async def _answer_request_error(request: Request, error: Exception) -> Response:
    # A body that is too large is refused in the middle of reading it: the middleware knows what to do with the rest.
    if not isinstance(error, RequestError) or isinstance(error, BodyTooLarge):
        raise error
    request_record.current().error = type(error).__name__
    return error_responses.respond(error, request.url.path)


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    """The SDK's own routes validate with FastAPI, whose answer would repeat the whole request."""
    if not isinstance(error, RequestValidationError):
        raise error
    fields = ", ".join(".".join(map(str, issue["loc"])) for issue in error.errors())
    return error_responses.respond(InvalidRequest(f"The request is malformed at {fields}."), request.url.path)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What FastAPI itself refuses: unknown routes and methods, as a rule."""
    if not isinstance(error, HTTPException):
        raise error
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return error_responses.respond(
            NotFound(
                f"{asked} is not served; ask /v2/models/NAME/infer, /v2/models/NAME/generate, "
                "/v1/chat/completions, /v1/completions or /v1/models/NAME:predict."
            ),
            request.url.path,
        )
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        response = error_responses.respond(MethodNotAllowed(f"{asked} is not served; use {allowed}."), request.url.path)
        response.headers.update(error.headers or {})
        return response
    detail = error.detail if isinstance(error.detail, str) else json.dumps(error.detail)
    response = error_responses.respond(InvalidRequest(f"{asked}: {detail}."), request.url.path)
    response.status_code = error.status_code
    return response


async def _answer_nobody(_: Request, error: Exception) -> Response:
    """The client has left in the middle of its request."""
    del error
    return Response(status_code=request_record.CLIENT_GONE)
