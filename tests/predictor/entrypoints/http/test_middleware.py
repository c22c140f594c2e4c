"""The middleware around a Starlette application; behind a uvicorn server where connections matter."""

import asyncio
import gzip
import http.client
import logging
import queue
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from predictor.entrypoints.api_keys import KeyFile
from predictor.entrypoints.http import content_encoding, middleware
from predictor.entrypoints.http.middleware import (
    ApiKeyMiddleware,
    ConnectionMiddleware,
    DecodeBodyMiddleware,
    DrainMiddleware,
    MaxBodySizeMiddleware,
    NormalizePathMiddleware,
    RequestLogMiddleware,
)
from predictor.entrypoints.kserve_server import HTTPProtocol
from predictor.errors import InvalidRequest
from predictor.observability import request_record
from predictor.types import FinishedSequence
from tests.predictor import servers

KEY = "alices-key-0123456789"
LIMIT = 1000
BIG = 4_000_000
WAIT_SECONDS = 20
PROBES = servers.probe_paths("demo")
COMPLETIONS = "/openai/v1/completions"
INTERNAL_ERROR = "Internal server error. See the server's log."


async def echo(request: Request) -> Response:
    return Response(await request.body(), headers={"x-seen-id": request_record.current().request_id})


def serving(
    *inner: Middleware, endpoint: Any = echo, lifespan: Any = None, is_terminating: Any = lambda: False
) -> Starlette:
    """An application with one route for all paths, inside of the first two middlewares and then `inner`."""
    outer = [
        Middleware(ConnectionMiddleware, is_terminating),
        Middleware(RequestLogMiddleware, count=lambda *_: None),
    ]
    routes = [Route("/{path:path}", endpoint, methods=["GET", "POST"])]
    return Starlette(routes=routes, middleware=[*outer, *inner], lifespan=lifespan)


def send(app: ASGIApp, path: str = "/v2/models/demo/infer", **fields: Any) -> httpx.Response:
    """The answer without a server between; an exception that leaves `app` is raised here."""

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(fields.pop("method", "POST"), path, **fields)

    return asyncio.run(request())


class Server:
    """Where a real server listens, and the lines that it has logged for requests."""

    def __init__(self, port: int, lines: "queue.SimpleQueue[logging.LogRecord]") -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._lines = lines

    def line(self) -> dict[str, Any]:
        """The fields of the next request's line, which comes after the client has its answer."""
        fields: dict[str, Any] = self._lines.get(timeout=WAIT_SECONDS).fields  # type: ignore[attr-defined]
        return fields

    def connect(self, head: str) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_SECONDS)
        connection.sendall(head.replace("\n", "\r\n").encode())
        return connection


@pytest.fixture(params=[HTTPProtocol, "h11"])
def implementation(request: pytest.FixtureRequest) -> Any:
    return request.param


@contextmanager
def running(app: ASGIApp, implementation: Any = "auto", lifespan: Any = "off") -> Iterator[Server]:
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.Handler()
    listener.emit = lines.put  # type: ignore[assignment, method-assign]
    config = uvicorn.Config(app, http=implementation, ws="none", lifespan=lifespan, log_config=None)
    config.timeout_graceful_shutdown = 5
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        request_record.request_logger.addHandler(listener)
        thread.start()
        try:
            yield Server(listening.getsockname()[1], lines)
        finally:
            server.should_exit = True
            thread.join()
            request_record.request_logger.removeHandler(listener)


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of the requests' lines so far; the time it took is only known to be a number."""
    lines = [dict(vars(record)["fields"]) for record in caplog.records if record.name == "predictor.request"]
    assert all(line.pop("duration_ms") >= 0 for line in lines)
    return lines


# NormalizePathMiddleware


@pytest.mark.parametrize(
    ("path", "normalized"),
    [
        ("/", "/"),
        ("//", "/"),
        ("/v1", "/v1"),
        ("/v1/models/", "/v1/models"),
        ("//v1///models//", "/v1/models"),
        ("/v1/models%2F", "/v1/models"),
        ("/v1/a%20/?b=/c//", "/v1/a "),
    ],
)
def test_normalize_path_removes_extra_slashes(path: str, normalized: str) -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(f"{request.scope['path']}?{request.url.query}")

    app = NormalizePathMiddleware(serving(endpoint=endpoint))
    # httpx would take a path that begins with two slashes for a host.
    answer = send(app, f"http://server{path}")
    assert answer.text == f"{normalized}?{path.partition('?')[2]}"


