"""Spans as received by an OTLP collector on loopback, from an in-process predictor."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

from devtools.paths import ROOT
from predictor import settings
from predictor.entrypoints import lifecycle
from predictor.errors import InvalidSettings
from predictor.observability import request_record
from predictor.observability import tracing as tracing_module
from predictor.observability.request_record import RequestRecord
from predictor.observability.tracing import Tracing
from predictor.types import FinishedSequence
from tests.predictor import servers
from tests.predictor.servers import InProcessServer

WAIT_SECONDS = 60
PRIVATE = "xylophone"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OPENAI, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/v2/models/traced/generate"
UNSET, ERROR = 0, 2
PHASES = ("queue", "prefill", "decode")


@dataclass(frozen=True)
class Span:
    """A received span."""

    message: Message
    resource: dict[str, Any]

    @property
    def name(self) -> str:
        return self.message.name

    @property
    def trace_id(self) -> str:
        return self.message.trace_id.hex()

    @property
    def status(self) -> int:
        return self.message.status.code

    @property
    def attributes(self) -> dict[str, Any]:
        return values(self.message.attributes)

    @property
    def start(self) -> int:
        return self.message.start_time_unix_nano

    @property
    def end(self) -> int:
        return self.message.end_time_unix_nano

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


def finished(index: int, outcome: str, admitted_at: float) -> FinishedSequence:
    return FinishedSequence(
        index=index,
        outcome=outcome,
        prompt_tokens=1,
        completion_tokens=1,
        admitted_at=admitted_at,
        total_seconds=0.3,
        queue_seconds=0.1,
        first_token_seconds=0.2,
    )


def values(pairs: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in pairs}


@dataclass(frozen=True)
class Trace:
    """The span of a request, and those of its sequences by index."""

    request: Span
    sequences: dict[int, list[Span]]

    def names(self) -> dict[int, list[str]]:
        return {index: [span.name for span in spans] for index, spans in self.sequences.items()}


class Collector:
    """Received OTLP requests."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[bytes] = []
        self._arrived = threading.Condition()

    def receive(self, body: bytes) -> None:
        with self._arrived:
            self.bodies.append(body)
            self._arrived.notify_all()

    @property
    def spans(self) -> list[Span]:
        return [
            Span(message, values(resource.resource.attributes))
            for body in self.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for message in scope.spans
        ]

    def trace(self, matches: Callable[[Span], bool]) -> Trace:
        """The trace of the one request whose span matches; that span arrives last."""

        def requests() -> list[Span]:
            return [span for span in self.spans if span.message.kind == Message.SPAN_KIND_SERVER and matches(span)]

        with self._arrived:
            assert self._arrived.wait_for(requests, WAIT_SECONDS), [span.name for span in self.spans]
        [request] = requests()
        sequences: dict[int, list[Span]] = {}
        for span in self.spans:
            if span.message.parent_span_id == request.message.span_id:
                assert (span.trace_id, span.message.kind) == (request.trace_id, Message.SPAN_KIND_INTERNAL)
                sequences.setdefault(span.attributes["kserve_llm.sequence"], []).append(span)
        return Trace(request, sequences)

    def of(self, trace_id: str) -> Trace:
        return self.trace(lambda span: span.trace_id == trace_id)


