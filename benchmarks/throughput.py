"""How many tokens a second a server makes, and how long its users wait for them, at growing concurrency.

Asks any server that speaks OpenAI's streamed completions, or, with `--model_dir`, starts the predictor and the
sequential baseline (`benchmarks.sequential`) on that model and compares them. A closed loop: at concurrency C there are
C callers, each of which sends its next request when its last one has been answered.

    output tokens/s  tokens of all completions of a run, as the server counts them, over the run's wall time from the
                     first request sent to the last one answered
    TTFT             ms from sending a request to its first piece of text that is not empty
    ITL              ms from one piece of text of a request to the next; a piece is a token where the server sends
                     each by itself
    client CPU       CPU time of this program over the wall time of the run, in percent of one core
    spread           of output tokens/s over a server's runs, highest less lowest in percent of the median: the noise
    ratio            output tokens/s of the first server over those of this one, at the same concurrency

Percentiles are nearest-rank, over the requests (TTFT) or the gaps (ITL) of one run. A run is one server at one
concurrency. The servers take turns, A B B A …, so that noise and drift of the machine hit all alike; what is printed at
the end is the median over a server's runs, of each column by itself. No prompt comes twice, so that no server profits
from what it remembers. A request that is not answered in full ends the benchmark.
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import httpx

from benchmarks import servers
from benchmarks.servers import CONNECT_SECONDS, BenchmarkError, Server
from devtools.processes import DemoError

WORDS = 2000
"""Prompts are drawn from so many different words; each is one token for the models of `benchmarks.make_model`."""
WARM_UP_TOKENS = 4
ANSWER_SECONDS = 600
"""How long a request may wait for its next piece: with a sequential server, until all before it are done."""
KEEP_ALIVE_SECONDS = 2
"""Less than servers keep an idle connection, so that none is closed just when a request is sent on it."""
HEADER = f"{'server':<24} concurrency requests tokens/s TTFT_p50 TTFT_p99  ITL_p50  ITL_p99 client_CPU_% spread_% ratio"


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked."""

    input_tokens: int
    """Of each prompt."""
    output_tokens: int
    """Of each completion."""
    requests: int
    """Of a run, at least; never fewer than callers."""
    repetitions: int
    """Runs of a server at one concurrency."""
    seed: int
    """Of the prompts."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answered request: when it was sent and when each piece of text arrived, in seconds of one clock."""

    sent: float
    arrivals: list[float]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """The numbers of one server at one concurrency; times in ms where the name does not say otherwise."""

    requests: int
    input_tokens: int
    output_tokens: int
    wall_seconds: float
    output_tokens_per_second: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    client_cpu_percent: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """One server at one concurrency."""

    server: str
    concurrency: int
    median: Run
    """Of each number over the runs."""
    spread_percent: float
    """Highest less lowest output tokens/s of the runs, over their median."""
    ratio: float
    """Median output tokens/s of the first server over those of this one; 1 for the first itself."""
    runs: list[Run]


def word(index: int) -> str:
    """The text of token `index`, for the models of `benchmarks.make_model`."""
    return f"w{index}"


def make_prompts(rng: random.Random, number: int, words: int) -> list[str]:
    """So many prompts of so many random words."""
    return [" ".join(word(rng.randrange(WORDS)) for _ in range(words)) for _ in range(number)]


