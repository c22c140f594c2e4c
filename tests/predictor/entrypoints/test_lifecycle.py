"""Overload, deadlines, leaving clients, keys and limits of a real predictor process, and how it ends while it works."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from devtools import processes
from devtools.processes import ROOT

KEY, OTHER_KEY = "alices-key-0123456789", "bobs-key-9876543210"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
PRIVATE = "xylophone"
WAIT_SECONDS = 120
OPENAI, GENERATE, INFER = "/v1/completions", "/v2/models/demo/generate", "/v2/models/demo/infer"
GENERATE_STREAM = f"{GENERATE}_stream"


@dataclass(frozen=True)
class Server:
    """A predictor process that is ready, a client for it, and its log."""

    predictor: processes.Predictor
    client: httpx.Client
    log_file: Path
    keys_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def metric(self, name: str, **labels: str) -> float:
        response = self.client.get("/metrics")
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                if sample.name == f"kserve_llm_{name}" and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def until(self, **gauges: float) -> None:
        """Wait until the gauges have these values."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            found = {name: self.metric(name) for name in gauges}
            if found == gauges:
                return
            time.sleep(0.05)
        raise AssertionError(f"still {found}")

    def until_idle(self) -> None:
        self.until(num_requests_running=0, num_requests_waiting=0, kv_cache_usage_perc=0)

    def becomes(self, status: int, path: str, **asked: Any) -> httpx.Response:
        """The first answer with this status."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            response = self.client.request("POST" if "json" in asked else "GET", path, **asked)
            if response.status_code == status:
                return response
            time.sleep(0.02)
        raise AssertionError(f"{path} never answered {status}")


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    keys, log = folder / "keys", folder / "log"
    keys.write_text(f"alice:{KEY}\n")
    arguments = ["--model_dir", str(ROOT / "demo" / "model"), "--dtype", "float32", *flags]
    try:
        with (
            log.open("w") as stderr,
            processes.predictor(arguments, model_name="demo", port=processes.free_port(), stderr=stderr) as predictor,
            httpx.Client(base_url=predictor.url, timeout=120, trust_env=False, headers=AUTHORIZED) as client,
        ):
            yield Server(predictor, client, log, keys)
    finally:
        print(log.read_text())  # noqa: T201, shown by pytest where a test failed
    assert "Traceback" not in log.read_text()


def asking(path: str, tokens: int, prompt: str = "1+1=", **more: Any) -> dict[str, Any]:
    """A request's body: so many greedy tokens, no less."""
    sampling = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    if path == OPENAI:
        return {"model": "demo", "prompt": prompt, **sampling, **more}
    if path == INFER:
        return {
            "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [prompt]}],
            "parameters": sampling,
        }
    return {"text_input": prompt, "parameters": {**sampling, "details": path == GENERATE_STREAM}}


@dataclass
class Streamed:
    """What a stream said: its text, its finish reason, and its last event."""

    text: str = ""
    finish_reason: str | None = None
    last: Any = None
    began: threading.Event = field(default_factory=threading.Event)

    def read(self, client: httpx.Client, path: str, tokens: int, **asked: Any) -> "Streamed":
        more = {"stream": True} if path == OPENAI else {}
        with client.stream("POST", path, json=asking(path, tokens, **more), **asked) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self._hear(line.removeprefix("data: "))
        return self

    def _hear(self, event: str) -> None:
        self.last = event if event == "[DONE]" else json.loads(event)
        self.began.set()
        if not isinstance(self.last, dict) or "error" in self.last:
            return
        for said in self.last.get("choices", [self.last]):
            self.text += said.get("text", said.get("text_output", ""))
            self.finish_reason = said.get("details", said).get("finish_reason") or self.finish_reason


# One process for all that does not end it


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lifecycle")
    flags = ["--max_num_seqs", "2", "--max_queued_requests", "2", "--max_request_bytes", "5000", "--log_format", "json"]
    with serving(folder, *flags, "--api_keys_file", str(folder / "keys")) as running:
        yield running


