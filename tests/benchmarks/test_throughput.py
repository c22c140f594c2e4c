import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks import make_model, servers, throughput
from benchmarks.servers import BenchmarkError, Server
from devtools import processes
from devtools.paths import ROOT
from predictor.models import loader

SERVER = Server("it", "http://127.0.0.1/v1", "model")


@pytest.fixture(scope="module")
def baseline(tiny_model: Path) -> Iterator[Server]:
    with servers.sequential(tiny_model, "float32") as server:
        yield server


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.throughput", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_throughput_requests_the_given_token_counts(baseline: Server, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    load = ["--requests", "3", "--input_tokens", "7", "--output_tokens", "5", "--repetitions", "2"]
    levels = ["--levels", "1,4", "--baseline_levels", "4"]
    process = run(baseline.url, baseline.url, *levels, *load, "--json", str(file))
    assert process.returncode == 0, process.stderr

    result = json.loads(file.read_text())
    assert result["settings"].items() >= {"input_tokens": 7, "output_tokens": 5, "repetitions": 2}.items()
    measurements = result["measurements"]
    assert [(level["concurrency"], level["median"]["requests"]) for level in measurements] == [(1, 3), (4, 4), (4, 4)]
    for level in measurements:
        assert len(level["runs"]) == 2
        for figures in [level["median"], *level["runs"]]:
            assert figures["input_tokens"] == 7 * figures["requests"]
            assert figures["output_tokens"] == 5 * figures["requests"]
            assert all(value >= 0 for value in figures.values())
        rates = [figures["output_tokens_per_second"] for figures in level["runs"]]
        assert level["median"]["output_tokens_per_second"] == pytest.approx(sum(rates) / 2)
        assert level["spread_percent"] == pytest.approx(100 * (max(rates) - min(rates)) / (sum(rates) / 2))
    first, second = (level["median"]["output_tokens_per_second"] for level in measurements[1:])
    assert [level["ratio"] for level in measurements] == [1, 1, pytest.approx(first / second)]
    assert process.stdout.count(baseline.url) == 3


def test_throughput_without_a_server_is_one_sentence() -> None:
    url = f"http://127.0.0.1:{processes.free_port()}/v1"
    process = run(url)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {url}/models lists no model")
    assert "Traceback" not in process.stderr


def test_throughput_stops_at_a_refused_request(baseline: Server) -> None:
    process = run(baseline.url, "--levels", "2", "--output_tokens", "5000")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"error: {baseline.url} returned 400: ")
    assert "Traceback" not in process.stderr


def test_make_model_word_is_one_token(tiny_model: Path) -> None:
    tokenizer = loader.load(tiny_model, device="cpu", dtype="auto", trust_remote_code=False).tokenizer
    one, other = throughput.make_prompts(random.Random(1), 2, 64)
    assert len(tokenizer.encode(one)) == len(tokenizer.encode(other)) == 64
    assert one != other
    words = range(throughput.WORDS)
    assert [tokenizer.decode([index]) for index in words] == [throughput.word(index) for index in words]
    assert tokenizer.decode(tokenizer.encode('{"a": [1]}')) == '{"a": [1]}', "other text as bytes"


def test_make_model_seed_repeats_weights(tiny_model: Path, tmp_path: Path) -> None:
    weights = {}
    for seed in (0, 1):
        make_model.make(tmp_path, make_model.SHAPES["tiny"], seed=seed)
        weights[seed] = (tmp_path / "model.safetensors").read_bytes()
    assert weights[0] == (tiny_model / "model.safetensors").read_bytes() != weights[1]


def complete(*events: object, status: int = 200) -> throughput.Completion:
    """Request two tokens from a server that sends these events."""
    content = b"".join(
        b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\r\n\r\n"
        for event in events
    )

    async def request() -> throughput.Completion:
        transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content))
        async with httpx.AsyncClient(transport=transport) as client:
            return await throughput.complete(client, SERVER, "w1 w2 w3", 2)

    return asyncio.run(request())


def delta(text: str) -> object:
    return {"choices": [{"index": 0, "text": text}]}


def usage(tokens: int) -> object:
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}}


def test_throughput_ignores_empty_deltas() -> None:
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
        ([delta("w1"), delta("w2"), b"[DONE]"], 200, "it sent no usage"),
        ([delta("w1"), usage(1), b"[DONE]"], 200, "it generated 1 of 2 tokens"),
        ([delta(""), usage(2), b"[DONE]"], 200, "it sent no text"),
    ],
)
def test_throughput_short_completion_is_an_error(events: list[object], status: int, sentence: str) -> None:
    with pytest.raises(BenchmarkError, match=sentence):
        complete(*events, status=status)


def run_against(*events: object, tokens: int) -> throughput.Run:
    """Measure two completions of `tokens` of a server that sends these events for each."""
    content = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in (*events, usage(tokens)))

    async def measure() -> throughput.Run:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, content=content))
        async with httpx.AsyncClient(transport=transport) as client:
            return await throughput.run(client, SERVER, ["w1 w2 w3"] * 2, 1, tokens)

    return asyncio.run(measure())


def test_throughput_of_few_tokens_in_one_event_has_no_gaps() -> None:
    run = run_against(delta("w1 w2"), tokens=throughput.FEW_TOKENS)
    assert (run.requests, run.output_tokens) == (2, 2 * throughput.FEW_TOKENS)
    assert (run.itl_p50_ms, run.itl_p99_ms) == (0, 0)


def test_throughput_of_a_server_that_does_not_stream_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="it sent each text in one event"):
        run_against(delta("w1 w2"), tokens=throughput.FEW_TOKENS + 1)


def test_percentiles_are_observed_values() -> None:
    assert throughput.percentile([1, 2, 3, 10], 50) == 2
    assert throughput.percentile([1, 2, 3, 10], 99) == 10
    assert throughput.percentile([1], 50) == 1
