"""ASGI middleware around every HTTP route.

From the outside in, each one an ASGI application around the next:

    ConnectionMiddleware -> NormalizePathMiddleware -> RequestLogMiddleware -> DrainMiddleware -> ApiKeyMiddleware
        -> MaxBodySizeMiddleware -> DecodeBodyMiddleware -> MaxBodySizeMiddleware -> routes

If enabled, Starlette's CORSMiddleware is around all but the first. The ones inside of `RequestLogMiddleware` reject a
request by raising a `RequestError`, which it turns into the response. They wrap `receive` and `send` instead of
buffering, so that streams and disconnects pass through.
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
from predictor.entrypoints.http.content_encoding import DecodedBody, content_coding
from predictor.entrypoints.http.error_responses import respond
from predictor.errors import BodyTooLarge, Draining, GenerationFailed, RequestError
from predictor.observability import request_record
from predictor.observability.request_record import RequestRecord

logger = logging.getLogger(__name__)

DISCARD_BYTES = 16_777_216
"""Maximum size of a body that no route has read and that is read before the response."""
DISCARD_SECONDS = 10.0
"""Maximum time for it."""
LINGER_SECONDS = 30.0
"""Maximum time to read on after the response to a request with a larger or slower body; then its connection closes."""
SILENCE_SECONDS = 2.0
"""Time without data after which the connection closes earlier."""

_PROBE = re.compile(r"/(health|metrics|ping|version)?|/v2/health/[^/]+|/v2/models/[^/]+(/versions/[^/]+)?/ready")
_PAGE = re.compile(r"/playground/[^/]+")


def is_public(scope: Scope) -> bool:
    """Return whether a request is for a file of the page, which contains no secret, or is a probe."""
    return is_probe(scope) or (scope["method"] in ("GET", "HEAD") and _PAGE.fullmatch(scope["path"]) is not None)


def is_probe(scope: Scope) -> bool:
    """Return whether a request is a liveness or readiness probe, a scrape of metrics, or for the server's version."""
    return scope["method"] in ("GET", "HEAD") and _PROBE.fullmatch(scope["path"]) is not None