@contextmanager
def collecting() -> Iterator[Collector]:
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            collector.receive(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving(endpoint: str, *flags: str, model_name: str, **variables: str) -> Iterator[InProcessServer]:
    """An in-process predictor that exports its spans to `endpoint` soon."""
    with pytest.MonkeyPatch.context() as patch:
        defaults = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        for name, value in {**defaults, **variables}.items():
            patch.setenv(name, value)
        with servers.in_process("--tracing", *flags, model_name=model_name) as server:
            yield server
            assert "Traceback" not in server.log


@dataclass(frozen=True)
class Served:
    """A predictor with tracing, and its collector."""

    server: InProcessServer
    collector: Collector
    stub: Any

    @property
    def client(self) -> httpx.Client:
        return self.server.client

    def send(self, path: str, body: dict[str, Any], trace_id: str, flags: str = "01", **more: Any) -> httpx.Response:
        headers = {"traceparent": f"00-{trace_id}-{SPAN}-{flags}", **more.pop("headers", {})}
        return self.client.post(path, json=body, headers=headers, **more)

    def flush(self) -> None:
        """Wait for the spans of one more request; those of all previous ones have arrived then."""
        last = uuid.uuid4().hex
        self.send(OPENAI, completing(1), last)
        self.collector.of(last)

    def wait_running(self, count: int) -> None:
        """Wait until `count` sequences run."""
        self.server.wait_for_metrics(num_requests_running=count)

    def line(self, name: str, value: str) -> dict[str, Any]:
        """The log line with this field; it is written after the response."""

        def matching() -> list[dict[str, Any]]:
            lines = map(json.loads, self.server.log.splitlines())
            return [line for line in lines if line.get(name) == value and "status" in line]

        self.server.wait_for(lambda: bool(matching()))
        [line] = matching()
        return line


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    flags = ["--max_num_seqs", "2", "--max_queued_requests", "2", "--enable_grpc"]
    with (
        collecting() as collector,
        serving(collector.url, *flags, model_name="traced") as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        yield Served(server, collector, service.GRPCInferenceServiceStub(channel))


@pytest.fixture
def slow(served: Served) -> Iterator[None]:
    """Slow down the model, so that a long request does not finish within the test."""
    served.server.hold.delay_seconds = 0.05
    yield
    served.server.hold.open()


@pytest.fixture
def trace_id() -> str:
    """A new trace id."""
    return uuid.uuid4().hex


def completing(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "traced", "prompt": "17+25=", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


def generating(tokens: int) -> dict[str, Any]:
    return {"text_input": "17+25=", "parameters": {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}}


MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
SAMPLING = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}


def tensor(name: str, *data: str) -> dict[str, Any]:
    inputs = [{"name": name, "datatype": "BYTES", "shape": [len(data)], "data": list(data)}]
    return {"inputs": inputs, "parameters": {**SAMPLING, "temperature": 0.0}}


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        (OPENAI, completing(3), "text_completion"),
        (OPENAI, completing(3, stream=True), "text_completion"),
        (CHAT, {"model": "traced", "messages": MESSAGES, **SAMPLING}, "chat"),
        (GENERATE, generating(3), "text_completion"),
        (f"{GENERATE}_stream", generating(3), "text_completion"),
        ("/v1/models/traced:predict", {"instances": ["17+25="], "parameters": SAMPLING}, "text_completion"),
        ("/v2/models/traced/infer", tensor("text_input", "17+25="), "text_completion"),
        ("/v2/models/traced/versions/1/infer", tensor("messages", json.dumps(MESSAGES)), "chat"),
    ],
)
def test_request_is_child_span_of_caller(
    served: Served, trace_id: str, path: str, body: dict[str, Any], operation: str
) -> None:
    assert served.send(path, body, trace_id).status_code == 200
    trace = served.collector.of(trace_id)
    span = trace.request
    assert span.message.parent_span_id.hex() == SPAN
    assert (span.name, span.status) == (f"{operation} traced", UNSET)
    prompt_tokens = served.line("trace_id", trace_id)["prompt_tokens"]
    route = path.replace("traced", "{model_name}").replace("versions/1", "versions/{model_version}")
    assert span.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": route,
        "url.scheme": "http",
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "kserve-llm",
        "gen_ai.request.model": "traced",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": prompt_tokens,
        "gen_ai.usage.output_tokens": 3,
    }
    assert trace.names() == {0: list(PHASES)}
    assert [span.attributes for span in trace.sequences[0]] == [
        {"kserve_llm.sequence": 0},
        {"kserve_llm.sequence": 0, "gen_ai.usage.input_tokens": prompt_tokens},
        {
            "kserve_llm.sequence": 0,
            "gen_ai.usage.output_tokens": 3,
            "gen_ai.response.finish_reasons": ["length"],
        },
    ]


