"""Stage `modes`: a model of a given shape in every quantization: memory, capacity of the KV cache and tokens/s.

Each mode runs in a process of its own, so that none has less memory than the first. The engine runs without a server,
with the KV cache that it takes by default.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import make_model
from benchmarks.gpu_check import bench_stage, load_stage, report
from predictor.engine.engine import Engine
from predictor.models import loader
from predictor.settings import Settings
from predictor.types import SamplingParams

LEVELS = (1, 64)
"""Sequences at a time."""


def measure(directory: Path, device: str, mode: str, output_tokens: int) -> dict[str, Any]:
    """Load the model in a mode, and generate `output_tokens` for the sequences of each of `LEVELS`.

    Raises:
        PredictorError: as of the loader and the engine.
    """
    dtype, quantization = load_stage.modes(device)[mode]
    before = load_stage.allocated(device)
    began = time.perf_counter()
    loaded = loader.load(directory, device=device, dtype=dtype, quantization=quantization)
    load_seconds = time.perf_counter() - began
    after = load_stage.allocated(device)
    settings = Settings(max_num_seqs=max(LEVELS), max_queued_requests=0)
    engine = Engine.from_model(
        loaded.model, settings, eos_token_ids=loaded.eos_token_ids, context_tokens=loaded.context_tokens
    )
    engine.start()
    try:
        asyncio.run(engine.warm_up(loaded.vocabulary_tokens, load_stage.WARM_UP_SECONDS))
        rates = {level: asyncio.run(_rate(engine, level, output_tokens)) for level in LEVELS}
        cache_tokens = engine.cache_tokens
    finally:
        engine.stop()
    return {
        "load_seconds": load_seconds,
        "device_bytes": None if before is None or after is None else after - before,
        "kv_cache_tokens": cache_tokens,
        "tokens_per_second": rates,
    }


async def _rate(engine: Engine, sequences: int, output_tokens: int) -> float:
    """Return the tokens/s of sequences that start together, their prompts included."""
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    prompts = [random.choices(range(1, 500), k=bench_stage.INPUT_TOKENS) for _ in range(sequences)]
    began = time.perf_counter()
    for stream in engine.submit([(prompt, sampling) for prompt in prompts]):
        async for _ in stream:
            pass
    return sequences * output_tokens / (time.perf_counter() - began)


def run(shape: str, device: str, output_tokens: int, scratch: Path) -> bool:
    """Make the model, measure every mode, save the figures after each, and return whether all could be measured.

    Raises:
        BenchmarkError: the scratch folder has no room.
    """
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        bench_stage.make_weights(Path(folder), shape, device)
        for mode in load_stage.modes(device):
            if mode != "float32":
                figures[mode] = _in_a_process(["--directory", folder, "--mode", mode, *sys.argv[1:]])
                report.save({"shape": shape, "output_tokens": output_tokens, "quantizations": figures})
    return not any("error" in mode for mode in figures.values())


def _in_a_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure one mode; its last line of output is the result."""
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check.modes_stage", *arguments], stdout=subprocess.PIPE, text=True
    )
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        return {"error": f"exit code {process.returncode}; the stage's log has the reason"}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def main() -> int:
    """Run the stage, or measure one mode of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.modes_stage", description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--shape", choices=make_model.SHAPES, required=True)
    parser.add_argument("--output_tokens", type=int, required=True, help="per sequence")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--directory", type=Path, help="weights of the mode to measure")
    parser.add_argument("--mode", help="measure this one only")
    arguments = parser.parse_args()
    if arguments.mode:
        print(json.dumps(measure(arguments.directory, arguments.device, arguments.mode, arguments.output_tokens)))
        return 0
    return int(not run(arguments.shape, arguments.device, arguments.output_tokens, arguments.scratch))


if __name__ == "__main__":
    sys.exit(main())
