"""Requests as OpenTelemetry spans: one for the request, and below it `queue`, `prefill` and `decode` of each sequence.

All are made once a request is over, of what its record holds, so nothing is added to its way. W3C's `traceparent` says
whose trace it belongs to. Names and attributes follow OpenTelemetry's conventions for generative AI, HTTP and RPC; no
value of an attribute is what a client sent: no prompt, and no path either.

The only module that imports opentelemetry, imported itself only where spans are wanted. Where they go, which of them
and how many is for OpenTelemetry's SDK to know, which reads its own variables, OTEL_*.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version as installed_version
from itertools import pairwise
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from predictor.errors import InvalidSettings
from predictor.observability.request_record import RequestRecord
from predictor.types import DEADLINE, FAILED, FinishedSequence

SERVICE = "kserve-llm"
"""The service's name where OTEL_SERVICE_NAME says no other."""
CLOSE_SECONDS = 5.0
"""What the last spans get to leave: a collector that does not answer must not hold up the end."""

_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
"""What is named as it is; a client may send any other word."""
_RPC_SERVICE = "inference.GRPCInferenceService"
_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Tells OpenTelemetry's collector of requests; in a thread of its own, which drops spans rather than wait.

    Args:
        model_name: of the model that answers.

    Raises:
        InvalidSettings: the SDK does not take what one of its variables says.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        service = Resource({SERVICE_NAME: SERVICE, SERVICE_VERSION: installed_version(SERVICE)})
        resource = Resource.create().merge(service).merge(OTELResourceDetector().detect())
        # Nobody else's: FastAPI would make spans of its own, with the query in them, if this were the process's.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        try:
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        except (RuntimeError, ValueError) as error:
            raise InvalidSettings(f"OpenTelemetry does not take one of its variables OTEL_*: {error}") from None
        self._tracer = self._provider.get_tracer("predictor")

    def export_http(self, scope: Scope, status: int, began: float, record: RequestRecord) -> None:
        """A request over HTTP is over.

        Args:
            scope: ASGI's, with the route that was found.
            status: of the answer, or `request_record.CLIENT_GONE`.
            began: by `time.monotonic()`.
            record: what is known of it; is given its trace's id.
        """
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        attributes = {
            "http.request.method": method,
            "http.response.status_code": status,
            "url.scheme": scope["scheme"],
        }
        name = "HTTP" if method == "_OTHER" else method
        if route := getattr(scope.get("route"), "path", None):
            attributes["http.route"] = route
            name = f"{name} {route}"
        self._export(name, Headers(scope=scope).items(), attributes, status, began, record)

    def export_grpc(
        self,
        method: str,
        metadata: Iterable[tuple[str, Any]],
        code: str,
        status: int,
        began: float,
        record: RequestRecord,
    ) -> None:
        """A call over gRPC is over; `code` is gRPC's, `status` HTTP's for the same, the rest as of `export_http`."""
        attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": f"{_RPC_SERVICE}/{method}",
            "rpc.response.status_code": code,
        }
        self._export(attributes["rpc.method"], metadata, attributes, status, began, record)

    def close(self) -> None:
        """Let the last spans leave, within `CLOSE_SECONDS`."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)

    def _export(
        self,
        name: str,
        headers: Iterable[tuple[str, Any]],
        attributes: Mapping[str, Any],
        status: int,
        began: float,
        record: RequestRecord,
    ) -> None:
        # One difference for all instants of a request, lest a clock that is set meanwhile puts them out of order.
        wall = time.time_ns() - time.monotonic_ns()
        ended = sorted(record.finished, key=lambda each: each.index)
        facts = {**attributes, **({"error.type": record.error} if record.error else {})}
        if record.operation:
            name = f"{record.operation} {self._model_name}"
            facts |= {
                "gen_ai.operation.name": record.operation,
                "gen_ai.provider.name": SERVICE,
                "gen_ai.request.model": self._model_name,
            }
        if ended:
            facts |= {
                "gen_ai.response.finish_reasons": [each.outcome for each in ended],
                "gen_ai.usage.input_tokens": sum(each.prompt_tokens for each in ended),
                "gen_ai.usage.output_tokens": sum(each.completion_tokens for each in ended),
            }
        span = self._tracer.start_span(
            name, _parent(headers), SpanKind.SERVER, facts, start_time=wall + _nanoseconds(began)
        )
        if (context := span.get_span_context()).is_valid:
            record.trace_id = format_trace_id(context.trace_id)
        # The conventions leave it open for what is the client's fault; an answer that had begun may still have failed.
        if status >= 500 or (status < 400 and record.error):
            span.set_status(StatusCode.ERROR)
        for each in ended:
            self._export_sequence(each, set_span_in_context(span), wall)
        span.end(wall + time.monotonic_ns())

    def _export_sequence(self, ended: FinishedSequence, parent: Context, wall: int) -> None:
        """What a sequence came to, one after the other; the last of them says how it ended."""
        phases = (("queue", 0.0), ("prefill", ended.queue_seconds), ("decode", ended.first_token_seconds))
        begun = [(name, start) for name, start in phases if start is not None]
        for (name, start), (following, end) in pairwise([*begun, ("", ended.total_seconds)]):
            facts: dict[str, Any] = {"kserve_llm.sequence": ended.index}
            if name == "prefill":
                facts["gen_ai.usage.input_tokens"] = ended.prompt_tokens
            if name == "decode":
                facts["gen_ai.usage.output_tokens"] = ended.completion_tokens
            if not following:
                facts["gen_ai.response.finish_reasons"] = [ended.outcome]
            began, over = (wall + _nanoseconds(ended.admitted_at + each) for each in (start, end))
            span = self._tracer.start_span(name, parent, attributes=facts, start_time=began)
            if not following and ended.outcome in (DEADLINE, FAILED):
                span.set_status(StatusCode.ERROR)
            span.end(over)


def _parent(headers: Iterable[tuple[str, Any]]) -> Context:
    """Whose trace a request continues; nobody's, where that is not said exactly once and in W3C's words."""
    carrier: dict[str, list[str]] = {field: [] for field in _W3C.fields}
    for name, value in headers:
        if name in carrier:
            carrier[name].append(value)
    return _W3C.extract(carrier, Context()) if len(carrier["traceparent"]) == 1 else Context()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1_000_000_000)
