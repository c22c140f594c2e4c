"""Proxies between clients and predictors, for tests."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import httpx
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tests.predictor.servers import HANG_SECONDS, serve_app

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}
CHUNK_BYTES = 65_536


class Upstreams:
    """Servers that take turns: each gets a request, or a connection."""

    def __init__(self) -> None:
        self._urls: list[str] = []
        self._running: Counter[str] = Counter()
        self._changed = threading.Condition()

    def add(self, url: str) -> None:
        """Give turns to a server."""
        with self._changed:
            self._urls.append(url)

    def remove(self, url: str) -> None:
        """Give no more turns to a server, and wait until all that it got have ended."""
        with self._changed:
            self._urls.remove(url)
            ended = self._changed.wait_for(lambda: not self._running[url], HANG_SECONDS)
        assert ended, f"{self._running[url]} requests or connections of {url} have not ended"

    @contextmanager
    def turn(self) -> Iterator[str]:
        """The URL of the next server; its turn ends with the context."""
        with self._changed:
            url = self._urls.pop(0)
            self._urls.append(url)
            self._running[url] += 1
        try:
            yield url
        finally:
            with self._changed:
                self._running[url] -= 1
                self._changed.notify_all()


class PoolingProxy(Upstreams):
    """An HTTP proxy, like an ingress: it keeps its connections, and sends each request to the next server, once."""

    def __init__(self) -> None:
        super().__init__()
        self._client: httpx.AsyncClient

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread; yields the URL."""

        @asynccontextmanager
        async def pool() -> AsyncIterator[None]:
            async with httpx.AsyncClient(timeout=HANG_SECONDS, trust_env=False) as self._client:
                yield

        with serve_app(self, pool) as (url, _):
            yield url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one request, as ASGI has it."""
        if scope["type"] == "http":
            with self.turn() as url:
                response = await self._forward(Request(scope, receive), url)
                await response(scope, receive, send)

    async def _forward(self, request: Request, url: str) -> Response:
        headers = {"content-type": request.headers.get("content-type", "")}
        content = await request.body()
        sent = self._client.build_request(request.method, url + request.url.path, headers=headers, content=content)
        try:
            received = await self._client.send(sent, stream=True)
        except httpx.TransportError as error:
            return Response(f"{type(error).__name__}: {error}", 502)
        kept = {name: value for name, value in received.headers.items() if name not in HOP_BY_HOP}
        return StreamingResponse(
            received.aiter_raw(), received.status_code, kept, background=BackgroundTask(received.aclose)
        )


class ConnectionProxy(Upstreams):
    """A TCP proxy, like a Service: each connection of a client stays with one server until one of them closes it."""

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread; yields the URL."""
        with _serve_tcp(self._connect) as (url, _):
            yield url

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self.turn() as url:
            await _pipe(url, reader, writer)


class IdleTimeoutProxy:
    """A TCP proxy that closes connections without traffic, by a clock that the test advances."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._active: dict[asyncio.StreamWriter, bool] = {}
        """Whether data passed since the last tick, by the client's connection."""
        self._loop: asyncio.AbstractEventLoop

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread; yields the URL."""
        with _serve_tcp(self._connect) as (url, self._loop):
            yield url

    def tick(self) -> None:
        """Close the connections on which nothing has passed since the last tick."""

        async def expire() -> None:
            for writer, is_active in list(self._active.items()):
                if not is_active:
                    writer.close()
                self._active[writer] = False

        asyncio.run_coroutine_threadsafe(expire(), self._loop).result(HANG_SECONDS)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def mark_active() -> None:
            self._active[writer] = True

        mark_active()
        try:
            await _pipe(self._url, reader, writer, mark_active)
        finally:
            del self._active[writer]


@contextmanager
def _serve_tcp(
    connect: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """Call `connect` for each connection, on an event loop in a thread; yields the URL and the loop."""
    started: list[tuple[str, asyncio.AbstractEventLoop]] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            started.append((f"http://{host}:{port}", asyncio.get_running_loop()))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(HANG_SECONDS)
    try:
        yield started[0]
    finally:
        started[0][1].call_soon_threadsafe(stop.set)
        thread.join(HANG_SECONDS)


async def _pipe(
    url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_data: Callable[[], None] = lambda: None
) -> None:
    """Connect a client with the server at `url`, until one of them closes its connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    upstream_reader, upstream_writer = await asyncio.open_connection(host, int(port))

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(CHUNK_BYTES):
                on_data()
                target.write(data)
                await target.drain()

    tasks = {asyncio.create_task(copy(reader, upstream_writer)), asyncio.create_task(copy(upstream_reader, writer))}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        writer.close()
        upstream_writer.close()
    await asyncio.wait(tasks)
