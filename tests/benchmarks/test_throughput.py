import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import make_model, servers
from devtools import processes
from devtools.paths import ROOT
from kserve_llm import bench
from kserve_llm.bench import Server
from predictor.models import loader


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
    one, other = bench.make_prompts(random.Random(1), 2, 64)
    assert len(tokenizer.encode(one)) == len(tokenizer.encode(other)) == 64
    assert one != other
    words = range(bench.WORDS)
    assert [tokenizer.decode([index]) for index in words] == [bench.word(index) for index in words]
    assert tokenizer.decode(tokenizer.encode('{"a": [1]}')) == '{"a": [1]}', "other text as bytes"


def test_make_model_seed_repeats_weights(tiny_model: Path, tmp_path: Path) -> None:
    weights = {}
    for seed in (0, 1):
        make_model.make(tmp_path, make_model.SHAPES["tiny"], seed=seed)
        weights[seed] = (tmp_path / "model.safetensors").read_bytes()
    assert weights[0] == (tiny_model / "model.safetensors").read_bytes() != weights[1]
