"""Measure what a busy process costs a server: `python -m benchmarks.neighbour URL`.

Runs alternate with and without a neighbour (A B B A …), which takes a part of the machine's CPU time in bursts. Prints
output tokens/s of every pair, and for each concurrency the median and quartiles of the ratios of neighboring runs, so
that drift of the machine cancels out. A server that shares the machine fairly loses the part that the neighbour takes.
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kserve_llm import bench
from kserve_llm.bench import Server
from kserve_llm.errors import BenchmarkError

BURST_SECONDS = 0.02
"""Several time slices of the scheduler, so that it has to interrupt the server."""


@contextmanager
def neighbour(share: float) -> Iterator[None]:
    """Run processes that together take this part of the CPU time of all cores, each at most one core."""
    cores = share * (os.cpu_count() or 1)
    number = max(1, -(-cores // 1))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=burn, args=(cores / number,), daemon=True) for _ in range(int(number))]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def burn(load: float) -> None:
    """Take this part of a core's CPU time until the process is killed."""
    while True:
        started = time.thread_time()
        while time.thread_time() - started < BURST_SECONDS:
            pass
        time.sleep(BURST_SECONDS * (1 - load) / load)


async def measure(server: Server, concurrency: int, arguments: argparse.Namespace) -> list[float]:
    """Return the ratio of output tokens/s with and without the neighbour of each pair, after one warm-up run."""
    rng = random.Random(0)
    ratios = []

    async def rate() -> float:
        prompts = bench.make_prompts(rng, concurrency, arguments.input_tokens)
        run = await bench.run(client, server, prompts, concurrency, arguments.output_tokens)
        return run.output_tokens_per_second

    async def disturbed_rate() -> float:
        with neighbour(arguments.share):
            return await rate()

    async with bench.make_client() as client:
        await rate()
        for repetition in range(arguments.repetitions):
            if repetition % 2 == 0:
                alone, disturbed = await rate(), await disturbed_rate()
            else:
                disturbed, alone = await disturbed_rate(), await rate()
            print(f"{concurrency:>3} callers {alone:>8.1f} alone {disturbed:>8.1f} with a neighbour", flush=True)
            ratios.append(disturbed / alone)
    return ratios


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbour", description=__doc__)
    parser.add_argument("url", metavar="URL", help="base URL of an OpenAI server on this machine, with /v1")
    parser.add_argument("--share", type=float, default=0.1, help="part that the neighbour takes (default: %(default)s)")
    parser.add_argument("--levels", default="1,8,32", help="concurrency levels (default: %(default)s)")
    parser.add_argument("--input_tokens", type=int, default=64, help="tokens per prompt (default: %(default)s)")
    parser.add_argument("--output_tokens", type=int, default=64, help="tokens per completion (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=8, help="pairs of runs per level (default: %(default)s)")
    arguments = parser.parse_args()
    if not 0 < arguments.share <= 1 or arguments.repetitions < 2:
        parser.error("--share must be above 0 and at most 1, and --repetitions at least 2.")
    try:
        server = bench.find("server", arguments.url.rstrip("/"))
        for concurrency in map(int, arguments.levels.split(",")):
            ratios = asyncio.run(measure(server, concurrency, arguments))
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            print(f"{concurrency:>3} callers keep {middle:.3f} (quartiles {low:.3f} and {high:.3f})")
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
