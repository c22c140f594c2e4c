"""Predictors for tests: in this process, behind a real uvicorn server in a thread, or in a process of their own."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT
from predictor import settings
from predictor.entrypoints import grpc_server, kserve_server, lifecycle, ranks
from predictor.entrypoints.api_keys import KeyFile
from predictor.entrypoints.http.app import create_app
from predictor.entrypoints.lifecycle import Lifecycle, State
from predictor.errors import StartupError
from predictor.generation.service import LLMService
from predictor.kernels import tensor_parallel
from predictor.kernels.tensor_parallel import Rank
from predictor.models import loader
from predictor.observability import request_record

HANG_SECONDS = 120
"""Guard against a test that hangs; no test depends on it."""
DEMO_FLAGS = ("--model_dir", str(DEMO_MODEL), "--dtype", "float32")


class Hold:
    """A hook before every forward pass of a model: passes it, slows it down, blocks it or makes it fail."""

    def __init__(self) -> None:
        self._error: Exception | None = None
        self.delay_seconds = 0.0
        self.blocked = threading.Event()
        self._open = threading.Event()
        self._open.set()
        self._passes: int | None = None

    def __call__(self, *_: Any) -> None:
        """Run in the thread of the step loop, before the forward pass."""
        if self._passes is not None:
            if self._passes == 0:
                self._open.clear()
            self._passes = max(0, self._passes - 1)
        time.sleep(self.delay_seconds)
        if not self._open.is_set():
            self.blocked.set()
            self._open.wait(HANG_SECONDS)
        if self.error:
            raise self.error

    @property
    def error(self) -> Exception | None:
        """Raised instead of forward passes."""
        return self._error

    @error.setter
    def error(self, error: Exception | None) -> None:
        if error and tensor_parallel.size() > 1:
            pytest.skip("an error of one rank ends the server")
        self._error = error

    def close(self, after: int = 0) -> None:
        """Block the forward passes after the next `after` ones."""
        self.blocked.clear()
        self._passes = after

    def step(self, passes: int) -> None:
        """Let the blocked forward pass and the next `passes - 1` ones through, and block again."""
        self.blocked.clear()
        self._passes = passes - 1
        self._open.set()

    def open(self) -> None:
        """Let all forward passes through at full speed."""
        self.error, self.delay_seconds, self._passes = None, 0.0, None
        self._open.set()


@dataclass(frozen=True)
class Server:
    """A predictor that serves `model_name` at `url`, a client for it, and its log."""

    url: str
    model_name: str
    client: httpx.Client
    read_log: Callable[[], str]

    @property
    def log(self) -> str:
        """All lines so far."""
        return self.read_log()

    def metric(self, name: str, **labels: str) -> float:
        """The value of one of our metrics, 0 without a sample."""
        labels["model_name"] = self.model_name
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == f"kserve_llm_{name}" and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Poll until `condition()` is true."""
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "the condition never became true"
            time.sleep(0.02)

    def wait_for_metrics(self, **values: float) -> None:
        """Poll until the metrics have these values."""
        self.wait_for(lambda: all(self.metric(name) == value for name, value in values.items()))

    def wait_for_metric(self, name: str, value: float, **labels: str) -> None:
        """Poll until the metric with these labels has this value."""
        self.wait_for(lambda: self.metric(name, **labels) == value)

    def disconnect_during(self, path: str, body: dict[str, Any], **values: float) -> None:
        """Send a request, and disconnect once the metrics have these values."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=HANG_SECONDS)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        self.wait_for_metrics(**values)
        connection.close()

    def wait_until_idle(self) -> None:
        """Poll until no sequence runs or waits and the cache is empty."""
        self.wait_for_metrics(num_requests_running=0, num_requests_waiting=0, kv_cache_usage_perc=0)

    def wait_for_status(self, status: int, path: str, **options: Any) -> httpx.Response:
        """The first response with this status."""
        deadline = time.monotonic() + HANG_SECONDS
        while time.monotonic() < deadline:
            try:
                response = self.client.request("POST" if "json" in options else "GET", path, **options)
            except httpx.TransportError:
                continue
            if response.status_code == status:
                return response
            time.sleep(0.02)
        raise AssertionError(f"{path} never returned {status}")


@dataclass(frozen=True)
class ServerProcess(Server):
    """A predictor in a process of its own."""

    process: "subprocess.Popen[str]"


@dataclass(frozen=True)
class InProcessServer(Server):
    """A predictor in this process."""

    service: LLMService
    hold: Hold
    grpc: grpc_server.GRPCServer | None = None

    @property
    def grpc_port(self) -> int:
        """Port of the gRPC server; only with `--enable_grpc`."""
        assert self.grpc
        return self.grpc.port


class _Lines(logging.Handler):
    """The log as JSON lines: message, request id, and fields of request lines."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", {})
        line = {"message": record.getMessage(), "request_id": request_record.current().request_id, **fields}
        self.lines.append(json.dumps(line))

    def read(self) -> str:
        return "\n".join(self.lines)


