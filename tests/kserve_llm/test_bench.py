"""The load of `kserve-llm bench` on servers that answer wrongly."""

import asyncio
import json

import httpx2
import pytest

from kserve_llm import bench
from kserve_llm.bench import Completion, Run, Server
from kserve_llm.errors import BenchmarkError

SERVER = Server("it", "http://127.0.0.1/v1", "model")


def client(*events: object, status: int = 200) -> httpx2.AsyncClient:
    """A client of a server that answers every request with these events."""
    content = b"".join(
        b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\r\n\r\n"
        for event in events
    )
    return httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: httpx2.Response(status, content=content)))


def complete(*events: object, status: int = 200) -> Completion:
    """Request two tokens."""

    async def request() -> Completion:
        async with client(*events, status=status) as connected:
            return await bench.complete(connected, SERVER, "w1 w2 w3", 2)

    return asyncio.run(request())


def run(*events: object, tokens: int = 2) -> Run:
    """Send two prompts, one after the other."""

    async def send() -> Run:
        async with client(*events) as connected:
            return await bench.run(connected, SERVER, ["w1", "w2"], 1, tokens)

    return asyncio.run(send())


def delta(text: str) -> object:
    return {"choices": [{"index": 0, "text": text}]}


def usage(tokens: int) -> object:
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}}


def test_complete_ignores_empty_deltas() -> None:
    completion = complete(delta(""), delta("w1"), delta(" w2"), delta(""), usage(2), b"[DONE]")
    assert len(completion.arrivals) == 2
    assert completion.sent <= completion.arrivals[0] <= completion.arrivals[1]
    assert (completion.prompt_tokens, completion.completion_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("events", "status", "sentence"),
    [
        ([{"error": "too many"}], 429, "it returned 429: .*too many"),
        ([delta("w1"), {"error": {"message": "out of memory"}}], 200, "it failed in a stream: .*out of memory"),
        ([delta("w1"), b"{"], 200, "it sent an incomplete response"),
        ([{"choices": [{"delta": {"content": "w1"}}]}, usage(2)], 200, "it sent an incomplete response: KeyError"),
        ([delta("w1"), b"[]", usage(2)], 200, "it sent an incomplete response"),
        ([delta("w1"), delta("w2"), b"[DONE]"], 200, "it sent no usage"),
        ([delta("w1"), {"choices": [], "usage": {"total_tokens": 5}}], 200, "it sent no usage"),
        ([delta("w1"), usage(1), b"[DONE]"], 200, "it generated 1 of 2 tokens"),
        ([delta(""), usage(2), b"[DONE]"], 200, "it sent no text"),
    ],
)
def test_complete_short_completion_is_an_error(events: list[object], status: int, sentence: str) -> None:
    with pytest.raises(BenchmarkError, match=sentence):
        complete(*events, status=status)


def test_run_counts_the_tokens_of_all_completions() -> None:
    measured = run(delta("w1"), delta(" w2"), usage(2), b"[DONE]")
    assert (measured.requests, measured.input_tokens, measured.output_tokens) == (2, 6, 4)
    assert measured.output_tokens_per_second == pytest.approx(4 / measured.wall_seconds)


def test_run_of_a_server_that_does_not_stream_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="it sent each text in one event; it must stream"):
        run(delta("w1 w2"), usage(17), b"[DONE]", tokens=bench.FEW_TOKENS + 1)


def test_run_of_few_tokens_in_one_event_has_no_gaps() -> None:
    measured = run(delta("w1 w2"), usage(16), b"[DONE]", tokens=bench.FEW_TOKENS)
    assert (measured.requests, measured.output_tokens) == (2, 2 * bench.FEW_TOKENS)
    assert (measured.itl_p50_ms, measured.itl_p99_ms) == (0, 0)


def test_requests_have_the_key_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "authorization" not in bench.make_client().headers
    monkeypatch.setenv(bench.API_KEY_VARIABLE, "secret")
    assert bench.make_client().headers["authorization"] == "Bearer secret"


def test_percentiles_are_observed_values() -> None:
    assert bench.percentile([1, 2, 3, 10], 50) == 2
    assert bench.percentile([1, 2, 3, 10], 99) == 10
    assert bench.percentile([1], 50) == 1
