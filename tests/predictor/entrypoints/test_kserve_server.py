"""`HTTPServer`: requests that have an `Upgrade` header, as bytes on a socket, and the end of connections."""

import asyncio
import http.client
import json
import logging
import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from predictor.entrypoints import kserve_server
from predictor.entrypoints.kserve_server import HTTPServer
from tests.predictor import servers
from tests.predictor.servers import HANG_SECONDS

H2C = "Connection: Upgrade, HTTP2-Settings\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\nUpgrade: h2c\n"
"""What Java's HttpClient adds to the first request of a connection."""
HEAD = f"POST /a%20b?c=d HTTP/1.1\nHost: server\nX-Mine: 1\n{H2C}"
BODY = "1234567890"
LENGTH = f"Content-Length: {len(BODY)}\n\n{BODY}"
CHUNKED = f"Transfer-Encoding: chunked\n\n3\n{BODY[:3]}\n7\n{BODY[3:]}\n0\n\n"
ECHOED = {"method": "POST", "path": "/a b", "query": "c=d", "mine": "1", "body": BODY}


def test_connections_send_every_part_of_a_response_at_once() -> None:
    """Nagle's algorithm would hold a body back until the client has acknowledged the headers, after up to 40 ms."""
    with (
        kserve_server.bind(0) as listening,
        socket.create_connection(("127.0.0.1", listening.getsockname()[1])),
        listening.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def echo(request: Request) -> JSONResponse:
    content = {"method": request.method, "path": request.url.path, "query": request.url.query}
    return JSONResponse(content | {"mine": request.headers["x-mine"], "body": (await request.body()).decode()})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with servers.serve_app(Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])) as (url, _):
        yield url


@pytest.fixture
def connection(url: str) -> Iterator[socket.socket]:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=HANG_SECONDS) as opened:
        # Each piece is a segment of its own.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield opened


def send(connection: socket.socket, *pieces: str) -> None:
    for piece in pieces:
        connection.sendall(piece.replace("\n", "\r\n").encode())


def receive(connection: socket.socket) -> tuple[http.client.HTTPResponse, bytes]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response, response.read()


@pytest.mark.parametrize(
    "pieces",
    [
        (HEAD + LENGTH,),
        (HEAD + CHUNKED,),
        (HEAD, *LENGTH),
        (*HEAD, *CHUNKED),
        (HEAD.replace("POST", "GET") + LENGTH,),
        (HEAD.replace("h2c", "websocket") + CHUNKED,),
        (HEAD.replace("h2c", "h2c\nUPGRADE: TLS/1.0") + LENGTH,),
    ],
    ids=["length", "chunked", "length_in_pieces", "chunked_in_pieces", "get", "websocket", "two_upgrades"],
)
def test_http_server_request_with_upgrade_header_keeps_its_body_and_connection(
    connection: socket.socket, caplog: pytest.LogCaptureFixture, pieces: tuple[str, ...]
) -> None:
    with caplog.at_level(logging.INFO, "uvicorn.error"):
        for _ in range(2):
            send(connection, *pieces)
            response, body = receive(connection)
            assert response.status == 200
            assert json.loads(body) == ECHOED | {"method": "".join(pieces).partition(" ")[0]}
    # uvicorn would log a warning for each request.
    assert "pgrad" not in caplog.text


def test_http_server_pipelined_requests_with_upgrade_header_are_answered_in_order(connection: socket.socket) -> None:
    # More than Python's recursion limit, in one segment.
    bodies = [f"{number:05}" for number in range(1500)]
    send(connection, "".join(f"{HEAD}Content-Length: 5\n\n{body}" for body in bodies))
    received = connection.makefile("rb")
    for body in bodies:
        head = b"".join(iter(received.readline, b"\r\n"))
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        assert json.loads(received.read(length))["body"] == body


@pytest.mark.parametrize(
    "head", [HEAD.replace("HTTP/1.1", "HTTP/1.0"), HEAD.replace("Connection: Upgrade", "Connection: close, Upgrade")]
)
def test_http_server_upgrade_header_on_closing_connection_is_ignored(connection: socket.socket, head: str) -> None:
    send(connection, head + LENGTH)
    response, body = receive(connection)
    assert (response.status, json.loads(body)) == (200, ECHOED)
    assert connection.recv(1) == b""


def test_http_server_upgrade_header_with_expect_100_continue_gets_it(connection: socket.socket) -> None:
    head, _, body = (HEAD + "Expect: 100-continue\n" + LENGTH).rpartition("\n\n")
    send(connection, head + "\n\n")
    assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    send(connection, body)
    assert json.loads(receive(connection)[1]) == ECHOED


@pytest.mark.parametrize(
    "request_head", ["CONNECT server:80 HTTP/1.1\nHost: server\n", f"CONNECT server:80 HTTP/1.1\nHost: server\n{H2C}"]
)
def test_http_server_connect_returns_400(connection: socket.socket, request_head: str) -> None:
    send(connection, request_head + "\n")
    assert receive(connection)[0].status == 400


def test_http_server_curl_with_http2_gets_the_body(url: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    command = [
        curl,
        "--silent",
        "--noproxy",
        "*",
        "--http2",
        "--header",
        "X-Mine: 1",
        "--data",
        BODY,
        f"{url}/a%20b?c=d",
    ]
    done = subprocess.run(command, capture_output=True, check=True, timeout=HANG_SECONDS)
    assert json.loads(done.stdout) == ECHOED


def test_http_server_close_idle_connections_finishes_the_running_response() -> None:
    async def check() -> None:
        requested, answer = asyncio.Event(), asyncio.Event()

        async def endpoint(request: Request) -> JSONResponse:
            if request.url.path == "/slow":
                requested.set()
                await answer.wait()
            return JSONResponse("done")

        server = HTTPServer(Starlette(routes=[Route("/{path:path}", endpoint)]), 5)
        with kserve_server.bind(0) as listening:
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            port = listening.getsockname()[1]
            fresh, used, running = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            used[1].write(b"GET / HTTP/1.1\r\nHost: server\r\n\r\n")
            assert (await used[0].readuntil(b'"done"')).startswith(b"HTTP/1.1 200 ")
            running[1].write(b"GET /slow HTTP/1.1\r\nHost: server\r\n\r\n")
            await requested.wait()
            server.close_idle_connections()
            assert await fresh[0].read() == await used[0].read() == b""
            answer.set()
            response = await running[0].read()
            assert response.endswith(b'"done"')
            assert b"\r\nconnection: close\r\n" in response
            server.should_exit = True
            await serving
            for _, writer in (fresh, used, running):
                writer.close()

    asyncio.run(asyncio.wait_for(check(), HANG_SECONDS))
