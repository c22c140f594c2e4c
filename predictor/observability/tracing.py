"""Export requests as OpenTelemetry spans: one per request, with `queue`, `prefill` and `decode` of each sequence.

Spans are created from the request's record after its end, so they add nothing to its latency. The W3C header
`traceparent` joins them to the caller's trace. Names and attributes follow OpenTelemetry's semantic conventions for
generative AI, HTTP and RPC; no attribute value comes from the client, neither prompt nor path.

The only module that imports opentelemetry; it is imported only if tracing is on. OpenTelemetry's SDK reads endpoint,
sampling and limits from its OTEL_* variables.
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
"""Default of OTEL_SERVICE_NAME."""
CLOSE_SECONDS = 5.0
"""Maximum time to export the last spans; an unresponsive collector must not block shutdown."""

_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
"""HTTP methods used as attribute values; others are reported as _OTHER."""
_RPC_SERVICE = "inference.GRPCInferenceService"
_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Exports spans from a background thread, which drops spans when its queue is full.

    Raises:
        InvalidSettings: the SDK rejects an OTEL_* variable.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        service = Resource({SERVICE_NAME: SERVICE, SERVICE_VERSION: installed_version(SERVICE)})
        resource = Resource.create().merge(service).merge(OTELResourceDetector().detect())
        # Not the global provider: with that, FastAPI would create spans that contain the query string.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        try:
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        except (RuntimeError, ValueError) as error:
            raise InvalidSettings(f"OpenTelemetry rejects an OTEL_* variable: {error}") from None
        self._tracer = self._provider.get_tracer("predictor")

    def export_http(self, scope: Scope, status: int, started: float, record: RequestRecord) -> None:
        """Export the spans of a finished HTTP request, and set the trace id of its record.

        The ASGI scope has the matched route; `status` may be `request_record.CLIENT_GONE`. `started` is by
        `time.monotonic()`.
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
        self._export(name, Headers(scope=scope).items(), attributes, status, started, record)

    def export_grpc(
        self,
        method: str,
        metadata: Iterable[tuple[str, Any]],
        code: str,
        status: int,
        started: float,
        record: RequestRecord,
    ) -> None:
        """Export the spans of a finished gRPC call, and set the trace id of its record.

        `code` is gRPC's, `status` is HTTP's for the same error, `started` is by `time.monotonic()`.
        """
        attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": f"{_RPC_SERVICE}/{method}",
            "rpc.response.status_code": code,
        }
        self._export(attributes["rpc.method"], metadata, attributes, status, started, record)

    def close(self) -> None:
        """Export the last spans, within `CLOSE_SECONDS`."""
        thread = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)

    def _export(
        self,
        name: str,
        headers: Iterable[tuple[str, Any]],
        attributes: Mapping[str, Any],
        status: int,
        started: float,
        record: RequestRecord,
    ) -> None:
        # One clock offset for all times of a request, so that setting the clock does not reorder them.
        offset_ns = time.time_ns() - time.monotonic_ns()
        sequences = sorted(record.finished, key=lambda sequence: sequence.index)
        span_attributes = {**attributes, **({"error.type": record.error} if record.error else {})}
        if record.operation:
            name = f"{record.operation} {self._model_name}"
            span_attributes |= {
                "gen_ai.operation.name": record.operation,
                "gen_ai.provider.name": SERVICE,
                "gen_ai.request.model": self._model_name,
            }
        if sequences:
            span_attributes |= {
                "gen_ai.response.finish_reasons": [sequence.outcome for sequence in sequences],
                "gen_ai.usage.input_tokens": sum(sequence.prompt_tokens for sequence in sequences),
                "gen_ai.usage.output_tokens": sum(sequence.completion_tokens for sequence in sequences),
            }
        span = self._tracer.start_span(
            name, _parent(headers), SpanKind.SERVER, span_attributes, start_time=offset_ns + _nanoseconds(started)
        )
        if (context := span.get_span_context()).is_valid:
            record.trace_id = format_trace_id(context.trace_id)
        # By the conventions, client errors are not errors of the server; a response that has started may still fail.
        if status >= 500 or (status < 400 and record.error):
            span.set_status(StatusCode.ERROR)
        for sequence in sequences:
            self._export_sequence(sequence, set_span_in_context(span), offset_ns)
        span.end(offset_ns + time.monotonic_ns())

    def _export_sequence(self, sequence: FinishedSequence, parent: Context, offset_ns: int) -> None:
        """Export the phases that a sequence reached, in order; the last one has its outcome."""
        phases = (("queue", 0.0), ("prefill", sequence.queue_seconds), ("decode", sequence.first_token_seconds))
        reached = [(name, start) for name, start in phases if start is not None]
        for (name, start), (next_name, end) in pairwise([*reached, ("", sequence.total_seconds)]):
            attributes: dict[str, Any] = {"kserve_llm.sequence": sequence.index}
            if name == "prefill":
                attributes["gen_ai.usage.input_tokens"] = sequence.prompt_tokens
            if name == "decode":
                attributes["gen_ai.usage.output_tokens"] = sequence.completion_tokens
            if not next_name:
                attributes["gen_ai.response.finish_reasons"] = [sequence.outcome]
            start_ns, end_ns = (offset_ns + _nanoseconds(sequence.admitted_at + seconds) for seconds in (start, end))
            span = self._tracer.start_span(name, parent, attributes=attributes, start_time=start_ns)
            if not next_name and sequence.outcome in (DEADLINE, FAILED):
                span.set_status(StatusCode.ERROR)
            span.end(end_ns)


def _parent(headers: Iterable[tuple[str, Any]]) -> Context:
    """Return the context of the caller's trace; an empty one unless there is exactly one valid `traceparent`."""
    carrier: dict[str, list[str]] = {field: [] for field in _W3C.fields}
    for name, value in headers:
        if name in carrier:
            carrier[name].append(value)
    return _W3C.extract(carrier, Context()) if len(carrier["traceparent"]) == 1 else Context()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1_000_000_000)