async def complete(client: httpx.AsyncClient, server: Server, prompt: str, output_tokens: int) -> Completion:
    """Have one prompt completed, greedily and past any end of text.

    Raises:
        BenchmarkError: no complete answer with exactly `output_tokens`.
    """
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    arrivals: list[float] = []
    usage: dict[str, int] = {}
    rest = b""
    sent = time.perf_counter()
    try:
        async with client.stream("POST", f"{server.url}/completions", json=body) as response:
            if response.is_error:
                answer = (await response.aread()).decode(errors="replace")
                raise BenchmarkError(f"{server.name} answered {response.status_code}: {answer[:300]}")
            async for block in response.aiter_bytes():
                now = time.perf_counter()
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:") or line.strip().endswith(b"[DONE]"):
                        continue
                    event = json.loads(line.removeprefix(b"data:"))
                    if "error" in event:
                        raise BenchmarkError(f"{server.name} failed in a stream: {event['error']}")
                    if any(choice["text"] for choice in event.get("choices", ())):
                        arrivals.append(now)
                    usage = event.get("usage") or usage
    except (httpx.HTTPError, ValueError) as error:
        raise BenchmarkError(f"{server.name} did not answer in full: {error!r}") from error
    if not usage:
        raise BenchmarkError(f"{server.name} sent no usage; it has to honour stream_options.include_usage.")
    if usage["completion_tokens"] != output_tokens:
        raise BenchmarkError(
            f"{server.name} made {usage['completion_tokens']} tokens where {output_tokens} were asked for; "
            "it has to honour max_tokens and ignore_eos."
        )
    if len(arrivals) < 2:
        raise BenchmarkError(f"{server.name} sent its text in {len(arrivals)} piece(s); it has to stream.")
    return Completion(sent, arrivals, usage["prompt_tokens"], usage["completion_tokens"])


async def run(
    client: httpx.AsyncClient, server: Server, prompts: Sequence[str], concurrency: int, output_tokens: int
) -> Run:
    """Have all prompts completed by `concurrency` callers.

    Raises:
        BenchmarkError: one of them was not; the others are given up.
    """
    waiting = iter(prompts)
    completions: list[Completion] = []

    async def call() -> None:
        completions.extend([await complete(client, server, prompt, output_tokens) for prompt in waiting])

    cpu_started, started = time.process_time(), time.perf_counter()
    try:
        async with asyncio.TaskGroup() as callers:
            for _ in range(concurrency):
                callers.create_task(call())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    wall = time.perf_counter() - started
    cpu = time.process_time() - cpu_started

    made = sum(completion.completion_tokens for completion in completions)
    first = sorted((completion.arrivals[0] - completion.sent) * 1000 for completion in completions)
    gaps = sorted((after - before) * 1000 for each in completions for before, after in pairwise(each.arrivals))
    return Run(
        requests=len(completions),
        input_tokens=sum(completion.prompt_tokens for completion in completions),
        output_tokens=made,
        wall_seconds=wall,
        output_tokens_per_second=made / wall,
        ttft_p50_ms=percentile(first, 50),
        ttft_p99_ms=percentile(first, 99),
        itl_p50_ms=percentile(gaps, 50),
        itl_p99_ms=percentile(gaps, 99),
        client_cpu_percent=100 * cpu / wall,
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of 100 values do not exceed: nearest-rank, nothing interpolated."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


async def compare(
    compared: Sequence[Server], load: Load, levels: Sequence[int], baseline_levels: Sequence[int]
) -> list[Measurement]:
    """Measure the first server at all `levels`, the others at those that are `baseline_levels` too.

    At each level, a server is first warmed up by as many short requests at once as there are callers.
    """
    rng = random.Random(load.seed)
    measurements = []
    async with httpx.AsyncClient(
        timeout=httpx.Timeout(CONNECT_SECONDS, read=ANSWER_SECONDS),
        limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS),
        trust_env=False,
    ) as client:
        words = {server: await count_words(client, server, rng, load.input_tokens) for server in compared}
        for concurrency in levels:
            measured = compared if concurrency in baseline_levels else compared[:1]
            for server in measured:
                prompts = make_prompts(rng, concurrency, words[server])
                await run(client, server, prompts, concurrency, WARM_UP_TOKENS)
            runs: dict[Server, list[Run]] = {server: [] for server in measured}
            for repetition in range(load.repetitions):
                for server in measured if repetition % 2 == 0 else reversed(measured):
                    prompts = make_prompts(rng, max(load.requests, concurrency), words[server])
                    runs[server].append(await run(client, server, prompts, concurrency, load.output_tokens))
                    print(row(server.name, concurrency, runs[server][-1]), file=sys.stderr, flush=True)
            measurements += [
                summarize(server.name, concurrency, runs[server], runs[compared[0]]) for server in measured
            ]
    return measurements