@contextmanager
def _logged() -> Iterator[_Lines]:
    logger, lines = logging.getLogger("predictor"), _Lines()
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)
        # Servers may end in any order.
        if not any(isinstance(handler, _Lines) for handler in logger.handlers):
            logger.setLevel(logging.NOTSET)


def load_service(parsed: settings.Settings, hold: Hold | None = None, rank: Rank | None = None) -> LLMService:
    """A service whose model is loaded, with `hold` before its forward passes on this rank."""
    service = LLMService(parsed, rank)
    load = loader.load

    def load_with_hook(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        if hold:
            loaded.model.register_forward_pre_hook(hold)
        return loaded

    loader.load = load_with_hook
    try:
        service.load()
    finally:
        loader.load = load
    return service


@contextmanager
def in_process(
    *flags: str, model_name: str = "demo", keys: Path | None = None, headers: dict[str, str] | None = None
) -> Iterator[InProcessServer]:
    """Serve the demo model in this process.

    Args:
        flags: of the predictor, other than its name, model and port.
        model_name: distinct for each server of this process, whose metrics would be mixed up otherwise.
        keys: file of API keys.
        headers: of the client.
    """
    if tensor_parallel.size() > 1:
        pytest.skip("the ranks of this process share the model of another server")
    key_flags = ["--api_keys_file", str(keys)] if keys else []
    # Only the process's lifecycle runs self-checks; without them, an idle server would stop being ready.
    check_flags = ["--self_check_interval_seconds", "0"]
    parsed = settings.read([*DEMO_FLAGS, *check_flags, "--served_model_name", model_name, *flags, *key_flags])
    hold = Hold()
    with _logged() as lines, ranks.started(parsed) as group:
        service = load_service(parsed, hold, group.rank if group else None)
        api_keys = KeyFile(keys) if keys else None
        tracing = lifecycle.create_tracing(parsed)
        app = create_app(service, parsed, api_keys=api_keys, tracing=tracing)
        limit = parsed.max_request_bytes
        context = partial(
            grpc_server.serve, service, port=0, max_message_bytes=limit, api_keys=api_keys, tracing=tracing
        )
        try:
            with (
                serve_app(app, *([context] if parsed.enable_grpc else [])) as (url, grpc),
                httpx.Client(base_url=url, timeout=HANG_SECONDS, trust_env=False, headers=headers) as client,
            ):
                yield InProcessServer(url, model_name, client, lines.read, service, hold, grpc)
        finally:
            hold.open()
            service.stop()
            if tracing:
                tracing.close()


@contextmanager
def serve_app(app: ASGIApp, *contexts: Callable[[], Any], **config: Any) -> Iterator[tuple[str, Any]]:
    """Serve an ASGI application on loopback, in a thread.

    Args:
        app: the application.
        contexts: asynchronous context managers to enter around it.
        config: options of `uvicorn.Config`.

    Yields:
        The URL, and the value of the last context.
    """
    server: uvicorn.Server = kserve_server.HTTPServer(app, 1)
    if config:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, **config))
    started: list[Any] = []
    ready = threading.Event()

    async def run() -> None:
        async with AsyncExitStack() as stack:
            values = [await stack.enter_async_context(context()) for context in contexts]
            started.append(values[-1] if values else None)
            ready.set()
            await server.serve(sockets=[listening])

    with kserve_server.bind(0) as listening:
        thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
        thread.start()
        try:
            assert ready.wait(HANG_SECONDS)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", started[0]
        finally:
            server.should_exit = True
            thread.join(HANG_SECONDS)