def test_sequences_have_consecutive_phases_within_request(served: Served, trace_id: str) -> None:
    before = time.time_ns()
    assert served.send(OPENAI, completing(20, n=2, prompt=["17+25=", "1+1="]), trace_id).status_code == 200
    trace = served.collector.of(trace_id)
    assert trace.names() == {index: list(PHASES) for index in range(4)}
    assert before <= trace.request.start < trace.request.end <= time.time_ns()
    for queue, prefill, decode in trace.sequences.values():
        assert trace.request.start <= queue.start <= queue.end == prefill.start < prefill.end == decode.start
        assert decode.start < decode.end <= trace.request.end
    # Two run together; the others wait for them.
    assert max(trace.sequences[index][1].start for index in (0, 1)) < trace.sequences[2][1].start
    assert trace.request.attributes["gen_ai.response.finish_reasons"] == ["length"] * 4
    assert trace.request.attributes["gen_ai.usage.output_tokens"] == 80


def test_phases_have_same_durations_as_log(served: Served, trace_id: str) -> None:
    assert served.send(OPENAI, completing(5), trace_id).status_code == 200
    [queue, prefill, decode] = served.collector.of(trace_id).sequences[0]
    line = served.line("trace_id", trace_id)
    assert queue.seconds == pytest.approx(line["queue_seconds"], abs=1e-4)
    assert queue.seconds + prefill.seconds == pytest.approx(line["first_token_seconds"], abs=1e-4)
    assert queue.seconds + prefill.seconds + decode.seconds < line["duration_ms"] / 1000


def test_spans_contain_no_client_data(served: Served, trace_id: str) -> None:
    body = {"model": "traced", "messages": [{"role": "user", "content": PRIVATE}], **SAMPLING, "stop": [PRIVATE]}
    headers = {"x-request-id": PRIVATE, "user-agent": PRIVATE, "cookie": PRIVATE, "baggage": f"a={PRIVATE}"}
    for path, status in ((f"{CHAT}?q={PRIVATE}", 200), (f"/{PRIVATE}", 404), (f"/v2/models/{PRIVATE}/infer", 404)):
        assert served.send(path, body, trace_id, headers=headers).status_code == status
    wrong = {**body, PRIVATE: PRIVATE, "model": PRIVATE}
    assert served.send(CHAT, wrong, trace_id, headers=headers).status_code in (400, 404)
    served.flush()
    assert len([span for span in served.collector.spans if span.trace_id == trace_id]) == 4 + len(PHASES)
    assert not any(PRIVATE.encode() in body for body in served.collector.bodies)


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [""],
        [f"00-{TRACE}-{SPAN}"],
        [f"00-{TRACE}-{SPAN}-01-more"],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE.upper()}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-01" * 1000],
        [b"00-\xff\xfe-\x80-01"],
        ["'; DROP TABLE spans; --"],
        [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE[::-1]}-{SPAN}-01"],
    ],
)
def test_invalid_traceparent_is_ignored(served: Served, trace_id: str, sent: list[Any]) -> None:
    headers = [("x-request-id", trace_id), *(("traceparent", value) for value in sent)]
    assert served.client.post(OPENAI, json=completing(2), headers=headers).status_code == 200
    line = served.line("request_id", trace_id)
    trace = served.collector.of(line["trace_id"])
    assert line["trace_id"] not in (TRACE, TRACE[::-1])
    assert trace.request.message.parent_span_id == b""
    assert trace.names() == {0: list(PHASES)}