async def count_words(client: httpx.AsyncClient, server: Server, rng: random.Random, input_tokens: int) -> int:
    """How many words make a prompt of so many tokens there; exact where a word is a token."""
    (prompt,) = make_prompts(rng, 1, input_tokens)
    completion = await complete(client, server, prompt, WARM_UP_TOKENS)
    return max(1, round(input_tokens * input_tokens / completion.prompt_tokens))


def summarize(server: str, concurrency: int, runs: list[Run], runs_of_first: list[Run]) -> Measurement:
    """Medians, noise, and the ratio to the first server."""
    middle = median(runs)
    speeds = [each.output_tokens_per_second for each in runs]
    return Measurement(
        server,
        concurrency,
        middle,
        spread_percent=100 * (max(speeds) - min(speeds)) / middle.output_tokens_per_second,
        ratio=median(runs_of_first).output_tokens_per_second / middle.output_tokens_per_second,
        runs=runs,
    )


def median(runs: Sequence[Run]) -> Run:
    """Of each number by itself."""
    return Run(*(field.type(statistics.median(getattr(each, field.name) for each in runs)) for field in fields(Run)))


def row(server: str, concurrency: int, of: Run) -> str:
    """One line below `HEADER`, without the last two columns."""
    return (
        f"{server:<24} {concurrency:>11} {of.requests:>8} {of.output_tokens_per_second:>8.1f}"
        f" {of.ttft_p50_ms:>8.0f} {of.ttft_p99_ms:>8.0f} {of.itl_p50_ms:>8.1f} {of.itl_p99_ms:>8.1f}"
        f" {of.client_cpu_percent:>12.1f}"
    )


def main() -> int:
    """Measure and print; the exit code."""
    arguments = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load = Load(**{field.name: getattr(arguments, field.name) for field in fields(Load)})
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            if arguments.model_dir:
                flags = ["--dtype", arguments.dtype]
                ours = stack.enter_context(servers.predictor("predictor", arguments.model_dir, flags))
                compared = [ours, stack.enter_context(servers.sequential(arguments.model_dir, arguments.dtype))]
            else:
                compared = [servers.find(url, url.rstrip("/")) for url in arguments.urls]
            print(HEADER, file=sys.stderr)
            measurements = asyncio.run(compare(compared, load, arguments.levels, arguments.baseline_levels))
    except (BenchmarkError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    print(f"\nmedian of {load.repetitions} runs each, {time.monotonic() - started:.0f} s in all\n{HEADER}")
    for each in measurements:
        print(row(each.server, each.concurrency, each.median), f"{each.spread_percent:>8.0f} {each.ratio:>5.2f}")
    if arguments.json:
        settings = asdict(load) | {"dtype": arguments.dtype, "cpus": os.cpu_count()}
        result = {"settings": settings, "measurements": [asdict(each) for each in measurements]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("urls", metavar="URL", nargs="*", help="an OpenAI server, up to /v1; ratios are to the first")
    parser.add_argument("--model_dir", type=Path, help="start the predictor and the baseline on this model instead")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of both, with --model_dir"
    )
    parser.add_argument(
        "--levels", type=_numbers, default=_numbers("1,2,4,8,16,32"), help="concurrencies (default: 1,2,4,8,16,32)"
    )
    parser.add_argument(
        "--baseline_levels",
        type=_numbers,
        help="levels at which the servers after the first are measured too (default: all; with --model_dir 1,8,32)",
    )
    parser.add_argument(
        "--requests",
        type=_number,
        default=4,
        help="of a run, at least; never fewer than callers (default: %(default)s)",
    )
    parser.add_argument("--input_tokens", type=_number, default=64, help="of each prompt (default: %(default)s)")
    parser.add_argument("--output_tokens", type=_number, default=64, help="of each completion (default: %(default)s)")
    parser.add_argument("--repetitions", type=_number, default=2, help="runs at each level (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the prompts (default: another one each time)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, each run's too, to FILE")
    arguments = parser.parse_args(argv)
    if bool(arguments.urls) == bool(arguments.model_dir):
        parser.error("name either one or more URLs, or --model_dir.")
    if arguments.baseline_levels is None:
        arguments.baseline_levels = [1, 8, 32] if arguments.model_dir else arguments.levels
    if arguments.seed is None:
        arguments.seed = random.randrange(2**32)
    return arguments


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
