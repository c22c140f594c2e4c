"""What 8-bit weights cost on this CPU: memory while they load, and how near a step comes to reading them just once.

`python -m benchmarks.weights --model_dir DIR` for the memory, `--shape` for a decode step of a model of random weights
against the read bandwidth of the machine, which is measured in the same process. No token can be made in less time than
reading all weights once takes.
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
from predictor.types import SamplingParams

PROBE_BYTES = 1 << 30
STEPS = 48
PROMPT_TOKENS = 64
_MIB = 1 << 20


def bandwidth() -> float:
    """Bytes a second at which all threads read memory that no cache holds: the best of seven sums."""
    numbers = torch.ones(PROBE_BYTES // 8, dtype=torch.int64)
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        numbers.sum()
        taken.append(time.perf_counter() - began)
    return PROBE_BYTES / min(taken)


def weight_bytes(directory: Path) -> int:
    """Of what a step reads: int8 for all linear layers and the head; the rest is little."""
    config = json.loads((directory / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    attention = hidden * head * (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    layer = attention + 3 * hidden * config["intermediate_size"]
    return int(config["num_hidden_layers"] * layer + config["vocab_size"] * hidden)


def step_seconds(directory: Path) -> tuple[float, float]:
    """The median decode step of one sequence in 8 bits, and the bandwidth just before and after, in bytes a second."""
    made: dict[str, Any] = {}

    def build() -> None:
        # In a thread that ends, as in the predictor: OpenMP's teams of two living threads get in each other's way.
        made["before"] = bandwidth()
        made["engine"] = _engine(load(directory, "8bit"))
        made["engine"].start()

    _in_a_thread(build)
    engine: Engine = made["engine"]
    try:
        gaps = asyncio.run(_decode(engine))
    finally:
        engine.stop()
    _in_a_thread(lambda: made.update(after=bandwidth()))
    return statistics.median(gaps), max(made["before"], made["after"])


def load(directory: Path, word: str) -> LoadedModel:
    """As the predictor loads it, on the CPU."""
    return loader.load(directory, device="cpu", dtype="auto", trust_remote_code=False, quantization=word)


_WATCHED_LOAD = """
import re, sys, threading, time
from pathlib import Path
from benchmarks import weights

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

peak = [0]
threading.Thread(target=watch, daemon=True).start()
before = anonymous()
loaded = weights.load(Path(sys.argv[1]), "8bit")
after = anonymous()
print(before, after, max(after, peak[0]))
"""


def memory_bytes(directory: Path) -> tuple[int, int, int]:
    """Of a process that loads these weights in 8 bits: before it does, after it has, and the most in between.

    Pages of the file that are mapped are not counted: the kernel drops them where memory is short.
    """
    command = [sys.executable, "-c", _WATCHED_LOAD, str(directory)]
    before, after, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(before), int(after), int(peak)


def quantized_bytes(directory: Path) -> int:
    """Of the weights in 8 bits: what a step reads, and the embedding, which stays in bfloat16."""
    config = json.loads((directory / "config.json").read_text())
    return int(weight_bytes(directory) + 2 * config["vocab_size"] * config["hidden_size"])


def _engine(loaded: LoadedModel) -> Engine:
    return Engine.from_model(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=1024,
        max_num_seqs=4,
        max_queued_requests=1,
        max_num_batched_tokens=512,
        kv_cache_tokens=4096,
    )


async def _decode(engine: Engine) -> list[float]:
    sampling = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    deadline = time.monotonic() + 600
    [stream] = engine.submit([(list(range(10, 10 + PROMPT_TOKENS)), sampling)], deadline)
    arrivals = [time.perf_counter() async for _ in stream]
    return [after - before for before, after in pairwise(arrivals[4:])]


def _in_a_thread(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def main() -> None:
    """Measure what the flags say, and print."""
    arguments = parse(sys.argv[1:])
    if arguments.model_dir:
        before, after, peak = memory_bytes(arguments.model_dir)
        rounded = quantized_bytes(arguments.model_dir)
        print(f"interpreter and imports {before / _MIB:.0f} MiB, weights in 8 bits {rounded / _MIB:.0f} MiB")
        print(f"loaded {after / _MIB:.0f} MiB, peak {peak / _MIB:.0f} MiB")
        print(f"peak beside the interpreter over the weights: {(peak - before) / rounded:.2f}")
    if arguments.shape:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            make_model.make(directory, make_model.SHAPES[arguments.shape])
            seconds, rate = step_seconds(directory)
            floor = weight_bytes(directory) / rate
        print(f"read bandwidth {rate / 1e9:.1f} GB/s, floor of a step {floor * 1000:.1f} ms")
        print(f"decode step {seconds * 1000:.1f} ms, {floor / seconds:.2f} of the bandwidth")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, help="measure the memory that its load takes")
    parser.add_argument("--shape", choices=make_model.SHAPES, help="measure a decode step of a model of this shape")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