def test_a_request_beyond_those_that_run_and_wait_is_refused_while_they_go_on(server: Server) -> None:
    rejected = server.metric("request_rejected_total")
    with ExitStack() as stack:
        for path in (OPENAI, GENERATE_STREAM, OPENAI, GENERATE_STREAM):
            more = {"stream": True} if path == OPENAI else {}
            body = asking(path, 900, **more)
            response = stack.enter_context(server.client.stream("POST", path, json=body))
            assert response.status_code == 200
        server.until(num_requests_running=2, num_requests_waiting=2)
        refusals = {path: server.client.post(path, json=asking(path, 900)) for path in (OPENAI, INFER, GENERATE)}
        assert server.metric("num_requests_running") == 2
    assert {refusal.status_code for refusal in refusals.values()} == {429}
    assert all(int(refusal.headers["retry-after"]) > 0 for refusal in refusals.values())
    error = refusals[OPENAI].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "is busy" in error["message"]
    for path in (INFER, GENERATE):
        assert refusals[path].json() == {"error": error["message"]}
    assert server.metric("request_rejected_total") == rejected + 3
    server.until_idle()
    assert server.client.post(OPENAI, json=asking(OPENAI, 1)).status_code == 200


def test_more_at_once_than_may_run_and_wait_is_no_overload(server: Server) -> None:
    refusal = server.client.post(OPENAI, json=asking(OPENAI, 1, n=5))
    assert refusal.status_code == 400
    assert "ask for fewer" in refusal.json()["error"]["message"]


def test_a_deadline_of_the_client_ends_a_request(server: Server) -> None:
    hurry = {"x-request-timeout-seconds": "0.6"}
    ended = server.metric("request_finished_total", finished_reason="deadline")
    whole = server.client.post(OPENAI, json=asking(OPENAI, 1000, n=2), headers=hurry)
    assert whole.status_code == 504
    error = whole.json()["error"]
    assert (error["type"], "timed out" in error["message"]) == ("timeout", True)
    partial = error["partial"]
    assert len(partial) == 2
    full = server.client.post(OPENAI, json=asking(OPENAI, 1000)).json()["choices"][0]["text"]
    assert all(full.startswith(text) and len(full) > len(text) for text in partial)
    for path in (INFER, GENERATE):
        late = server.client.post(path, json=asking(path, 1000), headers=hurry)
        assert (late.status_code, "timed out" in late.json()["error"]) == (504, True)
    for path in (OPENAI, GENERATE_STREAM):
        streamed = Streamed().read(server.client, path, 1000, headers=hurry)
        assert (full.startswith(streamed.text), streamed.finish_reason) == (True, None)
        assert "timed out" in json.dumps(streamed.last["error"])
    server.until_idle()
    assert server.metric("request_finished_total", finished_reason="deadline") == ended + 6


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", "inf"])
def test_a_deadline_that_is_none_is_refused(server: Server, seconds: str) -> None:
    refusal = server.client.post(OPENAI, json=asking(OPENAI, 1), headers={"x-request-timeout-seconds": seconds})
    assert refusal.status_code == 400
    assert "x-request-timeout-seconds" in refusal.json()["error"]["message"]


@pytest.mark.parametrize("path", [OPENAI, GENERATE_STREAM])
def test_a_client_that_leaves_a_stream_frees_its_place(server: Server, path: str) -> None:
    server.until_idle()
    steps = server.metric("engine_steps")
    cancelled = server.metric("request_finished_total", finished_reason="cancelled")
    body = asking(path, 900, **({"stream": True} if path == OPENAI else {}))
    with server.client.stream("POST", path, json=body) as response:
        assert next(response.iter_lines()).startswith("data: ")
    server.until_idle()
    assert server.metric("request_finished_total", finished_reason="cancelled") == cancelled + 1
    assert server.metric("engine_steps") - steps < 800


@pytest.mark.parametrize("path", [OPENAI, GENERATE, INFER])
def test_a_client_that_does_not_wait_for_its_answer_frees_its_place(server: Server, path: str) -> None:
    server.until_idle()
    steps = server.metric("engine_steps")
    cancelled = server.metric("request_finished_total", finished_reason="cancelled")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            server.predictor.url + path, json=asking(path, 1000), headers=AUTHORIZED, timeout=0.4, trust_env=False
        )
    server.until_idle()
    assert server.metric("request_finished_total", finished_reason="cancelled") == cancelled + 1
    assert server.metric("engine_steps") - steps < 800