def test_tracestate_is_propagated_if_valid(served: Served, trace_id: str) -> None:
    assert served.send(OPENAI, completing(1), trace_id, headers={"tracestate": "vendor=1,other=2"}).status_code == 200
    assert served.collector.of(trace_id).request.message.trace_state == "vendor=1,other=2"
    other = uuid.uuid4().hex
    assert served.send(OPENAI, completing(1), other, headers={"tracestate": "vendor=1,marmalade"}).status_code == 200
    assert served.collector.of(other).request.message.trace_state == ""
    assert "marmalade" not in served.server.log


def test_unsampled_traceparent_is_not_exported(served: Served, trace_id: str) -> None:
    assert served.send(OPENAI, completing(1), trace_id, flags="00").status_code == 200
    assert served.line("trace_id", trace_id)["status"] == 200
    served.flush()
    assert trace_id not in {span.trace_id for span in served.collector.spans}


def test_probes_are_not_exported(served: Served, trace_id: str) -> None:
    headers = {"traceparent": f"00-{trace_id}-{SPAN}-01"}
    for path in ("/", "/health", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/traced/ready"):
        assert served.client.get(path, headers=headers).status_code == 200
    assert served.client.get("/v2", headers=headers).status_code == 200
    assert served.collector.of(trace_id).request.name == "GET /v2"


@pytest.mark.parametrize(
    ("method", "path", "body", "name", "status", "error"),
    [
        ("POST", OPENAI, completing(-2), f"POST {OPENAI}", 400, "InvalidRequest"),
        ("POST", "/v2/models/other/generate", {}, "POST /v2/models/{model_name}/generate", 404, "NotFound"),
        ("POST", "/nowhere", {}, "POST", 404, None),
        ("PROPFIND", "/nowhere", {}, "HTTP", 404, None),
        ("POST", OPENAI, completing(2, min_tokens=3), "text_completion traced", 400, "InvalidRequest"),
        ("POST", OPENAI, completing(9, n=5), "text_completion traced", 400, "InvalidRequest"),
    ],
)
def test_rejected_request_is_not_an_error_span(
    served: Served, trace_id: str, method: str, path: str, body: Any, name: str, status: int, error: str | None
) -> None:
    headers = {"traceparent": f"00-{trace_id}-{SPAN}-01"}
    assert served.client.request(method, path, json=body, headers=headers).status_code == status
    trace = served.collector.of(trace_id)
    assert (trace.request.name, trace.request.status, trace.sequences) == (name, UNSET, {})
    assert trace.request.attributes["http.response.status_code"] == status
    assert trace.request.attributes.get("error.type") == error
    assert trace.request.attributes["http.request.method"] == ("POST" if method == "POST" else "_OTHER")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_timed_out_request_is_error_span_with_failed_phase(served: Served, trace_id: str, stream: bool) -> None:
    late = {"x-request-timeout-seconds": "0.4"}
    answer = served.send(OPENAI, completing(1000, n=4, stream=stream), trace_id, headers=late)
    assert answer.status_code == (200 if stream else 504)
    trace = served.collector.of(trace_id)
    assert trace.request.status == ERROR
    assert trace.request.attributes["http.response.status_code"] == answer.status_code
    assert trace.request.attributes["error.type"] == "DeadlineExceeded"
    assert trace.request.attributes["gen_ai.response.finish_reasons"] == ["deadline"] * 4
    # Two of them never ran.
    assert (trace.names()[2], trace.names()[3], len(trace.sequences)) == (["queue"], ["queue"], 4)
    for spans in trace.sequences.values():
        assert [span.status for span in spans] == [UNSET] * (len(spans) - 1) + [ERROR]
        assert spans[-1].attributes["gen_ai.response.finish_reasons"] == ["deadline"]


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_client_is_not_an_error_span(served: Served, trace_id: str, stream: bool) -> None:
    body = json.dumps(completing(1000, stream=stream))
    head = (
        f"POST {OPENAI} HTTP/1.1\r\nHost: here\r\nTraceparent: 00-{trace_id}-{SPAN}-01\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection((served.client.base_url.host, served.client.base_url.port or 0)) as connection:
        served.wait_running(0)
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        served.wait_running(1)
    trace = served.collector.of(trace_id)
    assert (trace.request.name, trace.request.status) == ("text_completion traced", UNSET)
    assert trace.request.attributes["http.response.status_code"] == request_record.CLIENT_GONE
    assert trace.request.attributes["gen_ai.response.finish_reasons"] == ["cancelled"]
    # It ran; whether it had a token is a matter of time.
    assert trace.names()[0][:2] == ["queue", "prefill"]
    assert {span.status for span in trace.sequences[0]} == {UNSET}


@pytest.mark.usefixtures("slow")
def test_overloaded_request_has_no_sequences(served: Served, trace_id: str) -> None:
    with served.client.stream("POST", OPENAI, json=completing(1000, n=4, stream=True)) as running:
        lines = running.iter_lines()
        next(lines)
        assert served.send(OPENAI, completing(1), trace_id).status_code == 429
    trace = served.collector.of(trace_id)
    assert (trace.request.name, trace.request.status, trace.sequences) == ("text_completion traced", UNSET, {})
    assert trace.request.attributes["error.type"] == "Overloaded"


# gRPC


def inferring(tokens: int, **fields: Any) -> Any:
    inputs = [
        {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"17+25="]}},
    ]
    parameters = {
        "max_tokens": messages.InferParameter(int64_param=tokens),
        "ignore_eos": messages.InferParameter(bool_param=True),
    }
    return messages.ModelInferRequest(**{"model_name": "traced", "inputs": inputs, "parameters": parameters} | fields)


