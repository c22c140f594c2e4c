"""The smaller benchmarks measure what they say they do, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import compare, make_model, servers, weights
from benchmarks.throughput import Measurement, Run
from devtools.processes import ROOT


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_model.make(directory, make_model.SHAPES["tiny"])
    return directory


def measured(server: str, tokens_per_second: float) -> Measurement:
    run = Run(8, 512, 512, 1.0, tokens_per_second, 1.0, 1.0, 1.0, 1.0, 1.0)
    return Measurement(server, 8, run, spread_percent=3.0, ratio=1.0, runs=[run])


def test_compare_prints_every_ratio() -> None:
    lines = compare.table([measured("8bit", 30.0), measured("none", 15.0), measured("peer", 10.0)], ["peer"])
    assert "8bit / peer: 3.00" in lines
    assert "none / peer: 1.50" in lines


def test_servers_peer_command_is_stopped(model_dir: Path) -> None:
    command = f"{sys.executable} -m benchmarks.sequential --model_dir {{model_dir}} --port {{port}}"
    with servers.peer(command, model_dir) as peer:
        assert servers.find("it", peer.url).model == peer.model
    with pytest.raises(servers.BenchmarkError, match="lists no model"):
        servers.find("it", peer.url)


def test_servers_peer_that_fails_to_start_is_named(model_dir: Path) -> None:
    with (
        pytest.raises(servers.BenchmarkError, match="`false` did not start"),
        servers.peer("false", model_dir),
    ):
        pytest.fail("it started")


def test_coldstart_reports_phases(model_dir: Path) -> None:
    words = ["benchmarks.coldstart", "--model_dir", str(model_dir), "--quantization", "8bit", "--repetitions", "1"]
    ended = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    for word in ("bare imports", "x the imports", "tokenizer", "weights", "pack", "warm_up"):
        assert word in ended.stdout


def test_weights_counts_bytes_per_step(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    read = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    assert weights.weight_bytes(model_dir) == read


def test_weights_step_rate_is_below_memory_bandwidth(model_dir: Path) -> None:
    seconds, rate = weights.step_seconds(model_dir)
    assert weights.weight_bytes(model_dir) / rate < seconds
    before, after, peak = weights.memory_bytes(model_dir)
    assert 0 < before < after <= peak