def test_only_who_brings_a_key_is_answered(server: Server) -> None:
    with httpx.Client(base_url=server.predictor.url, timeout=60, trust_env=False) as stranger:
        for path in (OPENAI, INFER, GENERATE, "/v1/models/demo:predict"):
            refusal = stranger.post(path, json=asking(OPENAI, 1))
            assert (refusal.status_code, refusal.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/", "/health", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/demo/ready"):
            assert stranger.get(path).status_code == 200, path
        assert stranger.get("/v1/models").status_code == 401
    assert server.client.post(OPENAI, json=asking(OPENAI, 1), headers={"x-request-id": "by-alice"}).status_code == 200
    [line] = lines_of(server, "by-alice")
    assert line["key"] == "alice"
    assert KEY not in server.log


def test_keys_that_change_are_read_again(server: Server) -> None:
    bob = {"Authorization": f"Bearer {OTHER_KEY}"}
    assert server.client.get("/v1/models", headers=bob).status_code == 401
    server.keys_file.write_text(f"alice:{KEY}\nbob:{OTHER_KEY}\n")
    server.becomes(200, "/v1/models", headers=bob)
    server.keys_file.write_text(f"alice:{KEY}\n")
    server.becomes(401, "/v1/models", headers=bob)
    assert server.client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("action", ["load", "unload"])
def test_models_are_neither_loaded_nor_unloaded_on_request(server: Server, action: str) -> None:
    refusal = server.client.post(f"/v2/repository/models/demo/{action}")
    assert (refusal.status_code, action in refusal.json()["error"]) == (403, True)
    assert server.client.get("/v2/models/demo/ready").status_code == 200


def test_a_body_that_is_too_large_is_refused(server: Server) -> None:
    for path in (OPENAI, INFER, GENERATE):
        refusal = server.client.post(path, json=asking(path, 1, prompt="1" * 5000))
        assert refusal.status_code == 413
        assert "--max_request_bytes" in refusal.text
    assert server.client.post(OPENAI, json=asking(OPENAI, 1)).status_code == 200