def test_grpc_call_is_child_span_of_caller(served: Served, trace_id: str) -> None:
    served.stub.ModelInfer(inferring(3), metadata=[("traceparent", f"00-{trace_id}-{SPAN}-01")])
    trace = served.collector.of(trace_id)
    assert trace.request.message.parent_span_id.hex() == SPAN
    assert (trace.request.name, trace.request.status) == ("text_completion traced", UNSET)
    assert trace.request.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "inference.GRPCInferenceService/ModelInfer",
        "rpc.response.status_code": "OK",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "kserve-llm",
        "gen_ai.request.model": "traced",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
    }
    assert trace.names() == {0: list(PHASES)}
    assert trace.request.start <= trace.sequences[0][0].start
    assert trace.sequences[0][-1].end <= trace.request.end
    assert served.line("trace_id", trace_id)["protocol"] == "grpc"


def test_failed_grpc_call_has_status_code(served: Served, trace_id: str) -> None:
    metadata = [("traceparent", f"00-{trace_id}-{SPAN}-01")]
    with pytest.raises(grpc.RpcError):
        served.stub.ModelInfer(inferring(3, model_name="other"), metadata=metadata)
    trace = served.collector.of(trace_id)
    assert (trace.request.name, trace.request.status) == ("inference.GRPCInferenceService/ModelInfer", UNSET)
    assert trace.request.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert trace.request.attributes["error.type"] == "NotFound"


@pytest.mark.usefixtures("slow")
def test_cancelled_grpc_call_is_not_an_error_span(served: Served, trace_id: str) -> None:
    served.wait_running(0)
    call = served.stub.ModelInfer.future(inferring(1000), metadata=[("traceparent", f"00-{trace_id}-{SPAN}-01")])
    served.wait_running(1)
    assert call.cancel()
    trace = served.collector.of(trace_id)
    assert (trace.request.status, trace.request.attributes["rpc.response.status_code"]) == (UNSET, "CANCELLED")
    assert trace.request.attributes["gen_ai.response.finish_reasons"] == ["cancelled"]


# Shutdown and unavailable collectors


