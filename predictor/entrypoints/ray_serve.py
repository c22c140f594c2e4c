"""Ray Serve: `serve run predictor.entrypoints.ray_serve:app model_dir=DIR num_cpus=8`.

A replica is a predictor in an actor, behind Serve's HTTP proxy. It has the same HTTP application as the server process,
which is built in the actor, so that nothing of it is pickled. Serve starts, probes, drains and replaces replicas, with
options that `deployment_options` derives from our settings.

The builder runs in processes without a model, so only the constructor of a replica imports torch and KServe.
"""

import asyncio
import logging
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application

from predictor import settings
from predictor.entrypoints.ray_settings import RaySettings, check
from predictor.errors import PortInUse
from predictor.resources import openmp
from predictor.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

TARGET_LOAD = 0.8
"""Requests per replica at which Serve adds none and removes none, as a fraction of `max_num_seqs`."""
SPARE_REQUESTS = 100
"""Requests that reach a replica beyond those that it takes: it answers 429, where the proxy would keep them waiting."""
PROXY_DELAY_SECONDS = 2.0
"""Time in which Serve's proxies learn that a replica is leaving; Serve's own default."""
METRICS_RETRY_SECONDS = 5.0


def app(arguments: dict[str, Any]) -> Application:
    """Return the application; an application builder of Ray Serve.

    Args:
        arguments: settings by name, as values or as text.

    Raises:
        InvalidSettings: naming the setting, and the fix.
    """
    parsed = settings.from_arguments(arguments, RaySettings)
    check(parsed)
    deployment = serve.deployment(serve.ingress()(Replica), name="predictor", **deployment_options(parsed))
    return deployment.bind(parsed)


def replica_settings(parsed: RaySettings) -> Settings:
    """Return the predictor's settings in a replica: its CPUs are the threads of its processes."""
    ranks = max(1, int(parsed.num_gpus)) if parsed.tensor_parallel_size == "auto" else parsed.tensor_parallel_size
    # Ray's own limit, OMP_NUM_THREADS, is that of one process.
    threads = parsed.num_threads or max(1, int(parsed.num_cpus / ranks))
    return Settings(**parsed.model_dump(include=set(Settings.model_fields)) | {"num_threads": threads})


def deployment_options(parsed: RaySettings) -> dict[str, Any]:
    """Return the options of `serve.deployment` that follow from the settings."""
    delay = parsed.shutdown_delay_seconds or PROXY_DELAY_SECONDS
    options: dict[str, Any] = {
        # Admission, timeouts and 429 are the replica's, in the form of each protocol.
        "max_ongoing_requests": parsed.max_num_seqs + parsed.max_queued_requests + SPARE_REQUESTS,
        "max_queued_requests": -1,
        "graceful_shutdown_wait_loop_s": delay,
        "graceful_shutdown_timeout_s": delay + parsed.shutdown_grace_seconds,
        "ray_actor_options": {"num_cpus": parsed.num_cpus, "num_gpus": parsed.num_gpus},
        # The lines of `RequestLogMiddleware` have more information.
        "logging_config": {"enable_access_log": False},
    }
    if parsed.metrics_port:
        options["max_replicas_per_node"] = 1
    if parsed.max_replicas is None:
        return options | {"num_replicas": parsed.num_replicas or 1}
    return options | {
        "autoscaling_config": {
            "min_replicas": parsed.min_replicas,
            "max_replicas": parsed.max_replicas,
            "target_ongoing_requests": TARGET_LOAD * parsed.max_num_seqs,
            "upscale_delay_s": parsed.upscale_delay_s,
            "downscale_delay_s": parsed.downscale_delay_s,
        }
    }


