"""The benchmark measures what it says it does: on the baseline with a tiny model, and on answers made up here."""

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
from devtools.processes import ROOT
from predictor.models import loader

ANYWHERE = Server("it", "http://127.0.0.1/v1", "model")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_model.make(directory, make_model.SHAPES["tiny"])
    return directory


@pytest.fixture(scope="module")
def baseline(model_dir: Path) -> Iterator[Server]:
    with servers.sequential(model_dir, "float32") as server:
        yield server


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.throughput", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_throughput_requests_the_given_token_counts(baseline: Server, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    asked = ["--requests", "3", "--input_tokens", "7", "--output_tokens", "5", "--repetitions", "2"]
    levels = ["--levels", "1,4", "--baseline_levels", "4"]
    ended = run(baseline.url, baseline.url, *levels, *asked, "--json", str(file))
    assert ended.returncode == 0, ended.stderr

    result = json.loads(file.read_text())
    assert result["settings"].items() >= {"input_tokens": 7, "output_tokens": 5, "repetitions": 2}.items()
    measured = [(each["concurrency"], each["median"]["requests"]) for each in result["measurements"]]
    assert measured == [(1, 3), (4, 4), (4, 4)]
    for each in result["measurements"]:
        assert len(each["runs"]) == 2
        for figures in [each["median"], *each["runs"]]:
            assert figures["input_tokens"] == 7 * figures["requests"]
            assert figures["output_tokens"] == 5 * figures["requests"]
            assert all(value >= 0 for value in figures.values())
        speeds = [figures["output_tokens_per_second"] for figures in each["runs"]]
        assert each["median"]["output_tokens_per_second"] == pytest.approx(sum(speeds) / 2)
        assert each["spread_percent"] == pytest.approx(100 * (max(speeds) - min(speeds)) / (sum(speeds) / 2))
    first, second = (each["median"]["output_tokens_per_second"] for each in result["measurements"][1:])
    assert [each["ratio"] for each in result["measurements"]] == [1, 1, pytest.approx(first / second)]
    assert ended.stdout.count(baseline.url) == 3


def test_throughput_without_a_server_is_one_sentence() -> None:
    url = f"http://127.0.0.1:{processes.free_port()}/v1"
    ended = run(url)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {url}/models lists no model")
    assert "Traceback" not in ended.stderr


def test_throughput_stops_at_a_refused_request(baseline: Server) -> None:
    ended = run(baseline.url, "--levels", "2", "--output_tokens", "5000")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"error: {baseline.url} answered 400: ")
    assert "Traceback" not in ended.stderr


def test_make_model_word_is_one_token(model_dir: Path) -> None:
    tokenizer = loader.load(model_dir, device="cpu", dtype="auto", trust_remote_code=False).tokenizer
    one, other = throughput.make_prompts(random.Random(1), 2, 64)
    assert len(tokenizer.encode(one)) == len(tokenizer.encode(other)) == 64
    assert one != other
    texts = [tokenizer.decode([index], skip_special_tokens=True) for index in range(len(tokenizer))]
    assert texts == [throughput.word(index) for index in range(make_model.SHAPES["tiny"].vocab_size)]


def test_make_model_seed_repeats_weights(model_dir: Path, tmp_path: Path) -> None:
    made = {}
    for seed in (0, 1):
        make_model.make(tmp_path, make_model.SHAPES["tiny"], seed=seed)
        made[seed] = (tmp_path / "model.safetensors").read_bytes()
    assert made[0] == (model_dir / "model.safetensors").read_bytes() != made[1]


def complete(*events: object, status: int = 200) -> throughput.Completion:
    """Ask for two tokens of a server that answers with these events."""
    content = b"".join(
        b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\r\n\r\n" for e in events
    )

    async def ask() -> throughput.Completion:
        transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content))
        async with httpx.AsyncClient(transport=transport) as client:
            return await throughput.complete(client, ANYWHERE, "w1 w2 w3", 2)

    return asyncio.run(ask())


def piece(text: str) -> object:
    return {"choices": [{"index": 0, "text": text}]}


def usage(tokens: int) -> object:
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}}


def test_throughput_ignores_empty_deltas() -> None:
    completion = complete(piece(""), piece("w1"), piece(" w2"), piece(""), usage(2), b"[DONE]")
    assert len(completion.arrivals) == 2
    assert completion.sent <= completion.arrivals[0] <= completion.arrivals[1]
    assert (completion.prompt_tokens, completion.completion_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("events", "status", "sentence"),
    [
        ([{"error": "too many"}], 429, "it answered 429: .*too many"),
        ([piece("w1"), {"error": {"message": "out of memory"}}], 200, "it failed in a stream: .*out of memory"),
        ([piece("w1"), b"{"], 200, "it did not answer in full"),
        ([piece("w1"), piece("w2"), b"[DONE]"], 200, "it sent no usage"),
        ([piece("w1"), usage(1), b"[DONE]"], 200, "it made 1 tokens where 2 were asked for"),
        ([piece("w1 w2"), usage(2), b"[DONE]"], 200, r"it sent its text in 1 piece\(s\)"),
    ],
)
def test_throughput_short_completion_is_an_error(events: list[object], status: int, sentence: str) -> None:
    with pytest.raises(BenchmarkError, match=sentence):
        complete(*events, status=status)


def test_percentiles_are_observed_values() -> None:
    assert throughput.percentile([1, 2, 3, 10], 50) == 2
    assert throughput.percentile([1, 2, 3, 10], 99) == 10
    assert throughput.percentile([1], 50) == 1