@pytest.mark.slow
def test_process_shutdown_exports_last_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector, ThreadPoolExecutor() as threads:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        # No span is exported before the shutdown.
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
        with servers.own_process(tmp_path, "--tracing") as (server, orders):
            orders.give("slow")
            started = threading.Event()

            def read() -> None:
                body = {**completing(1000, stream=True), "model": server.model_name}
                headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
                with server.client.stream("POST", OPENAI, json=body, headers=headers) as response:
                    for _ in response.iter_lines():
                        started.set()

            reading = threads.submit(read)
            assert started.wait(WAIT_SECONDS)
            assert collector.bodies == []
            for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                server.process.send_signal(sent)
            reading.result(WAIT_SECONDS)
            assert server.process.wait(WAIT_SECONDS) == 0
            assert "Traceback" not in server.log
        trace = collector.of(TRACE)
    assert (trace.request.status, trace.request.attributes["error.type"]) == (ERROR, "EngineStopped")
    assert trace.request.attributes["gen_ai.response.finish_reasons"] == ["failed"]
    assert [span.status for span in trace.sequences[0]] == [UNSET, UNSET, ERROR]


@pytest.mark.parametrize("answers", [False, True], ids=["refuses", "never-answers"])
def test_unavailable_collector_affects_neither_requests_nor_shutdown(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_module, "CLOSE_SECONDS", 0.2)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if answers:
            port.listen()
        endpoint = f"http://127.0.0.1:{port.getsockname()[1]}"
        limits = {
            "OTEL_EXPORTER_OTLP_TIMEOUT": "3600",
            "OTEL_BSP_MAX_QUEUE_SIZE": "8",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8",
        }
        with serving(endpoint, model_name=f"unexported-{answers}", **limits) as server:
            body = {**completing(2), "model": server.model_name}
            # More requests than the queue holds.
            assert {server.client.post(OPENAI, json=body).status_code for _ in range(12)} == {200}


# Off, or not installed


@pytest.mark.parametrize(
    ("flags", "loaded"),
    [
        pytest.param([], [], id="off"),
        pytest.param(
            ["--tracing"],
            ["predictor.observability.tracing", "opentelemetry.sdk", "opentelemetry.exporter"],
            id="on",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_opentelemetry_is_imported_only_if_enabled(flags: list[str], loaded: list[str]) -> None:
    program = ROOT / "tests" / "programs" / "tracing_modules.py"
    done = subprocess.run([sys.executable, program, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == loaded


def test_missing_opentelemetry_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "predictor.observability.tracing")
    monkeypatch.delattr("predictor.observability.tracing")
    with pytest.raises(InvalidSettings, match=rf"{module} is not installed. Run pip install 'kserve-llm\[tracing\]'"):
        lifecycle.create_tracing(settings.read(["--tracing"]))


# `Tracing` without a server


@contextmanager
def exporting(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Iterator[tuple[Tracing, Collector]]:
    """A `Tracing` and its collector, which has received all spans at the end."""
    with collecting() as collector:
        for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, **variables}.items():
            monkeypatch.setenv(name, value)
        tracing = Tracing("traced")
        yield tracing, collector
        tracing.close()


def scope(*headers: tuple[str, str]) -> dict[str, Any]:
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    return {"type": "http", "method": "POST", "scheme": "http", "path": OPENAI, "headers": encoded}


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (200, None, UNSET),
        (200, "GenerationFailed", ERROR),
        (400, "InvalidRequest", UNSET),
        (429, "Overloaded", UNSET),
        (request_record.CLIENT_GONE, None, UNSET),
        (request_record.CLIENT_GONE, "ClientDisconnect", UNSET),
        (500, None, ERROR),
        (500, "GenerationFailed", ERROR),
        (503, "ModelNotReady", ERROR),
        (504, "DeadlineExceeded", ERROR),
    ],
)
def test_export_http_status_decides_error(
    monkeypatch: pytest.MonkeyPatch, status: int, error: str | None, expected: int
) -> None:
    with exporting(monkeypatch) as (tracing, collector):
        tracing.export_http(scope(), status, time.monotonic(), RequestRecord(error=error))
    [span] = collector.spans
    assert (span.status, span.attributes.get("error.type")) == (expected, error)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("eos_token", UNSET), ("stop_sequence", UNSET), ("cancelled", UNSET), ("deadline", ERROR), ("failed", ERROR)],
)
@pytest.mark.parametrize("reached", PHASES)
def test_export_http_sequence_ends_in_reached_phase(
    monkeypatch: pytest.MonkeyPatch, reached: str, outcome: str, status: int
) -> None:
    admitted, wall = time.monotonic() - 4, time.time() - 4
    queue, first = (1.0 if reached != "queue" else None), (2.0 if reached == "decode" else None)
    record = RequestRecord(
        finished=[
            FinishedSequence(
                index=0,
                outcome=outcome,
                prompt_tokens=7,
                completion_tokens=5,
                admitted_at=admitted,
                total_seconds=3.5,
                queue_seconds=queue,
                first_token_seconds=first,
            )
        ]
    )
    with exporting(monkeypatch) as (tracing, collector):
        tracing.export_http(scope(), 200, admitted - 1, record)
    *spans, request = collector.spans
    assert [span.name for span in spans] == list(PHASES[: PHASES.index(reached) + 1])
    assert [span.status for span in spans] == [UNSET] * (len(spans) - 1) + [status]
    assert [span.attributes.get("gen_ai.response.finish_reasons") for span in spans] == [None] * (len(spans) - 1) + [
        [outcome]
    ]
    starts = [span.start / 1e9 - wall for span in (request, *spans)]
    assert starts == pytest.approx([-1, 0, 1, 2][: len(starts)], abs=0.1)
    assert [span.end for span in spans[:-1]] == [span.start for span in spans[1:]]
    assert spans[-1].seconds == pytest.approx({"queue": 3.5, "prefill": 2.5, "decode": 1.5}[reached])
    assert record.trace_id == request.trace_id


