"""ASGI middleware around every HTTP route.

From the outside in, each one an ASGI application around the next:

    RequestLogMiddleware -> DrainMiddleware -> ApiKeyMiddleware -> MaxBodySizeMiddleware -> routes

The inner ones reject a request by raising a `RequestError`, which `RequestLogMiddleware` turns into the response. They
wrap `receive` and `send` instead of buffering, so that streams and disconnects pass through.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from predictor.entrypoints.api_keys import KeyFile
from predictor.entrypoints.http.error_responses import respond
from predictor.errors import BodyTooLarge, Draining, GenerationFailed, RequestError
from predictor.observability import request_record

logger = logging.getLogger(__name__)
request_logger = logging.getLogger("predictor.request")

LINGER_SECONDS = 2.0
"""How long a client may go on sending a body that was refused, before its connection is closed."""

_PROBE = re.compile(r"/(health|metrics)?|/v2/health/[^/]+|/v2/models/[^/]+(/versions/[^/]+)?/ready")


def is_probe(scope: Scope) -> bool:
    """Whether a request only asks how the server is: liveness, readiness, metrics."""
    return scope["method"] in ("GET", "HEAD") and _PROBE.fullmatch(scope["path"]) is not None


class _Middleware:
    """An application around `app`; what is not HTTP, such as the lifespan, passes through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        await (self._request if scope["type"] == "http" else self._app)(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class RequestLogMiddleware(_Middleware):
    """Gives every request an id and a record, answers errors that nothing else answered, and logs one line at the end.

    The id is the client's `x-request-id` where that can be printed anywhere, else a new one; the response carries it.
    Probes are not logged, counted or traced.

    Args:
        app: what answers.
        count: told protocol, where one was reached, and status of each request.
        trace: told of each request what `Tracing.export_http` takes.
    """

    def __init__(
        self,
        app: ASGIApp,
        count: Callable[[str | None, int], None],
        trace: Callable[[Scope, int, float, request_record.RequestRecord], None] | None = None,
    ) -> None:
        super().__init__(app)
        self._count = count
        self._trace = trace

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        cycle = _RequestResponseCycle(
            request_record.request_id(Headers(scope=scope).getlist("x-request-id")), receive, send
        )
        with request_record.bind(request_record.RequestRecord(cycle.request_id)) as record:
            try:
                await self._app(scope, cycle.receive, cycle.send)
            except ClientDisconnect:
                cycle.client_gone = True
            except BaseException as error:
                record.error = type(error).__name__
                if cycle.status is not None or not isinstance(error, Exception):
                    # Going up to the server it cuts the connection; ending here would pass for the end of the answer.
                    error.add_note(f"This broke off the answer to request {cycle.request_id}.")
                    raise
                if not isinstance(error, RequestError):
                    logger.exception("A request failed for a reason that was not foreseen.")
                    error = GenerationFailed("The server failed on this request; its log says why.")
                await cycle.answer(error, scope["path"])
            finally:
                if not is_probe(scope):
                    self._count(record.protocol, cycle.outcome)
                    if self._trace:
                        self._trace(scope, cycle.outcome, began, record)
                    _log(scope, cycle.outcome, time.monotonic() - began, record)


class _RequestResponseCycle:
    """The two channels of one request, watched to know what became of it."""

    def __init__(self, request_id: str, receive: Receive, send: Send) -> None:
        self.request_id = request_id
        self.status: int | None = None  # of the response, once it has begun
        self.unread = True  # there may be more of the request's body
        self.client_gone = False
        self.complete = False
        self._receive = receive
        self._send = send

    @property
    def outcome(self) -> int:
        """The status for the log."""
        return request_record.CLIENT_GONE if self.client_gone else self.status or GenerationFailed.status

    async def receive(self) -> Message:
        message = await self._receive()
        self.unread = message.get("more_body", False)
        if message["type"] == "http.disconnect" and not self.complete:
            self.client_gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            MutableHeaders(scope=message)["x-request-id"] = self.request_id
            self.status = message["status"]
        elif not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    async def answer(self, error: RequestError, path: str) -> None:
        """Send `error`; where the body was not read, read on for a while and have the connection closed.

        A connection that is closed with bytes waiting in it is reset, and the reset may overtake the answer.
        """
        response = respond(error, path)
        if self.unread:
            response.headers["Connection"] = "close"
        status, headers = response.status_code, response.raw_headers
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": response.body, "more_body": True})
        self.complete = True
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self.unread:
                    await self.receive()
        await self.send({"type": "http.response.body"})


class DrainMiddleware(_Middleware):
    """Lets nothing but probes in while `is_open()` is false: a server that is told to end must come to its end."""

    def __init__(self, app: ASGIApp, is_open: Callable[[], bool]) -> None:
        super().__init__(app)
        self._is_open = is_open

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_probe(scope) and not self._is_open():
            raise Draining("This server is shutting down and takes no new requests; send it again in a moment.")
        await self._app(scope, receive, send)


class ApiKeyMiddleware(_Middleware):
    """Lets in who brings one of the keys, and probes; the key's name goes into the request's record."""

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        super().__init__(app)
        self._keys = keys

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_probe(scope):
            request_record.current().key = self._keys.authenticate(Headers(scope=scope).getlist("authorization"))
        await self._app(scope, receive, send)


class MaxBodySizeMiddleware(_Middleware):
    """Refuses a body of more than `max_bytes`: at once where its length is told, else when it has grown so long."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        super().__init__(app)
        self._max_bytes = max_bytes

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._max_bytes
        error = BodyTooLarge(f"The body has more than {limit} bytes; send less, or raise --max_request_bytes.")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise error
        read, answered = 0, False

        async def receive_up_to_limit() -> Message:
            nonlocal read
            if read <= limit:
                message = await receive()
                read += len(message.get("body", b""))
                if read <= limit:
                    return message
            raise error

        async def send_unless_refused(message: Message) -> None:
            # What a route says about a body that it could not read is not the answer.
            nonlocal answered
            if answered or read <= limit:
                answered = True
                await send(message)

        try:
            await self._app(scope, receive_up_to_limit, send_unless_refused)
        except Exception:
            if answered or read <= limit:
                raise
        if read > limit and not answered:
            raise error


def _log(scope: Scope, status: int, seconds: float, record: request_record.RequestRecord) -> None:
    """The line of a request; without its query string, which may hold anything."""
    method, path = scope["method"], quote(scope["path"], safe="/:@")
    known = {"duration_ms": round(seconds * 1000, 1), **record.as_fields()}
    words = " ".join(f"{name}={','.join(value) if isinstance(value, list) else value}" for name, value in known.items())
    fields = {"method": method, "path": path, "status": status, **known}
    request_logger.info("%s %s %d %s", method, path, status, words, extra={"fields": fields})
