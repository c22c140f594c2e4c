"""Measure the memory peak of loading 8-bit weights, and a decode step against the memory bandwidth.

`--model_dir DIR` measures the memory. `--shape` measures a decode step of a model with random weights against the read
bandwidth, in the same process: a token takes at least the time to read all weights once.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import make_model
from predictor.engine.engine import Engine
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.settings import Settings
from predictor.types import SamplingParams

PROBE_BYTES = 1 << 30
STEPS = 48
PROMPT_TOKENS = 64
_MIB = 1 << 20


def bandwidth() -> float:
    """Return the read bandwidth of all threads outside the caches, in bytes/s; the best of seven sums."""
    numbers = torch.ones(PROBE_BYTES // 8, dtype=torch.int64)
    durations = []
    for _ in range(7):
        began = time.perf_counter()
        numbers.sum()
        durations.append(time.perf_counter() - began)
    return PROBE_BYTES / min(durations)


def weight_bytes(directory: Path) -> int:
    """Return the bytes that a step reads: int8 weights of all linear layers and the head."""
    config = json.loads((directory / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    attention = hidden * head * (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    layer = attention + 3 * hidden * config["intermediate_size"]
    return int(config["num_hidden_layers"] * layer + config["vocab_size"] * hidden)


def step_seconds(directory: Path) -> tuple[float, float]:
    """Return the median 8-bit decode step of one sequence in seconds, and the bandwidth in bytes/s."""
    state: dict[str, Any] = {}

    def build() -> None:
        # In a thread that ends, as in the predictor: the OpenMP worker teams of two live threads would compete.
        state["before"] = bandwidth()
        state["engine"] = _engine(load(directory, "8bit"))
        state["engine"].start()

    _run_in_thread(build)
    engine: Engine = state["engine"]
    try:
        gaps = asyncio.run(_decode(engine))
    finally:
        engine.stop()
    _run_in_thread(lambda: state.update(after=bandwidth()))
    return statistics.median(gaps), max(state["before"], state["after"])


def load(directory: Path, mode: str) -> LoadedModel:
    """Load a model on the CPU, as the predictor does."""
    return loader.load(directory, device="cpu", dtype="auto", trust_remote_code=False, quantization=mode)


def memory_bytes(directory: Path) -> tuple[int, int, int]:
    """Return a process's anonymous memory before and after loading 8-bit weights, and its peak.

    Mapped file pages are not counted: the kernel drops them under memory pressure.
    """
    command = [sys.executable, "-m", "benchmarks.load_memory", str(directory)]
    before, after, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(before), int(after), int(peak)


def quantized_bytes(directory: Path) -> int:
    """Return the bytes of the quantized weights: those that a step reads, and the bfloat16 embedding."""
    config = json.loads((directory / "config.json").read_text())
    return int(weight_bytes(directory) + 2 * config["vocab_size"] * config["hidden_size"])


def _engine(loaded: LoadedModel) -> Engine:
    return Engine.from_model(
        loaded.model,
        Settings(
            max_num_seqs=4,
            max_queued_requests=1,
            max_num_batched_tokens=512,
            kv_cache_tokens=4096,
            speculation="none",
        ),
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=1024,
    )


async def _decode(engine: Engine) -> list[float]:
    sampling = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    deadline = time.monotonic() + 600
    [stream] = engine.submit([(list(range(10, 10 + PROMPT_TOKENS)), sampling)], deadline)
    arrivals = [time.perf_counter() async for _ in stream]
    return [after - before for before, after in pairwise(arrivals[4:])]


def _run_in_thread(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def main() -> None:
    """Run the measurements that the flags select."""
    arguments = parse(sys.argv[1:])
    if arguments.model_dir:
        before, after, peak = memory_bytes(arguments.model_dir)
        weights = quantized_bytes(arguments.model_dir)
        print(f"interpreter and imports {before / _MIB:.0f} MiB, 8-bit weights {weights / _MIB:.0f} MiB")
        print(f"loaded {after / _MIB:.0f} MiB, peak {peak / _MIB:.0f} MiB")
        print(f"peak without the interpreter, relative to the weights: {(peak - before) / weights:.2f}")
    if arguments.shape:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            make_model.make(directory, make_model.SHAPES[arguments.shape])
            seconds, rate = step_seconds(directory)
            floor = weight_bytes(directory) / rate
        print(f"read bandwidth {rate / 1e9:.1f} GB/s, lower bound of a step {floor * 1000:.1f} ms")
        print(f"decode step {seconds * 1000:.1f} ms, {floor / seconds:.2f} of the bandwidth")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, help="measure the memory of loading this model")
    parser.add_argument("--shape", choices=make_model.SHAPES, help="measure a decode step of a model of this shape")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
