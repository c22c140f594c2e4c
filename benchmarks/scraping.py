"""Measure the cost of scraping `/metrics`: `python -m benchmarks.scraping`.

Runs on one predictor alternate with and without a scrape per second (A B B A …). By default it serves the demo model,
whose short steps make the cost most visible. Prints output tokens/s, the duration of a scrape, and the median and
quartiles of the ratios of neighboring runs, so that drift of the machine cancels out. Counting itself is in both runs.
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

import httpx2

from benchmarks import servers
from devtools.paths import DEMO_MODEL
from kserve_llm import bench
from kserve_llm.bench import Server

PERIOD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """Output tokens/s of neighboring runs, and the seconds of each scrape."""

    unscraped: list[float]
    scraped: list[float]
    scrapes: list[float]


async def measure(server: Server, metrics_url: str, arguments: argparse.Namespace) -> Measurement:
    """Run all pairs after one warm-up run."""
    rng = random.Random(0)
    measurement = Measurement([], [], [])

    async def rate() -> float:
        prompts = [f"{rng.randrange(1000)}+{rng.randrange(1000)}=" for _ in range(arguments.requests)]
        run = await bench.run(client, server, prompts, arguments.concurrency, arguments.output_tokens)
        return run.output_tokens_per_second

    async def scraped_rate() -> float:
        scraper = asyncio.create_task(scrape(client, metrics_url, measurement.scrapes))
        try:
            return await rate()
        finally:
            scraper.cancel()
            with suppress(asyncio.CancelledError):
                await scraper

    async with bench.make_client() as client:
        await rate()
        for repetition in range(arguments.repetitions):
            for with_scrapes in (False, True) if repetition % 2 == 0 else (True, False):
                if with_scrapes:
                    measurement.scraped.append(await scraped_rate())
                else:
                    measurement.unscraped.append(await rate())
            print(f"{measurement.unscraped[-1]:>8.1f} without {measurement.scraped[-1]:>8.1f} with scrapes", flush=True)
    return measurement


async def scrape(client: httpx2.AsyncClient, url: str, seconds: list[float]) -> None:
    """Scrape once per period until cancelled; append the duration of each scrape."""
    while True:
        began = time.monotonic()
        (await client.get(url)).raise_for_status()
        seconds.append(time.monotonic() - began)
        await asyncio.sleep(PERIOD_SECONDS)


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scraping", description=__doc__)
    parser.add_argument("--concurrency", type=int, default=8, help="concurrent clients (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="requests per run (default: %(default)s)")
    parser.add_argument("--output_tokens", type=int, default=64, help="tokens per completion (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=40, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--model_dir", type=Path, default=DEMO_MODEL, help="model to serve (default: the demo model)")
    parser.add_argument(
        "--flags", default="--dtype float32", help="flags of the predictor, as one argument (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with servers.predictor("predictor", arguments.model_dir, arguments.flags.split()) as server:
        metrics_url = server.url.removesuffix("/v1") + "/metrics"
        measurement = asyncio.run(measure(server, metrics_url, arguments))
    pairs = zip(measurement.unscraped, measurement.scraped, strict=True)
    ratios = [scraped / unscraped for unscraped, scraped in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(
        f"ratio, median of {len(ratios)} pairs: {middle:.3f} (quartiles {low:.3f} and {high:.3f});"
        f" {len(measurement.scrapes)} scrapes took {1000 * statistics.median(measurement.scrapes):.1f} ms each"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