class _Middleware:
    """Base class: HTTP requests go to `_handle`, other scopes such as the lifespan to `app`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as specified by ASGI."""
        if scope["type"] == "http":
            await self._handle(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class ConnectionMiddleware(_Middleware):
    """Reads each request's body to its end before the response, and closes connections once the server terminates.

    Proxies may cut a response that begins while they still send the body: Knative's do, without full duplex. A client
    whose connection is closed reaches another server, once the cluster's network has removed this one.

    Args:
        app: the next application.
        is_terminating: whether the connection is closed after the response.
    """

    def __init__(self, app: ASGIApp, is_terminating: Callable[[], bool]) -> None:
        super().__init__(app)
        self._is_terminating = is_terminating

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = _Connection(Headers(scope=scope), self._is_terminating, receive, send)
        await self._app(scope, connection.receive, connection.send)


class _Connection:
    """The `receive` and `send` of one request, with the state of its body."""

    def __init__(self, headers: Headers, is_terminating: Callable[[], bool], receive: Receive, send: Send) -> None:
        self._headers = headers
        self._is_terminating = is_terminating
        self._body_started = False
        self._body_pending = True
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        message = await self._receive()
        self._body_started = True
        self._body_pending = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._body_pending and self._can_discard():
                await self._discard(DISCARD_SECONDS, DISCARD_BYTES)
            if self._body_pending or self._is_terminating():
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["connection"] = "close"
        elif self._body_pending and not message.get("more_body", False):
            # A connection closed with unread data is reset, and the client may see the reset before the response.
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body"}
        await self._send(message)

    def _can_discard(self) -> bool:
        """Whether the rest of the body can be read before the response."""
        length = self._headers.get("content-length", "")
        if length.isdecimal() and int(length) > DISCARD_BYTES:
            return False
        # Reading would make the server request the body, which the client has not sent yet.
        return self._body_started or self._headers.get("expect", "").lower() != "100-continue"

    async def _discard(self, seconds: float, max_bytes: int) -> int:
        """Read on, until the body or the time ends or `max_bytes` are exceeded; return the number of bytes."""
        received = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._body_pending and received <= max_bytes:
                    received += len((await self.receive()).get("body", b""))
        return received

    async def _linger(self) -> None:
        """Read on while the client sends."""
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline and await self._discard(SILENCE_SECONDS, 0):
            pass


class NormalizePathMiddleware(_Middleware):
    """Serves paths with repeated and trailing slashes as if they had none: `//v1/models/` is `/v1/models`.

    A redirect would not do: clients repeat a POST without its body, and behind a proxy that terminates TLS the location
    would have the wrong scheme.
    """

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = re.sub("/+", "/", scope["path"])
        await self._app({**scope, "path": path.removesuffix("/") or path}, receive, send)


class RequestLogMiddleware(_Middleware):
    """Assigns a request id and record, converts exceptions to responses, and logs one line per request.

    The id is the client's `x-request-id` if it is printable, else a new one; the response has it too, and names unknown
    fields of the body in `x-ignored-fields`. Probes are not logged, counted or traced.

    Args:
        app: the next application.
        count: called with protocol (None if no route was reached) and status of each request.
        trace: called with the arguments of `Tracing.export_http` for each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        count: Callable[[str | None, int], None],
        trace: Callable[[Scope, int, float, RequestRecord], None] | None = None,
    ) -> None:
        super().__init__(app)
        self._count = count
        self._trace = trace

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        record = RequestRecord(request_record.request_id(Headers(scope=scope).getlist("x-request-id")))
        cycle = _RequestResponseCycle(record, receive, send)
        with request_record.bind(record):
            try:
                await self._app(scope, cycle.receive, cycle.send)
            except ClientDisconnect:
                cycle.disconnected = True
            except BaseException as error:
                record.error = type(error).__name__
                if cycle.status is not None or not isinstance(error, Exception):
                    # Re-raised, it makes the server close the connection; otherwise the response would look complete.
                    error.add_note(f"The response to request {record.request_id} is incomplete.")
                    raise
                if not isinstance(error, RequestError):
                    logger.exception("unexpected error in a request")
                    error = GenerationFailed("Internal server error. See the server's log.")
                await cycle.respond(error, scope["path"])
            finally:
                if not is_probe(scope):
                    self._count(record.protocol, cycle.outcome)
                    if self._trace:
                        self._trace(scope, cycle.outcome, started, record)
                    _log(scope, cycle.outcome, time.monotonic() - started, record)


class _RequestResponseCycle:
    """The `receive` and `send` of one request, with the state of both directions."""

    def __init__(self, record: RequestRecord, receive: Receive, send: Send) -> None:
        self._record = record
        self.status: int | None = None
        """Of the response, once it has started."""
        self.disconnected = False
        self._response_complete = False
        self._receive = receive
        self._send = send

    @property
    def outcome(self) -> int:
        """Status for log, metrics and trace."""
        return request_record.CLIENT_GONE if self.disconnected else self.status or GenerationFailed.status

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._response_complete:
            self.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._record.request_id
            if self._record.ignored_fields:
                headers[request_record.IGNORED_FIELDS_HEADER] = ", ".join(self._record.ignored_fields)
            self.status = message["status"]
        elif not message.get("more_body", False):
            self._response_complete = True
        await self._send(message)

    async def respond(self, error: RequestError, path: str) -> None:
        """Send `error`."""
        response = respond(error, path)
        status, headers = response.status_code, response.raw_headers
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": response.body})


class DrainMiddleware(_Middleware):
    """Rejects everything except probes with 503 while the server drains."""

    def __init__(self, app: ASGIApp, is_open: Callable[[], bool]) -> None:
        super().__init__(app)
        self._is_open = is_open

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_probe(scope) and not self._is_open():
            raise Draining("The server is shutting down. Retry later.")
        await self._app(scope, receive, send)


class ApiKeyMiddleware(_Middleware):
    """Requires a key for everything except probes and the page's files; the key's owner goes into the request's record.

    Anthropic's clients send it as `x-api-key`, all others as a bearer token.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        super().__init__(app)
        self._keys = keys

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_public(scope):
            headers = Headers(scope=scope)
            authorization = headers.getlist("authorization") or [
                f"Bearer {key}" for key in headers.getlist("x-api-key")
            ]
            request_record.current().caller = self._keys.authenticate(authorization)
        await self._app(scope, receive, send)


class DecodeBodyMiddleware(_Middleware):
    """Decodes bodies with a `Content-Encoding`, piece by piece.

    A MaxBodySizeMiddleware around it limits the encoded size, and one inside of it the decoded size.
    """

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        coding = content_coding(Headers(scope=scope).getlist("content-encoding"))
        await self._app(scope, DecodedBody(receive, coding).receive if coding else receive, send)


class MaxBodySizeMiddleware(_Middleware):
    """Rejects a body of more than `max_bytes`, by its Content-Length or once that many bytes were received."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        super().__init__(app)
        self._max_bytes = max_bytes

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._max_bytes
        error = BodyTooLarge(
            f"Request body too large: more than {limit} bytes. Send less or raise --max_request_bytes."
        )
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise error
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            if received <= limit:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= limit:
                    return message
            raise error

        async def send_within_limit(message: Message) -> None:
            # The route's own response to an unreadable body is dropped in favor of `error`.
            if received <= limit:
                await send(message)

        try:
            await self._app(scope, limited_receive, send_within_limit)
        except Exception:
            if received <= limit:
                raise
        if received > limit:
            raise error


def _log(scope: Scope, status: int, seconds: float, record: RequestRecord) -> None:
    """Log a request, without its query string, which may contain private data."""
    method, path = scope["method"], quote(scope["path"], safe="/:@")
    fields = {"method": method, "path": path, "status": status}
    request_record.log_request(f"{method} {path} {status}", record, fields, duration_ms=round(seconds * 1000, 1))