# RequestLogMiddleware


@pytest.mark.parametrize("sent", ["a", "7f0c:trace/1.2_3+4=5-6", "x" * 128])
def test_request_log_keeps_printable_request_id(sent: str) -> None:
    answer = send(serving(), headers={"X-Request-ID": sent})
    assert answer.headers["x-request-id"] == answer.headers["x-seen-id"] == sent


@pytest.mark.parametrize("sent", [[], [""], ["x" * 129], ["a b"], ['{"a":1}'], ["ü".encode()], ["a", "b"]])
def test_request_log_replaces_unusable_request_id(sent: list[Any]) -> None:
    first, second = (
        send(serving(), headers=[("x-request-id", value) for value in sent]).headers["x-request-id"] for _ in range(2)
    )
    assert first != second
    assert {len(first), len(second)} == {32}


def test_request_log_response_has_one_request_id() -> None:
    async def endpoint(_: Request) -> Response:
        return Response(headers={"X-Request-Id": "another"})

    answer = send(serving(endpoint=endpoint), headers={"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_request_log_writes_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async def endpoint(_: Request) -> Response:
        record = request_record.current()
        record.protocol = "v2"
        record.finished += [
            FinishedSequence(
                index=index,
                outcome=reason,
                prompt_tokens=2,
                completion_tokens=4,
                admitted_at=0,
                total_seconds=0.3,
                queue_seconds=0.1,
                first_token_seconds=0.2,
            )
            for index, reason in enumerate(("stop", "length"))
        ]
        return Response(status_code=201)

    send(serving(endpoint=endpoint), "/v2/models/demo/infer?prompt=secret")
    assert logged(caplog) == [
        {
            "method": "POST",
            "path": "/v2/models/demo/infer",
            "status": 201,
            "protocol": "v2",
            "prompt_tokens": 4,
            "completion_tokens": 8,
            "sequences": 2,
            "finish_reasons": ["stop", "length"],
            "queue_seconds": 0.1,
            "first_token_seconds": 0.2,
        }
    ]
    [message] = [record.getMessage() for record in caplog.records if record.name == "predictor.request"]
    assert message.startswith("POST /v2/models/demo/infer 201 duration_ms=")
    assert message.endswith(" finish_reasons=stop,length queue_seconds=0.1 first_token_seconds=0.2")


def test_request_log_escapes_path(caplog: pytest.LogCaptureFixture) -> None:
    send(serving(), "/v1/models/demo:predict%0Aforged%20line")
    assert [line["path"] for line in logged(caplog)] == ["/v1/models/demo:predict%0Aforged%20line"]


@pytest.mark.parametrize("path", PROBES)
def test_request_log_omits_probes(caplog: pytest.LogCaptureFixture, path: str) -> None:
    assert send(serving(), path, method="GET").headers["x-request-id"]
    assert logged(caplog) == []


async def fail(_: Request) -> Response:
    raise KeyError("secret prompt")


def test_request_log_unexpected_error_returns_500_and_logs_traceback(caplog: pytest.LogCaptureFixture) -> None:
    answer = send(serving(endpoint=fail), headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json()) == (500, {"error": INTERNAL_ERROR})
    assert answer.headers["x-request-id"] == "mine"
    assert [(line["status"], line["error"]) for line in logged(caplog)] == [(500, "KeyError")]
    assert "Traceback" in caplog.text
    assert "secret" not in " ".join(caplog.messages)


def test_request_log_unexpected_error_has_protocol_format() -> None:
    assert send(serving(endpoint=fail), COMPLETIONS).json()["error"]["message"] == INTERNAL_ERROR
    assert send(serving(endpoint=fail), "/v2/models/demo/generate").status_code == 424


def test_request_log_request_error_becomes_response(caplog: pytest.LogCaptureFixture) -> None:
    async def endpoint(_: Request) -> Response:
        raise InvalidRequest("The field `n` is wrong.")

    answer = send(serving(endpoint=endpoint))
    assert (answer.status_code, answer.json()) == (400, {"error": "The field `n` is wrong."})
    assert [line["error"] for line in logged(caplog)] == ["InvalidRequest"]
    assert "Traceback" not in caplog.text


def test_request_log_cancelled_request_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def cancel() -> None:
        started = asyncio.Event()

        async def endpoint(_: Request) -> Response:
            started.set()
            await asyncio.Event().wait()
            return Response()

        transport = httpx.ASGITransport(serving(endpoint=endpoint))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            asking = asyncio.create_task(client.get("/v2/models/demo"))
            await started.wait()
            asking.cancel()
            await asyncio.wait([asking])

    asyncio.run(cancel())
    assert [(line["status"], line["error"]) for line in logged(caplog)] == [(500, "CancelledError")]


def full(tmp_path: Path, *, endpoint: Any = echo, is_open: bool = True, lifespan: Any = None) -> ASGIApp:
    """All middleware, in order."""
    (tmp_path / "keys").write_text(f"alice:{KEY}\n")
    keys = KeyFile(tmp_path / "keys")
    inner = [
        Middleware(DrainMiddleware, lambda: is_open),
        Middleware(ApiKeyMiddleware, keys),
        Middleware(MaxBodySizeMiddleware, LIMIT),
    ]
    return serving(*inner, endpoint=endpoint, lifespan=lifespan)


AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


def test_stream_is_not_buffered(implementation: Any, tmp_path: Path) -> None:
    received = threading.Event()

    async def endpoint(_: Request) -> Response:
        async def chunks() -> AsyncIterator[str]:
            yield "one"
            yield "two" if await asyncio.to_thread(received.wait, WAIT_SECONDS) else "held back"

        return StreamingResponse(chunks())

    with (
        running(full(tmp_path, endpoint=endpoint), implementation) as server,
        httpx.stream("POST", server.url, headers=AUTHORIZED, trust_env=False, timeout=WAIT_SECONDS * 2) as answer,
    ):
        pieces = answer.iter_text()
        assert next(pieces) == "one"
        received.set()
        assert next(pieces) == "two"
        assert (server.line()["status"], list(pieces)) == (200, [])


def test_stream_of_disconnected_client_ends(implementation: Any, tmp_path: Path) -> None:
    ended = threading.Event()

    async def endpoint(_: Request) -> Response:
        async def chunks() -> AsyncIterator[str]:
            try:
                yield "one"
                await asyncio.Event().wait()
            finally:
                request_record.current().error = "Stopped"
                ended.set()

        return StreamingResponse(chunks())

    with running(full(tmp_path, endpoint=endpoint), implementation) as server:
        with httpx.stream("POST", server.url, headers=AUTHORIZED, trust_env=False) as answer:
            assert next(answer.iter_text()) == "one"
        assert ended.wait(WAIT_SECONDS)
        line = server.line()
    assert (line["status"], line["error"], line["key"]) == (499, "Stopped", "alice")


def test_route_receives_disconnect(implementation: Any, tmp_path: Path) -> None:
    waiting = threading.Event()

    async def endpoint(request: Request) -> Response:
        await request.body()
        waiting.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return Response("not received")

    with running(full(tmp_path, endpoint=endpoint), implementation) as server:
        with server.connect(f"GET /v2/models/demo HTTP/1.1\nHost: server\nAuthorization: Bearer {KEY}\n\n"):
            assert waiting.wait(WAIT_SECONDS)
        assert server.line()["status"] == 499


def test_disconnect_before_body_is_logged_without_error(
    implementation: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reading = threading.Event()

    async def endpoint(request: Request) -> Response:
        reading.set()
        return await echo(request)

    head = f"POST /v2/models/demo/infer HTTP/1.1\nHost: server\nAuthorization: Bearer {KEY}\nContent-Length: 9\n\nhalf"
    with running(full(tmp_path, endpoint=endpoint), implementation) as server:
        with server.connect(head):
            assert reading.wait(WAIT_SECONDS)
        line = server.line()
    assert (line["status"], "error" in line) == (499, False)
    assert "Traceback" not in caplog.text


def test_error_in_stream_closes_connection(
    implementation: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def endpoint(_: Request) -> Response:
        async def chunks() -> AsyncIterator[str]:
            yield "one"
            raise KeyError("lost")

        return StreamingResponse(chunks())

    headers = {**AUTHORIZED, "x-request-id": "mine"}
    with running(full(tmp_path, endpoint=endpoint), implementation) as server:
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(server.url, headers=headers, trust_env=False)
        line = server.line()
    assert (line["status"], line["error"]) == (200, "KeyError")
    assert caplog.text.count("KeyError: 'lost'") == 1
    assert "The response to request mine is incomplete." in caplog.text


def test_lifespan_passes_through(tmp_path: Path) -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        seen.append("started")
        yield
        seen.append("stopped")

    with running(full(tmp_path, is_open=False, lifespan=lifespan), lifespan="on") as server:
        assert httpx.get(server.url + "/v2", trust_env=False).status_code == 503
    assert seen == ["started", "stopped"]


# ConnectionMiddleware


HEAD = "POST /v2 HTTP/1.1\nHost: server\n"


def receive(connection: socket.socket) -> tuple[http.client.HTTPResponse, bytes]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response, response.read()


async def answer_unread(request: Request) -> Response:
    """Answer in all ways, without reading the body."""
    if request.url.path == "/error":
        raise InvalidRequest("No.")
    return StreamingResponse(iter(["one", "two"])) if request.url.path == "/stream" else Response()


@pytest.mark.parametrize("path", ["/v2", "/error", "/stream", "/metrics"])
def test_connection_of_a_terminating_server_closes_after_the_next_response(implementation: Any, path: str) -> None:
    states = iter([False, True])
    app = serving(endpoint=answer_unread, is_terminating=lambda: next(states))
    head = f"GET {path} HTTP/1.1\nHost: server\n\n"
    with running(app, implementation) as server, server.connect(head) as connection:
        first, _ = receive(connection)
        connection.sendall(head.replace("\n", "\r\n").encode())
        second, _ = receive(connection)
        assert connection.recv(1) == b""
    assert [response.headers.get_all("connection") for response in (first, second)] == [None, ["close"]]


class Reader:
    """An application whose responses must begin after the whole body was received."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.received = 0
        self.received_before_response = -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_receive() -> Message:
            message = await receive()
            self.received += len(message.get("body", b""))
            return message

        async def observing_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.received_before_response = self.received
            await send(message)

        await self._app(scope, counting_receive, observing_send)


@pytest.mark.parametrize("path", ["/v2", "/error", "/stream"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_connection_body_is_read_before_the_response(implementation: Any, path: str, chunked: bool) -> None:
    size = 3_000_000
    reader = Reader(serving(endpoint=answer_unread))
    with running(reader, implementation) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        for _ in range(2):
            reader.received = 0
            content = (b"x" * 100_000 for _ in range(30)) if chunked else b"x" * size
            assert "connection" not in client.post(path, content=content).headers
            assert reader.received_before_response == size


def test_connection_response_to_expect_100_continue_does_not_wait_for_the_body(implementation: Any) -> None:
    head = f"{HEAD.replace('/v2', '/error')}Expect: 100-continue\nContent-Length: 9\n\n"
    with running(serving(endpoint=answer_unread), implementation) as server, server.connect(head) as connection:
        response, _ = receive(connection)
        assert (response.status, response.headers["connection"]) == (400, "close")


def test_connection_with_a_slow_body_gets_the_response_and_closes(
    implementation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "DISCARD_SECONDS", 0.05)
    monkeypatch.setattr(middleware, "SILENCE_SECONDS", 0.05)
    with (
        running(serving(endpoint=answer_unread), implementation) as server,
        server.connect(f"{HEAD}Content-Length: 9\n\nhalf") as connection,
    ):
        response, _ = receive(connection)
        assert (response.status, response.headers["connection"]) == (200, "close")
        assert connection.recv(1) == b""


@pytest.mark.parametrize("head", [f"{HEAD}Content-Length: {BIG}\n\n", f"{HEAD}Transfer-Encoding: chunked\n\n{BIG:x}\n"])
def test_connection_with_a_large_body_stays_open_while_the_client_sends(
    implementation: Any, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    monkeypatch.setattr(middleware, "DISCARD_BYTES", 100_000)
    with running(limited(), implementation) as server, server.connect(head) as connection:
        connection.sendall(b"x" * BIG)
        if "chunked" in head:
            connection.sendall(b"\r\n0\r\n\r\n")
        answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"\r\nconnection: close\r\n" in answer.lower()
        assert answer.endswith(b'--max_request_bytes."}')
        assert server.line()["status"] == 413


# DrainMiddleware


def test_drain_rejects_requests_with_503(caplog: pytest.LogCaptureFixture) -> None:
    answer = send(serving(Middleware(DrainMiddleware, lambda: False)), headers={"x-request-id": "mine"})
    assert (answer.status_code, int(answer.headers["retry-after"]) > 0) == (503, True)
    assert answer.headers["x-request-id"] == "mine"
    assert "shutting down" in answer.json()["error"]
    assert [(line["status"], line["error"]) for line in logged(caplog)] == [(503, "Draining")]


def test_drain_state_is_read_for_every_request() -> None:
    states = iter([True, False, True])
    app = serving(Middleware(DrainMiddleware, lambda: next(states)))
    assert [send(app).status_code for _ in range(3)] == [200, 503, 200]


@pytest.mark.parametrize("path", PROBES)
def test_drain_accepts_probes(path: str) -> None:
    assert send(serving(Middleware(DrainMiddleware, lambda: False)), path, method="GET").status_code == 200


# ApiKeyMiddleware


@pytest.fixture
def closed(tmp_path: Path) -> ASGIApp:
    """An application for Alice only."""
    (tmp_path / "keys").write_text(f"alice:{KEY}\n")
    return serving(Middleware(ApiKeyMiddleware, KeyFile(tmp_path / "keys")))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR", "Bearer "])
def test_api_key_valid_key_is_logged_by_name(closed: ASGIApp, caplog: pytest.LogCaptureFixture, scheme: str) -> None:
    assert send(closed, headers={"Authorization": f"{scheme} {KEY}"}).status_code == 200
    assert [line["key"] for line in logged(caplog)] == ["alice"]
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [KEY.encode()],
        [f"Basic {KEY}".encode()],
        [f"Bearer{KEY}".encode()],
        [f"Bearer, {KEY}".encode()],
        [f"Bearer {KEY[:-1]}".encode()],
        [f"Bearer alice:{KEY}".encode()],
        [f"Bearer {KEY} {KEY}".encode()],
        [f"Bearer {KEY}ü".encode()],
        [f"Bearer {KEY}".encode(), b"Bearer wrong"],
        [b"Bearer wrong", f"Bearer {KEY}".encode()],
        [f"Bearer {KEY}".encode(), f"Bearer {KEY}".encode()],
    ],
)
def test_api_key_invalid_returns_401(closed: ASGIApp, caplog: pytest.LogCaptureFixture, headers: list[bytes]) -> None:
    answer = send(closed, headers=[(b"Authorization", value) for value in headers])
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "key" in answer.json()["error"]
    assert KEY not in answer.text
    [line] = logged(caplog)
    assert (line["error"], "key" in line) == ("Unauthorized", False)


def test_api_key_error_has_protocol_format(closed: ASGIApp) -> None:
    assert "Missing API key" in send(closed, COMPLETIONS).json()["error"]["message"]


@pytest.mark.parametrize("path", PROBES)
def test_api_key_accepts_probes(closed: ASGIApp, path: str) -> None:
    assert send(closed, path, method="GET").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/models/demo/ready"),
        ("POST", "/metrics"),
        ("GET", "/metrics/"),
        ("GET", "/v2/health/live/ready"),
        ("GET", "/v2/models/demo/infer/ready"),
        ("GET", "/v2/models/demo%2Finfer/ready"),
        ("GET", "/v2/models/demo/infer%0A/ready"),
        ("GET", "/v2/models/demo?/ready"),
        ("GET", "/v2/repository/index/ready"),
        ("GET", "/openapi.json"),
    ],
)
def test_api_key_rejects_paths_similar_to_probes(closed: ASGIApp, method: str, path: str) -> None:
    assert send(closed, path, method=method).status_code == 401


# MaxBodySizeMiddleware


def limited(endpoint: Any = echo) -> ASGIApp:
    return serving(Middleware(MaxBodySizeMiddleware, LIMIT), endpoint=endpoint)


def in_pieces(size: int) -> Iterator[bytes]:
    for start in range(0, size, 100):
        yield b"x" * min(100, size - start)


def test_max_body_size_accepts_body_up_to_limit(implementation: Any) -> None:
    with running(limited(), implementation) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.post("/v2", content=b"x" * LIMIT).content == b"x" * LIMIT
        assert client.post("/v2", content=in_pieces(LIMIT)).content == b"x" * LIMIT


def test_max_body_size_rejects_longer_body_and_keeps_connection(implementation: Any) -> None:
    with running(limited(), implementation) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        for content in (b"x" * (LIMIT + 1), in_pieces(LIMIT + 1)):
            answer = client.post("/v2", content=content)
            assert answer.status_code == 413
            sentence = f"Request body too large: more than {LIMIT} bytes. Send less or raise --max_request_bytes."
            assert answer.json() == {"error": sentence}
            line = server.line()
            assert (line["status"], line["error"]) == (413, "BodyTooLarge")
            assert client.post("/v2", content=b"x").content == b"x"
            assert server.line()["status"] == 200


def test_max_body_size_replaces_response_of_route_that_catches_error(implementation: Any) -> None:
    async def endpoint(request: Request) -> Response:
        for _ in range(3):
            with suppress(Exception):
                await request.body()
        return PlainTextResponse("There was an error parsing the body", 400)

    with running(limited(endpoint), implementation) as server:
        assert httpx.post(server.url, content=in_pieces(LIMIT * 3), trust_env=False).status_code == 413
        assert httpx.post(server.url, content=in_pieces(LIMIT), trust_env=False).status_code == 400


# DecodeBodyMiddleware


@pytest.fixture
def decoding() -> Iterator[Server]:
    """As in the application: one limit for the encoded body, one for the decoded body."""
    limit = Middleware(MaxBodySizeMiddleware, LIMIT)
    with running(serving(limit, Middleware(DecodeBodyMiddleware), limit)) as server:
        yield server


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (gzip.compress(b"x" * LIMIT, mtime=0), 200),
        (gzip.compress(b"x" * (LIMIT + 1), mtime=0), 413),
        (gzip.compress(b"x" * 10_000_000, compresslevel=1, mtime=0)[:LIMIT], 413),
        (gzip.compress(b"x" * LIMIT, compresslevel=0, mtime=0), 413),
        (gzip.compress(b"x", mtime=0) + b"x", 400),
        (b"x", 400),
    ],
    ids=["limit", "decoded", "bomb", "encoded", "trailing", "malformed"],
)
def test_decode_body_size_is_limited_before_and_after(decoding: Server, content: bytes, status: int) -> None:
    with httpx.Client(base_url=decoding.url, trust_env=False, headers={"Content-Encoding": "gzip"}) as client:
        answers = [client.post("/v2", content=sent) for sent in (content, iter([content[:1], content[1:]]))]
        answers.append(client.post("/v2", content=gzip.compress(b"x")))
    assert [answer.status_code for answer in answers] == [status, status, 200]
    assert answers[0].content == (b"x" * LIMIT if status == 200 else answers[1].content)
    assert answers[2].content == b"x"
    assert [decoding.line()["status"] for _ in answers] == [status, status, 200]


def test_decode_body_bomb_is_not_decoded_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_encoding, "PIECE_BYTES", LIMIT)
    sizes: list[int] = []

    async def endpoint(request: Request) -> Response:
        async for piece in request.stream():
            sizes.append(len(piece))  # noqa: PERF401, an error ends the loop
        return Response()

    limit = Middleware(MaxBodySizeMiddleware, 2 * LIMIT + 1)
    bomb = gzip.compress(b"x" * 1_000_000)
    answer = send(
        serving(limit, Middleware(DecodeBodyMiddleware), limit, endpoint=endpoint),
        content=bomb,
        headers={"Content-Encoding": "gzip"},
    )
    assert (answer.status_code, sizes) == (413, [LIMIT, LIMIT])


def test_decode_body_unsupported_coding_returns_415(decoding: Server) -> None:
    headers = {"Content-Encoding": "br"}
    answer = httpx.post(f"{decoding.url}{COMPLETIONS}", content=b"x", headers=headers, trust_env=False)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, deflate")
    assert answer.json()["error"]["message"].startswith("Content-Encoding 'br' is not supported.")
    assert decoding.line()["error"] == "UnsupportedMediaType"
