"""Requests that arrive while the model loads, with `--hold_while_loading`; the test decides when the load goes on."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from devtools import tiny_poolers
from devtools.paths import DEMO_MODEL
from predictor.entrypoints.http import streaming
from predictor.errors import StartupError
from predictor.generation.service import Phase
from predictor.models import loader
from tests.predictor.proxies import IdleTimeoutProxy
from tests.predictor.servers import DEMO_FLAGS, HANG_SECONDS, Server, ThreadServer

BODY: dict[str, Any] = {"model": "held", "prompt": "1+1=", "max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
GENERATE_BODY: dict[str, Any] = {
    "text_input": "1+1=",
    "parameters": {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True},
}
WHOLE = [("/v1/completions", BODY), ("/v2/models/held/generate", GENERATE_BODY)]
STREAMS = [("/v1/completions", {**BODY, "stream": True}), ("/v2/models/held/generate_stream", GENERATE_BODY)]
HOLD = ("--hold_while_loading", str(HANG_SECONDS))
SMALL = ("--max_num_seqs", "4", "--max_queued_requests", "12")
PLACES = 16


class Loading(ThreadServer):
    """A predictor whose load waits for the test."""

    def __init__(self, *flags: str) -> None:
        super().__init__(*DEMO_FLAGS, "--served_model_name", "held", *flags)
        self._orders: queue.SimpleQueue[float | Exception | None] = queue.SimpleQueue()
        self.client = httpx.Client(base_url=self.url, timeout=HANG_SECONDS, trust_env=False)
        self.http = Server(self.url, "held", self.client, read_log=str)

    def load(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run in place of the loader: wait for the test's orders, then load."""
        while (order := self._orders.get(timeout=HANG_SECONDS)) is not None:
            if isinstance(order, Exception):
                raise order
            options["report_weights"](order)
        return original(*args, **options)

    def report(self, fraction: float) -> None:
        """Report a fraction of the weights."""
        self._orders.put(fraction)

    def go_on(self, error: Exception | None = None) -> None:
        """Let the load run, or fail."""
        self._orders.put(error)

    def wait_for_held(self, number: int) -> None:
        """Wait until this many sequences are held."""
        self.http.wait_for_metrics(num_requests_waiting=number)