def test_export_http_orders_sequences_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    reasons = {1: "length", 2: "eos_token", 0: "stop_sequence"}
    record = RequestRecord(finished=[finished(index, outcome, began) for index, outcome in reasons.items()])
    with exporting(monkeypatch) as (tracing, collector):
        tracing.export_http(scope(), 200, began, record)
    assert collector.spans[-1].attributes["gen_ai.response.finish_reasons"] == ["stop_sequence", "length", "eos_token"]
    assert [span.attributes["kserve_llm.sequence"] for span in collector.spans[:-1]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {"service.name": "kserve-llm"}),
        ({"OTEL_SERVICE_NAME": "mine"}, {"service.name": "mine"}),
        (
            {"OTEL_RESOURCE_ATTRIBUTES": "service.name=theirs,deployment.environment.name=prod"},
            {"service.name": "theirs", "deployment.environment.name": "prod"},
        ),
    ],
)
def test_resource_follows_otel_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: dict[str, str]
) -> None:
    with exporting(monkeypatch, **variables) as (tracing, collector):
        tracing.export_http(scope(), 200, time.monotonic(), RequestRecord())
    [span] = collector.spans
    assert span.resource.items() >= expected.items()
    assert "service.version" in span.resource


def test_export_http_with_sampler_off_exports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    record = RequestRecord(finished=[finished(0, "length", time.monotonic())])
    with exporting(monkeypatch, OTEL_TRACES_SAMPLER="always_off") as (tracing, collector):
        tracing.export_http(scope(("traceparent", f"00-{TRACE}-{SPAN}-01")), 200, time.monotonic(), record)
    assert (collector.spans, record.trace_id) == ([], TRACE)


def test_invalid_otel_variable_is_invalid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "-1")
    with pytest.raises(InvalidSettings, match=r"OTEL_.*schedule_delay_millis must be positive"):
        Tracing("traced")


def test_disabled_sdk_exports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    record = RequestRecord()
    with exporting(monkeypatch, OTEL_SDK_DISABLED="true") as (tracing, collector):
        tracing.export_http(scope(), 200, time.monotonic(), record)
    assert (collector.spans, record.trace_id) == ([], None)
