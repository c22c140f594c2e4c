"""What it costs to be watched: `python -m benchmarks.scraping`.

One predictor, by default on the demo model, whose steps are so short that answering weighs more than with any real
one. Runs with somebody who reads `/metrics` every second take turns with runs without, A B B A …; printed are output
tokens/s of each, how long a reading takes, and the median of the ratios of neighbours, watched to alone, with its
quartiles: a machine that is slower for a while is so for both of a pair. What the counting itself costs is in both and
does not show.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import servers, throughput
from benchmarks.servers import Server
from devtools.processes import ROOT

PERIOD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """Output tokens/s of the runs, in pairs of neighbours; seconds that each reading of the metrics took."""

    alone: list[float]
    watched: list[float]
    readings: list[float]


async def measure(server: Server, metrics_url: str, arguments: argparse.Namespace) -> Measurement:
    """All runs, after one that does not count."""
    rng = random.Random(0)
    measured = Measurement([], [], [])

    async def rate() -> float:
        prompts = [f"{rng.randrange(1000)}+{rng.randrange(1000)}=" for _ in range(arguments.requests)]
        run = await throughput.run(client, server, prompts, arguments.callers, arguments.output_tokens)
        return run.output_tokens_per_second

    async def watched_rate() -> float:
        watcher = asyncio.create_task(watch(client, metrics_url, measured.readings))
        try:
            return await rate()
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher

    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
        await rate()
        for repetition in range(arguments.repetitions):
            for watched in (False, True) if repetition % 2 == 0 else (True, False):
                if watched:
                    measured.watched.append(await watched_rate())
                else:
                    measured.alone.append(await rate())
            print(f"{measured.alone[-1]:>8.1f} alone {measured.watched[-1]:>8.1f} watched", flush=True)
    return measured


async def watch(client: httpx.AsyncClient, url: str, seconds: list[float]) -> None:
    """Read all metrics, once in a period, until cancelled; notes how long each reading took."""
    while True:
        began = time.monotonic()
        (await client.get(url)).raise_for_status()
        seconds.append(time.monotonic() - began)
        await asyncio.sleep(PERIOD_SECONDS)


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scraping", description=__doc__)
    parser.add_argument("--callers", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="of a run (default: %(default)s)")
    parser.add_argument("--output_tokens", type=int, default=64, help="of each (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=40, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--model_dir", type=Path, default=ROOT / "demo/model", help="default: the demo model")
    parser.add_argument(
        "--flags", default="--dtype float32", help="of the predictor, in one word (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with servers.predictor("predictor", arguments.model_dir, arguments.flags.split()) as server:
        metrics_url = server.url.removesuffix("/v1") + "/metrics"
        measured = asyncio.run(measure(server, metrics_url, arguments))
    ratios = [watched / alone for alone, watched in zip(measured.alone, measured.watched, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(
        f"ratio, median of {len(ratios)} pairs: {middle:.3f} (quartiles {low:.3f} and {high:.3f});"
        f" {len(measured.readings)} readings took {1000 * statistics.median(measured.readings):.1f} ms each"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
