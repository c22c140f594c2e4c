"""Stage `bench`: a model of a given shape with random weights, served by the predictor and by sequential `generate`."""

import argparse
import asyncio
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import long_prompts, make_model, servers
from benchmarks.gpu_check import report
from benchmarks.long_prompts import OTHER_STREAMS
from kserve_llm import bench
from kserve_llm.bench import Load, Measurement, Server
from kserve_llm.errors import BenchmarkError
from predictor.engine.kv_cache import PAGE_TOKENS

INPUT_TOKENS = 64
LONG_PROMPT_TOKENS = 2000
REQUESTS = 4
"""At least, per run."""
REPETITIONS = 2
FIRST_TOKEN_REPETITIONS = 3
SEQUENTIAL_LEVELS = (1, 8)
"""The baseline has the same tokens/s at every level, and takes longer at each."""
SPARE_PAGES = 32
HEADROOM = 1.1
"""Free space required for the weights, relative to their size."""


def run(shape: str, device: str, levels: Sequence[int], output_tokens: int, scratch: Path) -> None:
    """Make the model, measure both servers, and save the figures after each step.

    Raises:
        BenchmarkError: the scratch folder has no room, or a server failed.
        DemoError: the predictor did not start.
    """
    figures: dict[str, Any] = {"shape": shape, "dtype": "bfloat16", "long_prompt_tokens": LONG_PROMPT_TOKENS}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        directory = Path(folder)
        figures |= make_weights(directory, shape, device)
        report.save(figures)
        pages = -(-(INPUT_TOKENS + output_tokens) // PAGE_TOKENS) * max(levels) + SPARE_PAGES
        flags = ["--device", device, "--dtype", "bfloat16", "--max_num_seqs", str(max(*levels, OTHER_STREAMS + 2))]
        flags += ["--kv_cache_tokens", str(pages * PAGE_TOKENS)]
        began = time.monotonic()
        with servers.predictor("predictor", directory, flags) as server:
            figures["ready_seconds"] = time.monotonic() - began
            report.save(figures)
            for level in levels:
                [measured] = _compare(server, [level], output_tokens)
                figures.setdefault("levels", []).append(_figures(measured))
                report.save(figures)
            figures["first_token_ms"], figures["disturbed"] = asyncio.run(_long_prompts(server, output_tokens))
            report.save(figures)
        with servers.sequential(directory, "bfloat16", device) as server:
            measured_levels = [level for level in levels if level in SEQUENTIAL_LEVELS]
            for level in measured_levels:
                [measured] = _compare(server, [level], output_tokens)
                figures.setdefault("sequential", []).append(_figures(measured))
                report.save(figures)


def make_weights(directory: Path, shape: str, device: str) -> dict[str, Any]:
    """Draw the weights on the device and write them.

    Raises:
        BenchmarkError: the folder has no room for them.
    """
    size = 2 * make_model.parameters(make_model.SHAPES[shape])
    free = shutil.disk_usage(directory).free
    if size * HEADROOM > free:
        raise BenchmarkError(
            f"{directory.parent} has {free / 1e9:.1f} GB free, and the weights of {shape} have {size / 1e9:.1f} GB. "
            "Pass another folder with --scratch."
        )
    began = time.monotonic()
    parameters = make_model.make(directory, make_model.SHAPES[shape], device=device)
    seconds = time.monotonic() - began
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # the servers need the memory
    return {"parameters": parameters, "weight_bytes": 2 * parameters, "make_seconds": seconds}


def _compare(server: Server, levels: Sequence[int], output_tokens: int) -> list[Measurement]:
    load = Load(INPUT_TOKENS, output_tokens, REQUESTS, REPETITIONS, random.randrange(2**32))
    return asyncio.run(bench.compare([server], load, levels, []))


def _figures(measured: Measurement) -> dict[str, Any]:
    median = measured.median
    return {
        "concurrency": measured.concurrency,
        "tokens_per_second": median.output_tokens_per_second,
        "spread_percent": measured.spread_percent,
        "ttft_p50_ms": median.ttft_p50_ms,
        "ttft_p99_ms": median.ttft_p99_ms,
        "itl_p50_ms": median.itl_p50_ms,
        "itl_p99_ms": median.itl_p99_ms,
    }


async def _long_prompts(server: Server, output_tokens: int) -> tuple[float, dict[str, float] | None]:
    """Return the ms to the first token of a long prompt on an idle server, and what it costs other streams."""
    rng = random.Random()

    def make_prompt(tokens: int) -> str:
        [prompt] = bench.make_prompts(rng, 1, tokens)
        return prompt

    async with bench.make_client() as client:
        alone = [
            await bench.complete(client, server, make_prompt(LONG_PROMPT_TOKENS), bench.FEW_TOKENS)
            for _ in range(FIRST_TOKEN_REPETITIONS)
        ]
        disturbance = await long_prompts.disturb(
            client, server, make_prompt, LONG_PROMPT_TOKENS, output_tokens=2 * output_tokens
        )
    first_token_ms = statistics.median((completion.arrivals[0] - completion.sent) * 1000 for completion in alone)
    return first_token_ms, asdict(disturbance) if disturbance else None


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.bench_stage", description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--shape", choices=make_model.SHAPES, required=True)
    parser.add_argument("--levels", required=True, help="numbers of callers, comma-separated")
    parser.add_argument("--output_tokens", type=int, required=True, help="per completion")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the weights")
    arguments = parser.parse_args()
    levels = [int(level) for level in arguments.levels.split(",")]
    run(arguments.shape, arguments.device, levels, arguments.output_tokens, arguments.scratch)


if __name__ == "__main__":
    main()