class ThreadServer:
    """A predictor with its whole lifecycle, in a thread of this process.

    Args:
        flags: of the predictor, other than its port.
    """

    def __init__(self, *flags: str) -> None:
        port = processes.free_port()
        parsed = settings.read([*flags, "--http_port", str(port)])
        self.url = f"http://127.0.0.1:{port}"
        self.error: StartupError | None = None
        """Of a load that has failed."""
        self.service = LLMService(parsed)
        self.lifecycle = Lifecycle(self.service, parsed.shutdown_grace_seconds, parsed.shutdown_delay_seconds)
        self._parsed = parsed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await lifecycle.serve(self.service, self.lifecycle, self._parsed)
        except StartupError as error:
            self.error = error

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve within the context, in any state; a server that has not ended is aborted."""
        self._thread.start()
        try:
            yield
        finally:
            for _ in range(3):
                self.signal()
            self.join()

    def wait_until(self, state: State) -> None:
        """Wait until the lifecycle has this state."""
        while self.lifecycle.state is not state:
            assert self._thread.is_alive()
            self._thread.join(0.02)

    def signal(self) -> None:
        """Deliver SIGTERM, unless the server has ended."""
        with suppress(RuntimeError):
            assert self._loop
            self._loop.call_soon_threadsafe(self.lifecycle.handle_signal, signal.SIGTERM)

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive()


@dataclass(frozen=True)
class Orders:
    """What the model of a `held_predictor` process does before every forward pass: a file that the process reads."""

    path: Path = field(repr=False)

    def give(self, order: Literal["slow", "block", "fail"]) -> None:
        """Slow down, block or fail all forward passes from now on, until the next order."""
        new = self.path.with_suffix(".new")
        new.write_text(order)
        new.replace(self.path)

    def withdraw(self) -> None:
        """Let forward passes through at full speed."""
        self.path.unlink(missing_ok=True)


@contextmanager
def own_process(folder: Path, *flags: str) -> Iterator[tuple[ServerProcess, Orders]]:
    """Serve the demo model in a process of its own, whose model takes orders; the server is ready."""
    orders, log = Orders(folder / "order"), folder / "log"
    port = processes.free_port()
    program = str(ROOT / "tests" / "programs" / "held_predictor.py")
    arguments = [*DEMO_FLAGS, "--served_model_name", "demo", "--http_port", str(port), *flags, str(orders.path)]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as stderr, httpx.Client(base_url=url, timeout=HANG_SECONDS, trust_env=False) as client:
        process = subprocess.Popen([sys.executable, program, *arguments], cwd=ROOT, stderr=stderr, text=True)
        try:
            server = ServerProcess(url, "demo", client, log.read_text, process)
            server.wait_for_status(200, "/v2/health/ready")
            yield server, orders
        finally:
            orders.withdraw()
            processes.stop(process)
            print(log.read_text())  # noqa: T201, shown by pytest where a test failed


OPENAI, GENERATE, GENERATE_STREAM, INFER = "/v1/completions", "generate", "generate_stream", "infer"
PROTOCOLS = (OPENAI, INFER, GENERATE)


@dataclass(frozen=True)
class Call:
    """A greedy completion of exactly `tokens` tokens, by one of the protocols."""

    server: Server
    protocol: str
    tokens: int
    prompt: str = "1+1="
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Path of the route."""
        return OPENAI if self.protocol == OPENAI else f"/v2/models/{self.server.model_name}/{self.protocol}"

    @property
    def body(self) -> dict[str, Any]:
        """Body of the request."""
        sampling = {"max_tokens": self.tokens, "temperature": 0.0, "ignore_eos": True}
        if self.protocol == OPENAI:
            return {"model": self.server.model_name, "prompt": self.prompt, **sampling, **self.more}
        if self.protocol == INFER:
            tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [self.prompt]}
            return {"inputs": [tensor], "parameters": sampling}
        return {
            "text_input": self.prompt,
            "parameters": {**sampling, "details": self.protocol == GENERATE_STREAM},
        }

    def streamed(self) -> "Call":
        """The same call as a stream."""
        return replace(self, more={**self.more, "stream": True}) if self.protocol == OPENAI else self

    def post(self, **options: Any) -> httpx.Response:
        """Send it and return the response."""
        return self.server.client.post(self.path, json=self.body, **options)


@dataclass
class StreamReader:
    """Text, finish reason and last event of a stream."""

    text: str = ""
    finish_reason: str | None = None
    last: Any = None
    started: threading.Event = field(default_factory=threading.Event)

    def read(self, call: Call, **options: Any) -> "StreamReader":
        """Send a call and read its events to the end."""
        call = call.streamed()
        with call.server.client.stream("POST", call.path, json=call.body, **options) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self._add(line.removeprefix("data: "))
        return self

    def _add(self, event: str) -> None:
        self.last = event if event == "[DONE]" else json.loads(event)
        if isinstance(self.last, dict) and "error" not in self.last:
            for part in self.last.get("choices", [self.last]):
                self.text += part.get("text", part.get("text_output", ""))
                self.finish_reason = part.get("details", part).get("finish_reason") or self.finish_reason
        self.started.set()


def probe_paths(model_name: str) -> list[str]:
    """Return the paths that need no API key."""
    return [
        "/",
        "/health",
        "/ping",
        "/version",
        "/metrics",
        "/v2/health/live",
        "/v2/health/ready",
        f"/v2/models/{model_name}/ready",
    ]
