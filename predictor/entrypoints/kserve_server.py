"""Fence around the undocumented interfaces of KServe and uvicorn that the servers rely on.

`tests/contracts/test_upstream.py` pins them. `predictor/__main__.py` has one more: importing KServe parses `sys.argv`.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httptools
import kserve
import uvicorn
from kserve.errors import ModelNotFound
from kserve.errors import ModelNotReady as NotLoaded
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from predictor.errors import ModelNotReady, NotFound, PortInUse

ALL_ADDRESSES = "0.0.0.0"  # noqa: S104
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 620
"""Longer than proxies keep idle connections, so that none writes on a closing one: Knative's 90 s, Google's 600 s."""


class _RequestParser(httptools.HttpRequestParser):
    """uvicorn's parser, except that the `Upgrade` header of a request is ignored: httptools would skip its body."""

    def __init__(self, protocol: "HTTPProtocol") -> None:
        super().__init__(protocol)
        self._protocol = protocol
        # As in uvicorn.
        self.set_dangerous_leniencies(lenient_data_after_close=True)

    @property
    def has_upgrade(self) -> bool:
        """Whether the current request has an `Upgrade` header; CONNECT upgrades without one, and is refused."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        """Parse bytes of the connection."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self.has_upgrade:
                raise
            [offset] = upgrade.args
            self._protocol.restart_without_upgrade(data[offset:])


class HTTPProtocol(HttpToolsProtocol):
    """A connection that ignores `Upgrade` headers, as of h2c and WebSocket, and responds in HTTP/1.1.

    Java's HttpClient requests h2c by default, with the first request of a connection. Such a request keeps its body.
    uvicorn's other parser, h11, keeps it too, but takes 6 microseconds per chunk: many small ones would stall the loop.
    """

    parser: _RequestParser

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parser = _RequestParser(self)
        self._unparsed = b""

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the connection."""
        while data:
            self._unparsed = b""
            super().data_received(data)
            data = self._unparsed

    def restart_without_upgrade(self, rest: bytes) -> None:
        """Parse the current request again without its `Upgrade` headers, followed by `rest`."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._unparsed = b"\r\n".join([*lines, b"", rest])
        self.parser = _RequestParser(self)

    def on_headers_complete(self) -> None:
        """Start the request, unless it will be parsed again."""
        if not self.parser.has_upgrade:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End the request's body, unless it has not been parsed yet."""
        if not self.parser.has_upgrade:
            super().on_message_complete()


class HTTPServer(uvicorn.Server):
    """A uvicorn server on a bound socket that leaves signals to the process, with a longer keep-alive than KServe's.

    Args:
        app: serves the requests.
        connection_close_seconds: time for open connections to finish their responses, once `should_exit` is set.
    """

    def __init__(self, app: ASGIApp, connection_close_seconds: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HTTPProtocol,
                ws="none",
                log_config=None,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=connection_close_seconds,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers; uvicorn's own would close the port before running requests have finished."""
        yield

    def close_idle_connections(self) -> None:
        """Close connections without a running request at once, and the others after their response."""
        for connection in list(self.server_state.connections):
            connection.shutdown()


def bind(port: int, setting: str = "--http_port", *, host: str = ALL_ADDRESSES) -> socket.socket:
    """Open an HTTP port on an IPv4 address.

    Raises:
        PortInUse: the port cannot be opened.
    """
    try:
        server = socket.create_server((host, port), backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if host != ALL_ADDRESSES:
            setting = f"{setting}, or another address than {host} with --host"
        raise PortInUse(f"Port {port} cannot be opened: {reason}. Choose another with {setting}.") from None
    # Connections inherit it. asyncio sets it only on sockets that were made with the protocol's number.
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    return server


async def infer(
    model: kserve.Model, request: kserve.InferRequest, headers: Mapping[str, str] | None = None
) -> kserve.InferResponse:
    """Run KServe's preprocess, predict and postprocess hooks, and record its latency metrics."""
    response, _ = await model(request, headers=headers)
    return response


class ModelRepository:
    """KServe's model repository extension: load and unload models by name."""

    def __init__(self, model: kserve.Model) -> None:
        repository = kserve.ModelRepository()
        repository.update(model)
        self._extension = ModelRepositoryExtension(repository)

    async def load(self, model_name: str) -> None:
        """Return if the model is loaded.

        Raises:
            ModelNotReady: it is not.
        """
        try:
            await self._extension.load(model_name)
        except NotLoaded as error:
            raise ModelNotReady(str(error)) from error

    async def unload(self, model_name: str) -> None:
        """Stop the model and remove it from the repository.

        Raises:
            NotFound: there is no such model.
        """
        try:
            await self._extension.unload(model_name)
        except ModelNotFound as error:
            raise NotFound(str(error)) from error
