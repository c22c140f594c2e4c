"""What it costs to be watched: `python -m benchmarks.scraping`.

One predictor, by default on the demo model, whose steps are so short that answering weighs more than with any real
one. Runs with somebody who reads `/metrics` every second take turns with runs without, A B B A …; printed are output
tokens/s of each, the medians, and their ratio. What the counting itself costs is in both and does not show.
"""

import argparse
import asyncio
import random
import statistics
import sys
from contextlib import suppress
from pathlib import Path

import httpx

from benchmarks import servers, throughput
from benchmarks.servers import Server
from demo.processes import ROOT

PERIOD_SECONDS = 1.0


async def measure(server: Server, metrics_url: str, arguments: argparse.Namespace) -> dict[bool, list[float]]:
    """Output tokens/s of the runs, by whether they were watched."""
    rng = random.Random(0)
    rates: dict[bool, list[float]] = {False: [], True: []}

    def prompts() -> list[str]:
        return [f"{rng.randrange(1000)}+{rng.randrange(1000)}=" for _ in range(arguments.requests)]

    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
        await throughput.run(client, server, prompts(), arguments.callers, arguments.output_tokens)
        for repetition in range(arguments.repetitions):
            for watched in (False, True) if repetition % 2 == 0 else (True, False):
                watcher = asyncio.create_task(watch(client, metrics_url)) if watched else None
                run = await throughput.run(client, server, prompts(), arguments.callers, arguments.output_tokens)
                if watcher is not None:
                    watcher.cancel()
                    with suppress(asyncio.CancelledError):
                        await watcher
                rates[watched].append(run.output_tokens_per_second)
                print(
                    f"{'watched' if watched else 'alone':<8} {run.output_tokens_per_second:>8.1f} tokens/s", flush=True
                )
    return rates


async def watch(client: httpx.AsyncClient, url: str) -> None:
    """Read all metrics, once in a period, until cancelled."""
    while True:
        (await client.get(url)).raise_for_status()
        await asyncio.sleep(PERIOD_SECONDS)


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scraping", description=__doc__)
    parser.add_argument("--callers", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="of a run (default: %(default)s)")
    parser.add_argument("--output_tokens", type=int, default=64, help="of each (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=6, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--model_dir", type=Path, default=ROOT / "demo/model", help="default: the demo model")
    parser.add_argument(
        "--flags", default="--dtype float32", help="of the predictor, in one word (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with servers.predictor("predictor", arguments.model_dir, arguments.flags.split()) as server:
        metrics_url = server.url.removesuffix("/v1") + "/metrics"
        rates = asyncio.run(measure(server, metrics_url, arguments))
    alone, watched = (statistics.median(rates[kind]) for kind in (False, True))
    print(f"median: {alone:.1f} tokens/s alone, {watched:.1f} watched, ratio {watched / alone:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