@contextmanager
def loading(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Iterator[Loading]:
    """A server in the phase of loading weights."""
    server, original = Loading(*flags), loader.load
    monkeypatch.setattr(loader, "load", lambda *args, **options: server.load(original, *args, **options))
    with server.running():
        try:
            server.http.wait_for_status(200, "/v2/health/live")
            server.http.wait_for(lambda: server.service.phase is Phase.LOADING)
            yield server
        finally:
            server.go_on(StartupError("The test is over."))
            server.client.close()


class Held:
    """A request in a thread: its status, body and, of a stream, comments."""

    def __init__(self, threads: ThreadPoolExecutor, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        self.comments: list[str] = []
        self.status = 0
        self._changed = threading.Condition()
        self.text: Future[str] = threads.submit(self._read, client, path, body)

    def _read(self, client: httpx.Client, path: str, body: dict[str, Any]) -> str:
        text = ""
        with client.stream("POST", path, json=body) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if not line.startswith(":"):
                    text += line + "\n"
                    continue
                with self._changed:
                    self.comments.append(line.removeprefix(": "))
                    self._changed.notify_all()
        return text

    def wait_for_comments(self, number: int) -> None:
        """Wait until a number of comments have arrived."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.comments) >= number, timeout=HANG_SECONDS)


def generated(text: str) -> str:
    """The text of a response of any of the routes."""
    parts = ""
    for line in text.splitlines():
        data = line.removeprefix("data: ")
        if data and data != "[DONE]":
            event = json.loads(data)
            assert "error" not in event, event
            parts += event["choices"][0]["text"] if "choices" in event else event["text_output"]
    return parts


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2 * PLACES) as pool:
        yield pool


def test_hold_answers_all_once_the_model_is_loaded_and_rejects_more(
    monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    monkeypatch.setattr(streaming, "COMMENT_SECONDS", 0.02)
    saved = tmp_path / "time"
    saved.write_text(json.dumps({"snapshot": str(DEMO_MODEL), "seconds": 1000}))
    with loading(monkeypatch, *HOLD, *SMALL, "--load_time_file", str(saved)) as server:
        proxy = IdleTimeoutProxy(server.url)
        with (
            proxy.running() as url,
            httpx.Client(base_url=url, timeout=HANG_SECONDS, trust_env=False) as client,
        ):
            held = [Held(threads, server.client, *WHOLE[index % 2]) for index in range(PLACES // 2 - 1)]
            streams = [Held(threads, client, *STREAMS[index % 2]) for index in range(PLACES // 2 - 1)]
            cut = Held(threads, client, *WHOLE[0])
            with server.client.stream("POST", STREAMS[0][0], json=STREAMS[0][1]) as leaving:
                lines = leaving.iter_lines()
                assert next(lines) == ": loading weights"
                server.wait_for_held(PLACES)
                for path, body in (*WHOLE, *STREAMS):
                    rejected = server.client.post(path, json=body)
                    assert rejected.status_code == 503
                    assert f"{PLACES} sequences at most wait for it. Retry later." in rejected.text
                    assert 900 < int(rejected.headers["retry-after"]) <= 1000
            server.wait_for_held(PLACES - 1)
            for _ in range(3):
                for stream in streams:
                    stream.wait_for_comments(len(stream.comments) + 1)
                proxy.tick()
            with pytest.raises(httpx.TransportError):
                cut.text.result(HANG_SECONDS)
            server.wait_for_held(PLACES - 2)
            server.report(0.401)
            server.http.wait_for(lambda: all(stream.comments[-1] == "loading weights, 40 %" for stream in streams))
            server.go_on()
            texts = {generated(request.text.result(HANG_SECONDS)) for request in (*held, *streams)}
            assert {request.status for request in (*held, *streams)} == {200}
        assert server.client.get("/v2/health/ready").status_code == 200
        [text] = texts
        assert text == generated(server.client.post("/v1/completions", json=BODY).text)
        assert json.loads(saved.read_text())["seconds"] < 1000


def test_hold_that_ends_with_a_failed_load_answers_all_with_the_error(
    monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor
) -> None:
    with loading(monkeypatch, *HOLD) as server:
        requests = [Held(threads, server.client, *WHOLE[index % 2]) for index in range(8)]
        streams = [Held(threads, server.client, *STREAMS[index % 2]) for index in range(8)]
        for stream in streams:
            stream.wait_for_comments(1)
        server.wait_for_held(16)
        server.go_on(StartupError("The weights are broken."))
        for request in (*requests, *streams):
            assert "Model held could not be loaded: The weights are broken." in request.text.result(HANG_SECONDS)
        assert {request.status for request in requests} == {503}
        assert {stream.status for stream in streams} == {200}
        server.join()
        assert str(server.error) == "The weights are broken."


def test_hold_that_ends_with_sigterm_answers_503(monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor) -> None:
    with loading(monkeypatch, *HOLD) as server:
        request = Held(threads, server.client, *WHOLE[0])
        server.wait_for_held(1)
        server.signal()
        assert "shutting down" in request.text.result(HANG_SECONDS)
        assert request.status == 503


def test_hold_ends_after_its_time_or_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    with loading(monkeypatch, "--hold_while_loading", "0.05") as server:
        late = server.client.post("/v1/completions", json=BODY)
        assert (late.status_code, "loading weights after 0.05 s. Retry later." in late.text) == (503, True)
        timed_out = server.client.post("/v1/completions", json=BODY, headers={"x-request-timeout-seconds": "0.01"})
        assert (timed_out.status_code, "timed out while the model was loading" in timed_out.text) == (504, True)


def test_hold_comment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with loading(monkeypatch, *HOLD) as server:
        server.service.phase = Phase.WAITING
        server.service._report_wait("for 30 s\n\ndata: forged")
        path, body = STREAMS[0]
        with server.client.stream("POST", path, json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == ": waiting for the snapshot, for 30 s data: forged"


@pytest.mark.parametrize(("flags", "status"), [(HOLD, 503), ((*HOLD, "--ready_while_loading"), 200)])
def test_readiness_while_loading_is_opt_in(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], status: int
) -> None:
    with loading(monkeypatch, *flags) as server:
        for path in ("/v2/health/ready", "/v2/models/held/ready", "/v1/models/held"):
            assert server.client.get(path).status_code == status, path
        assert server.http.metric("ready") == 0, "the metric is that of the model"
        server.service.phase = Phase.WAITING
        assert server.client.get("/v2/health/ready").status_code == 503, "a download may take long"


def test_held_v2_request_of_a_model_that_embeds_is_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the model does is not known yet when the request arrives."""
    flags = ("--model_dir", str(tiny_poolers.make_bert(tmp_path)), *HOLD)
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [2], "data": ["w1", "w2"]}
    with loading(monkeypatch, *flags) as server, ThreadPoolExecutor() as threads:
        held = Held(threads, server.client, "/v2/models/held/infer", {"inputs": [tensor]})
        embeddings = Held(threads, server.client, "/v1/embeddings", {"model": "held", "input": "w1"})
        server.wait_for_held(3)
        server.go_on()
        [output] = json.loads(held.text.result(HANG_SECONDS))["outputs"]
        assert (output["name"], output["shape"]) == ("embedding", [2, 32])
        assert len(json.loads(embeddings.text.result(HANG_SECONDS))["data"]) == 1
