"""Proxies between clients and predictors, for tests."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import httpx
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tests.predictor.servers import HANG_SECONDS, serve_app

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


class PoolingProxy:
    """A reverse proxy that keeps its connections to the upstreams, takes them in turn and never repeats a request."""

    def __init__(self) -> None:
        self._upstreams: list[str] = []
        self._remaining: dict[str, int] = {}
        """Requests until a removed upstream gets no more."""
        self._running: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._client: httpx.AsyncClient

    @asynccontextmanager
    async def pool(self) -> AsyncIterator[None]:
        """Open the pool of connections; on the proxy's event loop."""
        async with httpx.AsyncClient(timeout=HANG_SECONDS, trust_env=False) as self._client:
            yield

    def add(self, url: str) -> None:
        """Send requests to an upstream."""
        with self._changed:
            self._upstreams.append(url)

    def remove(self, url: str, after: int) -> None:
        """Remove an upstream once `after` more requests were sent to it."""
        with self._changed:
            self._remaining[url] = after

    def wait_until_removed(self, url: str) -> None:
        """Wait until an upstream gets no more requests, and has answered all."""
        with self._changed:
            gone = self._changed.wait_for(
                lambda: url not in self._upstreams and not self._running[url], timeout=HANG_SECONDS
            )
        assert gone, f"{url} was never removed"

    def _begin(self) -> str:
        """Return the upstream of the next request."""
        with self._changed:
            url = self._upstreams.pop(0)
            self._running[url] += 1
            if url in self._remaining:
                self._remaining[url] -= 1
            if self._remaining.get(url) != 0:
                self._upstreams.append(url)
            return url

    def _end(self, url: str) -> None:
        with self._changed:
            self._running[url] -= 1
            self._changed.notify_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one request, as ASGI has it."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        url = self._begin()
        try:
            response = await self._forward(request, url)
            await response(scope, receive, send)
        finally:
            self._end(url)

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


class IdleTimeoutProxy:
    """A TCP proxy that closes connections without traffic, by a clock that the test advances."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._active: dict[asyncio.StreamWriter, bool] = {}
        """Whether data passed since the last tick, by the client's connection."""
        self._loop: asyncio.AbstractEventLoop
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve in a thread."""
        ready, stop = threading.Event(), asyncio.Event()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            async with await asyncio.start_server(self._connect, "127.0.0.1", 0) as server:
                self.url = "http://{}:{}".format(*server.sockets[0].getsockname())
                ready.set()
                await stop.wait()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        thread.start()
        assert ready.wait(HANG_SECONDS)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(stop.set)
            thread.join(HANG_SECONDS)

    def tick(self) -> None:
        """Close the connections on which nothing has passed since the last tick."""

        async def expire() -> None:
            for writer, is_active in list(self._active.items()):
                if not is_active:
                    writer.close()
                self._active[writer] = False

        asyncio.run_coroutine_threadsafe(expire(), self._loop).result(HANG_SECONDS)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(self._host, self._port)
        self._active[writer] = True

        async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await source.read(65_536):
                    self._active[writer] = True
                    target.write(data)
                    await target.drain()

        tasks = {asyncio.create_task(pipe(reader, upstream_writer)), asyncio.create_task(pipe(upstream_reader, writer))}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._active[writer]
            for closed in (writer, upstream_writer):
                closed.close()
        await asyncio.wait(tasks)


@contextmanager
def pooling_proxy() -> Iterator[tuple[PoolingProxy, str]]:
    """Run a proxy without upstreams; yields it and its URL."""
    proxy = PoolingProxy()
    with serve_app(proxy, proxy.pool, lifespan="off") as (url, _):
        yield proxy, url
