"""ASGI middleware around every HTTP route.

From the outside in, each one an ASGI application around the next:

    NormalizePathMiddleware -> RequestLogMiddleware -> DrainMiddleware -> ApiKeyMiddleware
        -> MaxBodySizeMiddleware -> DecodeBodyMiddleware -> MaxBodySizeMiddleware -> routes

If enabled, Starlette's CORSMiddleware is around all of them. The ones inside of `RequestLogMiddleware` reject a request
by raising a `RequestError`, which it turns into the response. They wrap `receive` and `send` instead of buffering, so
that streams and disconnects pass through.
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

LINGER_SECONDS = 2.0
"""Maximum time to read the rest of a rejected request's body before the connection is closed."""

_PROBE = re.compile(r"/(health|metrics|ping|version)?|/v2/health/[^/]+|/v2/models/[^/]+(/versions/[^/]+)?/ready")


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
        self._body_pending = True
        self._response_complete = False
        self._receive = receive
        self._send = send

    @property
    def outcome(self) -> int:
        """Status for log, metrics and trace."""
        return request_record.CLIENT_GONE if self.disconnected else self.status or GenerationFailed.status

    async def receive(self) -> Message:
        message = await self._receive()
        self._body_pending = message.get("more_body", False)
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
        """Send `error`; if part of the body is unread, read on for a while and close the connection.

        A connection closed with unread data is reset, and the client may see the reset before the response.
        """
        response = respond(error, path)
        if self._body_pending:
            response.headers["Connection"] = "close"
        status, headers = response.status_code, response.raw_headers
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": response.body, "more_body": True})
        self._response_complete = True
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._body_pending:
                    await self.receive()
        await self.send({"type": "http.response.body"})


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
    """Requires a bearer key for everything except probes; the key's owner goes into the request's record."""

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        super().__init__(app)
        self._keys = keys

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_probe(scope):
            caller = self._keys.authenticate(Headers(scope=scope).getlist("authorization"))
            request_record.current().set_caller(caller)
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
        received, started = 0, False

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
            nonlocal started
            if started or received <= limit:
                started = True
                await send(message)

        try:
            await self._app(scope, limited_receive, send_within_limit)
        except Exception:
            if started or received <= limit:
                raise
        if received > limit and not started:
            raise error


def _log(scope: Scope, status: int, seconds: float, record: RequestRecord) -> None:
    """Log a request, without its query string, which may contain private data."""
    method, path = scope["method"], quote(scope["path"], safe="/:@")
    fields = {"method": method, "path": path, "status": status}
    request_record.log_request(f"{method} {path} {status}", record, fields, duration_ms=round(seconds * 1000, 1))
