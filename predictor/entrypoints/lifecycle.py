"""The server process: opens the port before loading the model, drains on a signal, exits when drained.

States: loading -> serving -> terminating -> draining -> stopped. On SIGTERM or SIGINT the server terminates: it is not
ready, but serves every request and then closes its connection, until the shutdown delay is over. Then it drains: it
rejects new requests and finishes running ones within the grace period. A further signal ends the delay, and one while
draining aborts running requests. A failed load exits non-zero.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from predictor.entrypoints import grpc_server, kserve_server, ranks
from predictor.entrypoints.api_keys import KeyFile
from predictor.entrypoints.http.app import create_app
from predictor.entrypoints.ranks import Ranks
from predictor.errors import InvalidSettings, RankLost, StartupError
from predictor.generation.service import LLMService
from predictor.settings import Settings

if TYPE_CHECKING:
    from predictor.observability.tracing import Tracing

logger = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 0.1
CONNECTION_CLOSE_SECONDS = 5
"""Time for open connections to send the rest of their responses, once generation has stopped."""


class State(StrEnum):
    """State of the process."""

    LOADING = "loading"
    SERVING = "serving"
    TERMINATING = "terminating"
    DRAINING = "draining"
    STOPPED = "stopped"


class _Service(Protocol):
    """The part of `LLMService` that the lifecycle controls."""

    @property
    def busy(self) -> bool: ...
    @property
    def is_live(self) -> bool: ...
    @property
    def has_ended(self) -> bool: ...
    def load(self) -> bool: ...
    def terminate(self) -> None: ...
    def drain(self) -> None: ...
    def stop(self) -> None: ...
    async def run_self_checks(self) -> None: ...


class Lifecycle:
    """Run a service through its states; one event loop, one call of `run`.

    Args:
        service: not loaded yet.
        grace_seconds: time for running requests, once new ones are rejected.
        delay_seconds: time in which new requests are served after the first signal; a server that loads has none.
        ranks: of a tensor-parallel model, which end together.
    """

    def __init__(
        self, service: _Service, grace_seconds: float, delay_seconds: float = 0, ranks: Ranks | None = None
    ) -> None:
        self.state = State.LOADING
        self.on_drain: list[Callable[[], object]] = []
        """Called when new requests are rejected: servers close their idle connections."""
        self.serving = asyncio.Event()
        """Set when the model is loaded."""
        self._service = service
        self._ranks = ranks
        self._grace_seconds = grace_seconds
        self._delay_seconds = delay_seconds
        self._load_thread: threading.Thread | None = None
        self._terminate = asyncio.Event()
        self._end_delay = asyncio.Event()
        self._abort = asyncio.Event()
        self._stopping = False

    @property
    def has_blocking_threads(self) -> bool:
        """Whether a thread that nothing can interrupt still runs: the load, or a step that hangs."""
        loads = self._load_thread is not None and self._load_thread.is_alive()
        return loads or not self._service.has_ended

    def handle_signal(self, number: int) -> None:
        """Start the shutdown; a further signal ends the delay, or aborts running requests."""
        name = signal.Signals(number).name
        if not self._terminate.is_set():
            logger.info("received %s, shutting down", name)
            self.terminate()
        elif self.state is State.TERMINATING and not self._end_delay.is_set():
            logger.info("received %s again, ending the shutdown delay", name)
            self._end_delay.set()
        else:
            logger.warning("received %s again, aborting running requests", name)
            self._end_delay.set()
            self._abort.set()

    def terminate(self) -> None:
        """Start the shutdown."""
        self._terminate.set()

    async def run(self) -> None:
        """Load the model, serve until a signal, serve on during the delay, drain and stop.

        Raises:
            StartupError: the load failed.
            RankFailed: a rank ended or hangs.
        """
        if self._ranks is None:
            await self._run()
            return
        running = asyncio.create_task(self._run())
        failing = asyncio.create_task(self._ranks.failure(lambda: self._service.is_live or self._stopping))
        await asyncio.wait({running, failing}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            failing.cancel()
            if isinstance(running.exception(), RankLost):
                raise await self._ranks.reason(str(running.exception()))
            running.result()
            return
        logger.error("%s", failing.result())
        running.cancel()
        await self._end_streams()
        raise failing.result()

    async def _end_streams(self) -> None:
        """Wait until the readers of all running requests have their error: no rank makes a step any more."""
        self._service.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECTION_CLOSE_SECONDS):
                while self._service.busy:  # noqa: ASYNC110, there is no event for it
                    await asyncio.sleep(DRAIN_POLL_SECONDS)

    async def _run(self) -> None:
        loaded = self._start_load()
        terminated = asyncio.ensure_future(self._terminate.wait())
        pending: set[asyncio.Future[Any]] = {loaded, terminated}
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        self_checks: asyncio.Task[None] | None = None
        if not self._terminate.is_set():
            if error := loaded.result():
                terminated.cancel()
                await self._stop()
                raise error
            self.state = State.SERVING
            self.serving.set()
            self_checks = asyncio.create_task(self._service.run_self_checks())
            await terminated
            await self._delay()
        await self._drain()
        if self_checks:
            self_checks.cancel()
        await self._stop()

    async def _delay(self) -> None:
        """Serve on until proxies have removed this server; without a delay, not at all."""
        if not self._delay_seconds:
            return
        self.state = State.TERMINATING
        self._service.terminate()
        logger.info("terminating: not ready, serving new requests for %g s", self._delay_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._delay_seconds):
                await self._end_delay.wait()

    async def _drain(self) -> None:
        self.state = State.DRAINING
        logger.info("draining: finishing running requests, rejecting new ones")
        self._service.drain()
        for callback in self.on_drain:
            callback()
        try:
            async with asyncio.timeout(self._grace_seconds):
                # A step loop that is dead or hangs finishes nothing.
                while self._service.busy and self._service.is_live and not self._abort.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(DRAIN_POLL_SECONDS)
        except TimeoutError:
            logger.warning("shutdown grace period expired, aborting running requests")

    async def _stop(self) -> None:
        """Abort what still runs; each client gets an error. Joins the step loop, so not on the event loop's thread."""
        self._stopping = True
        await asyncio.to_thread(self._service.stop)
        self.state = State.STOPPED

    def _start_load(self) -> "asyncio.Future[StartupError | None]":
        """Load in a daemon thread: a signal during the load must not wait for its end. The result is its error."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[StartupError | None] = loop.create_future()

        def load() -> None:
            outcome: StartupError | None = None
            try:
                self._service.load()
            except StartupError as error:
                outcome = error
            except Exception as error:
                logger.exception("loading the model failed")
                outcome = StartupError(f"Loading the model failed: {error}")
            # The loop is closed if a signal ended the process during the load.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(loaded.set_result, outcome)

        self._load_thread = threading.Thread(target=load, name="load", daemon=True)
        self._load_thread.start()
        return loaded


def run(settings: Settings) -> bool:
    """Serve until SIGTERM or SIGINT.

    Returns:
        Whether threads still run that would abort Python's own exit.

    Raises:
        StartupError: a setting is invalid, a port is taken, or the model cannot be loaded.
    """
    api_keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
    tracing = create_tracing(settings)
    try:
        return asyncio.run(_serve(settings, api_keys, tracing))
    finally:
        if tracing:
            tracing.close()


async def _serve(settings: Settings, api_keys: KeyFile | None, tracing: "Tracing | None") -> bool:
    with ranks.started(settings) as group:
        service = LLMService(settings, group.rank if group else None)
        lifecycle = Lifecycle(service, settings.shutdown_grace_seconds, settings.shutdown_delay_seconds, group)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, lifecycle.handle_signal, number)
        await serve(service, lifecycle, settings, api_keys=api_keys, tracing=tracing)
    return lifecycle.has_blocking_threads


async def serve(
    service: LLMService,
    lifecycle: Lifecycle,
    settings: Settings,
    *,
    api_keys: KeyFile | None = None,
    tracing: "Tracing | None" = None,
) -> None:
    """Run the servers of `service` around its lifecycle.

    Raises:
        StartupError: a port is taken, or the model cannot be loaded.
    """
    app = create_app(service, settings, api_keys=api_keys, tracing=tracing)
    http_server = kserve_server.HTTPServer(app, CONNECTION_CLOSE_SECONDS)
    lifecycle.on_drain.append(http_server.close_idle_connections)
    async with contextlib.AsyncExitStack() as stack:
        host = str(settings.host or kserve_server.ALL_ADDRESSES)
        http_socket = stack.enter_context(kserve_server.bind(settings.http_port, host=host))
        if settings.enable_grpc:
            context = grpc_server.serve(
                service,
                host=host,
                port=settings.grpc_port,
                max_message_bytes=settings.max_request_bytes,
                api_keys=api_keys,
                tracing=tracing,
            )
            grpc = await stack.enter_async_context(context)
            lifecycle.on_drain.append(partial(grpc.drain, settings.shutdown_grace_seconds))
        serving = asyncio.create_task(http_server.serve(sockets=[http_socket]))
        logger.info("listening on HTTP port %d", settings.http_port)
        try:
            await lifecycle.run()
        finally:
            http_server.should_exit = True
            await serving


def create_tracing(settings: Settings) -> "Tracing | None":
    """Import OpenTelemetry only if enabled: it is an extra, and slows the start."""
    if not settings.tracing:
        return None
    try:
        from predictor.observability.tracing import Tracing
    except ImportError as error:
        raise InvalidSettings(
            f"--tracing needs OpenTelemetry; {error.name} is not installed. Run pip install 'kserve-llm[tracing]'."
        ) from None
    return Tracing(settings.served_model_name)