class Replica:
    """One predictor: the constructor returns once the model is loaded, and Serve then routes requests to it.

    Args:
        parsed: from `app`.

    Raises:
        StartupError: the model cannot be loaded; Serve shows it in the status of the deployment.
    """

    async def __init__(self, parsed: RaySettings) -> None:  # type: ignore[misc] # Serve awaits it
        # KServe parses sys.argv when it is imported and would take Ray's flags for abbreviations of its own.
        del sys.argv[1:]
        openmp.limit_spinning()
        from predictor.entrypoints import ranks
        from predictor.entrypoints.api_keys import KeyFile
        from predictor.entrypoints.lifecycle import Lifecycle, create_tracing
        from predictor.generation.service import LLMService
        from predictor.observability.logging import configure

        self._settings = replica_settings(parsed)
        configure(parsed.log_level, parsed.log_format)
        self._api_keys = KeyFile(parsed.api_keys_file) if parsed.api_keys_file else None
        with ExitStack() as stack:
            self._tracing = create_tracing(self._settings)
            if self._tracing:
                stack.callback(self._tracing.close)
            group = stack.enter_context(ranks.started(self._settings))
            self._service = LLMService(self._settings, group.rank if group else None)
            self._lifecycle = Lifecycle(self._service, self._settings.shutdown_grace_seconds, ranks=group)
            self._running = asyncio.create_task(self._lifecycle.run())
            await self._wait_for_load()
            self._stack = stack.pop_all()
        self._running.add_done_callback(_exit_on_failure)
        self._metrics = asyncio.create_task(self._serve_metrics(parsed.metrics_port)) if parsed.metrics_port else None

    async def _wait_for_load(self) -> None:
        serving = asyncio.create_task(self._lifecycle.serving.wait())
        await asyncio.wait({self._running, serving}, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            serving.cancel()
            await self._running

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """Return the application; Serve calls this after the constructor."""
        from predictor.entrypoints.http.app import create_app

        app = create_app(self._service, self._settings, api_keys=self._api_keys, tracing=self._tracing)
        app.add_middleware(ProxyMiddleware)
        return app

    async def check_health(self) -> None:
        """Raise if the model does not generate; Serve then replaces the replica."""
        if not self._service.is_ready:
            raise RuntimeError(f"The replica is to be replaced: {self._service.not_ready_reason}.")

    async def __del__(self) -> None:
        """Stop; Serve calls this once no request runs."""
        self._lifecycle.terminate()
        await self._running
        if self._metrics:
            self._metrics.cancel()
            await asyncio.gather(self._metrics, return_exceptions=True)
        self._stack.close()

    async def _serve_metrics(self, port: int) -> None:
        """Serve metrics and probes until cancelled: behind the proxy, a scrape would reach any one replica."""
        from fastapi import FastAPI

        from predictor.entrypoints import kserve_server
        from predictor.entrypoints.http.routes import health

        metrics = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        metrics.include_router(health.create_router(self._service))
        while True:
            try:
                socket = kserve_server.bind(port, "metrics_port")
                break
            except PortInUse as error:
                # A replica that Serve replaces keeps the port until its last request has ended.
                logger.warning("no metrics yet: %s", error)
                await asyncio.sleep(METRICS_RETRY_SECONDS)
        with socket:
            await kserve_server.HTTPServer(metrics, 1).serve(sockets=[socket])


def _exit_on_failure(running: "asyncio.Task[None]") -> None:
    """End the process if a rank has failed: Serve's proxies then know at once that the replica is gone."""
    if not running.cancelled() and (error := running.exception()):
        logger.error("%s", error)
        logging.shutdown()
        os._exit(1)


class ProxyMiddleware:
    """Hides Serve's proxy from the application around which it is the outermost middleware.

    - A route prefix is removed from the path, as if the application had a host of its own. Browsers that request the
      prefix without a slash are redirected: the page would otherwise send its requests to the application at `/`.
    - The proxy adds `x-request-id` to responses, so ours, which is the same, is dropped.
    - The proxy cancels a request whose client is gone, and reading from a proxy that has cancelled it, or is gone, may
      fail. The application is neither cancelled nor does it see an error: it receives `http.disconnect`.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Handle one connection, as specified by ASGI."""
        from starlette.requests import Request
        from starlette.responses import RedirectResponse

        from predictor.entrypoints.http.routes import playground

        if scope["type"] == "http":
            root = scope.get("root_path", "")
            path = scope["path"].removeprefix(root) or "/"
            if root and scope["path"] == root and playground.is_requested(Request(scope)):
                # Relative, since the proxy may be behind another one. The page's own links are relative to the prefix.
                redirect = RedirectResponse(f"{root.rpartition('/')[2]}/", headers={"Vary": "Accept"})
                await redirect(scope, receive, send)
                return
            scope = {**scope, "path": path, "root_path": ""}

        async def receive_or_disconnect() -> "Message":
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        async def send_without_id(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message["headers"] if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        request = asyncio.ensure_future(self._app(scope, receive_or_disconnect, send_without_id))
        try:
            await asyncio.shield(request)
        except asyncio.CancelledError:
            await asyncio.gather(request, return_exceptions=True)
            raise