def lines_of(server: Server, request_id: str) -> list[dict[str, Any]]:
    """The log's lines for a request; the last of them is written after the answer."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        lines = [json.loads(line) for line in server.log.splitlines()]
        if found := [line for line in lines if line.get("request_id") == request_id]:
            return found
        time.sleep(0.05)
    raise AssertionError(f"the log has no line for {request_id}")


def test_a_request_has_one_line_in_the_log_and_its_prompt_is_not_in_it(server: Server) -> None:
    answer = server.client.post(
        OPENAI, json=asking(OPENAI, 3, prompt=PRIVATE), headers={"x-request-id": "mine", "x-secret": PRIVATE}
    )
    assert answer.headers["x-request-id"] == "mine"
    [line] = lines_of(server, "mine")
    assert (line["method"], line["path"], line["status"], line["protocol"]) == ("POST", OPENAI, 200, "openai")
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert (line["completion_tokens"], line["sequences"], line["finish_reasons"]) == (3, 1, ["length"])
    assert {"duration_ms", "queue_seconds", "first_token_seconds"} <= line.keys()
    assert PRIVATE not in server.log
    assert "/metrics" not in server.log
    made = server.client.get("/v1/models").headers["x-request-id"]
    assert [line["status"] for line in lines_of(server, made)] == [200]


# Told otherwise


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--enable_admin_routes", "--log_prompts", "--request_timeout_seconds", "0.6"]
    with serving(tmp_path_factory.mktemp("open"), *flags) as running:
        yield running


def test_the_servers_own_deadline_ends_a_request(open_server: Server) -> None:
    patient = {"x-request-timeout-seconds": "1000"}
    late = open_server.client.post(OPENAI, json=asking(OPENAI, 1000, n=4), headers=patient)
    assert (late.status_code, late.json()["error"]["type"]) == (504, "timeout")
    assert len(late.json()["error"]["partial"]) == 4
    streamed = Streamed().read(open_server.client, GENERATE_STREAM, 1000)
    assert (streamed.finish_reason, "timed out" in streamed.last["error"]) == (None, True)
    open_server.until_idle()


def test_prompts_are_in_the_log_where_that_is_wanted(open_server: Server) -> None:
    open_server.client.post(OPENAI, json=asking(OPENAI, 1, prompt=PRIVATE))
    assert PRIVATE in open_server.log


def test_models_are_unloaded_on_request_where_that_is_wanted(open_server: Server) -> None:
    assert open_server.client.post("/v2/repository/models/demo/unload").status_code == 200


# The end


PATHS = [OPENAI, GENERATE_STREAM] * 4


@contextmanager
def streaming(server: Server, tokens: int) -> Iterator[list[Streamed]]:
    """Eight streams in the middle of their work; read to their end when this ends."""
    streams = [Streamed() for _ in PATHS]
    with ThreadPoolExecutor(len(PATHS)) as threads, ExitStack() as stack:
        readers = []
        for stream, path in zip(streams, PATHS, strict=True):
            client = httpx.Client(base_url=server.predictor.url, timeout=120, trust_env=False)
            readers.append(threads.submit(stream.read, stack.enter_context(client), path, tokens))
        for stream, reader in zip(streams, readers, strict=True):
            while not stream.began.wait(0.1):
                assert not reader.done(), reader.exception()
        yield streams
        for reader in readers:
            reader.result(WAIT_SECONDS)


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_streams_end_and_takes_nothing_new(sent: signal.Signals, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        whole = server.client.post(OPENAI, json=asking(OPENAI, 600)).json()["choices"][0]["text"]
        with streaming(server, 600) as streams:
            server.predictor.process.send_signal(sent)
            ready = server.becomes(503, "/v2/models/demo/ready")
            assert (ready.json()["error"], "retry-after" in ready.headers) == (
                "Model demo is not ready: shutting down.",
                True,
            )
            assert server.client.get("/v2/health/live").status_code == 200
            for path in (OPENAI, INFER, GENERATE):
                refusal = server.client.post(path, json=asking(path, 1))
                assert (refusal.status_code, int(refusal.headers["retry-after"]) > 0) == (503, True)
                assert "shutting down" in refusal.text
        assert [stream.text == whole for stream in streams] == [True] * 8
        assert {stream.finish_reason for stream in streams} == {"length"}
        assert {stream.last for stream in streams[::2]} == {"[DONE]"}
        assert server.predictor.process.wait(WAIT_SECONDS) == 0


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param("by the drain limit", marks=pytest.mark.slow),
        pytest.param("by a second signal", marks=pytest.mark.slow),
        "by many signals at once",
    ],
)
def test_streams_that_are_cut_off_say_so(cut: str, tmp_path: Path) -> None:
    flags = ["--shutdown_grace_seconds", "1"] if cut == "by the drain limit" else []
    with serving(tmp_path, *flags) as server:
        with streaming(server, 1000) as streams:
            server.predictor.process.send_signal(signal.SIGTERM)
            if cut == "by a second signal":
                server.becomes(503, "/v2/health/ready")
                server.predictor.process.send_signal(signal.SIGTERM)
            elif cut == "by many signals at once":
                for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                    server.predictor.process.send_signal(sent)
        for stream, path in zip(streams, PATHS, strict=True):
            error = stream.last["error"]
            message = error["message"] if path == OPENAI else error
            assert message == "The server stopped before the completion finished. Retry later."
            assert stream.finish_reason is None
        assert server.predictor.process.wait(WAIT_SECONDS) == 0
    assert "aborting running requests" in server.log


@pytest.mark.slow
def test_signals_that_come_one_upon_the_other_end_an_idle_server(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        for sent in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            server.predictor.process.send_signal(sent)
            time.sleep(0.01)
        assert server.predictor.process.wait(WAIT_SECONDS) == 0
