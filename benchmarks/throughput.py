"""Measure throughput and latency of servers at increasing concurrency.

Sends streamed OpenAI completions to any server. With `--model_dir`, starts the predictor and the sequential baseline
(`benchmarks.sequential`) on that model and compares them. The load is a closed loop: each of C concurrent clients sends
its next request when the previous one is complete.

    output tokens/s  completion tokens of a run, counted by the server, over the wall time from the first request sent
                     to the last one completed
    TTFT             ms from sending a request to its first text that is not empty
    ITL              ms between two text events of a request; one token each if the server sends every token; 0 where
                     a few tokens came in one event
    client CPU       CPU time of this program over the wall time of the run, in percent of one core
    spread           highest minus lowest output tokens/s of a server's runs, in percent of the median
    ratio            output tokens/s of the first server over those of this server, at the same concurrency

Percentiles are nearest-rank, over the requests (TTFT) or the gaps (ITL) of one run. The servers alternate (A B B A …),
so that noise and drift of the machine affect all of them. The final table has medians over a server's runs, per column.
Prompts are unique, so that prefix caches do not help. An incomplete completion ends the benchmark.
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
"""Size of the prompts' vocabulary; a word is one token for the models of `benchmarks.make_model`."""
WARM_UP_TOKENS = 4
FEW_TOKENS = 16
"""A completion of no more may arrive in one event: a decoder holds bytes back until they are a character, and a server
sends the tokens of several steps together where its event loop is late."""
READ_TIMEOUT_SECONDS = 600
"""Longest wait for the next event; a sequential server finishes all earlier requests first."""
Prompt = str | Sequence[int]
HEADER = f"{'server':<24} concurrency requests tokens/s TTFT_p50 TTFT_p99  ITL_p50  ITL_p99 client_CPU_% spread_% ratio"


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of a benchmark."""

    input_tokens: int
    """Tokens per prompt."""
    output_tokens: int
    """Tokens per completion."""
    requests: int
    """Requests per run; at least one per client."""
    repetitions: int
    """Runs per server and concurrency."""
    seed: int
    """Seed of the prompts."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One completed request; times by `time.perf_counter()`, in seconds."""

    sent: float
    arrivals: list[float]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """Figures of one run of one server at one concurrency."""

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
    """All runs of one server at one concurrency."""

    server: str
    concurrency: int
    median: Run
    """Median of each figure over the runs."""
    spread_percent: float
    """Highest minus lowest output tokens/s of the runs, over their median."""
    ratio: float
    """Median output tokens/s of the first server over those of this server."""
    runs: list[Run]


def word(index: int) -> str:
    """Return the text of token `index` for the models of `benchmarks.make_model`."""
    return f" w{index}"


def make_prompts(rng: random.Random, number: int, words: int) -> list[str]:
    """Return `number` prompts of `words` random words each."""
    return ["".join(word(rng.randrange(WORDS)) for _ in range(words)) for _ in range(number)]


def make_token_prompts(rng: random.Random, number: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Return `number` prompts of `tokens` random token ids each: from 1 on, below `vocabulary` and `WORDS`."""
    return [[rng.randrange(1, min(WORDS, vocabulary)) for _ in range(tokens)] for _ in range(number)]


async def complete(client: httpx.AsyncClient, server: Server, prompt: Prompt, output_tokens: int) -> Completion:
    """Complete one prompt, a text or token ids, greedy and ignoring the end of sequence.

    Raises:
        BenchmarkError: the completion does not have exactly `output_tokens`.
    """
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **server.fields,
    }
    arrivals: list[float] = []
    usage: dict[str, int] = {}
    rest = b""
    sent = time.perf_counter()
    try:
        async with client.stream("POST", f"{server.url}/completions", json=body) as response:
            if response.is_error:
                content = (await response.aread()).decode(errors="replace")
                raise BenchmarkError(f"{server.name} returned {response.status_code}: {content[:300]}")
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
        raise BenchmarkError(f"{server.name} sent an incomplete response: {error!r}") from error
    if not usage:
        raise BenchmarkError(f"{server.name} sent no usage; it must support stream_options.include_usage.")
    if usage["completion_tokens"] != output_tokens:
        raise BenchmarkError(
            f"{server.name} generated {usage['completion_tokens']} of {output_tokens} tokens; "
            "it must support max_tokens and ignore_eos."
        )
    if not arrivals:
        raise BenchmarkError(f"{server.name} sent no text.")
    return Completion(sent, arrivals, usage["prompt_tokens"], usage["completion_tokens"])


def make_client() -> httpx.AsyncClient:
    """Return a client for any number of concurrent requests, each with a connection of its own.

    llama.cpp closes a connection after a stream, and a server that was suspended may close one that is idle.
    """
    return httpx.AsyncClient(
        timeout=httpx.Timeout(CONNECT_SECONDS, read=READ_TIMEOUT_SECONDS),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
    )


async def run(
    client: httpx.AsyncClient, server: Server, prompts: Sequence[Prompt], concurrency: int, output_tokens: int
) -> Run:
    """Complete all prompts with `concurrency` clients.

    Raises:
        BenchmarkError: a completion failed; the others are cancelled. Or each completion came in one event, although
            they have more than `FEW_TOKENS`.
    """
    waiting = iter(prompts)
    completions: list[Completion] = []

    async def send_requests() -> None:
        completions.extend([await complete(client, server, prompt, output_tokens) for prompt in waiting])

    cpu_started, started = time.process_time(), time.perf_counter()
    try:
        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(send_requests())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    wall = time.perf_counter() - started
    cpu = time.process_time() - cpu_started

    generated = sum(completion.completion_tokens for completion in completions)
    ttft = sorted((completion.arrivals[0] - completion.sent) * 1000 for completion in completions)
    gaps = sorted(
        (after - before) * 1000 for completion in completions for before, after in pairwise(completion.arrivals)
    )
    if not gaps and output_tokens > FEW_TOKENS:
        raise BenchmarkError(f"{server.name} sent each text in one event; it must stream.")
    return Run(
        requests=len(completions),
        input_tokens=sum(completion.prompt_tokens for completion in completions),
        output_tokens=generated,
        wall_seconds=wall,
        output_tokens_per_second=generated / wall,
        ttft_p50_ms=percentile(ttft, 50),
        ttft_p99_ms=percentile(ttft, 99),
        itl_p50_ms=percentile(gaps or [0.0], 50),
        itl_p99_ms=percentile(gaps or [0.0], 99),
        client_cpu_percent=100 * cpu / wall,
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile, without interpolation."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


async def compare(
    compared: Sequence[Server], load: Load, levels: Sequence[int], baseline_levels: Sequence[int]
) -> list[Measurement]:
    """Measure the first server at all `levels`, the others at `baseline_levels` only.

    Each level starts with one short warm-up request per client.
    """
    rng = random.Random(load.seed)
    measurements = []
    async with make_client() as client:
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
    """Return the number of words that give a prompt of `input_tokens`; exact if a word is a token."""
    (prompt,) = make_prompts(rng, 1, input_tokens)
    completion = await complete(client, server, prompt, WARM_UP_TOKENS)
    return max(1, round(input_tokens * input_tokens / completion.prompt_tokens))


def summarize(server: str, concurrency: int, runs: list[Run], runs_of_first: list[Run]) -> Measurement:
    """Summarize the runs of one server."""
    middle = median(runs)
    rates = [run.output_tokens_per_second for run in runs]
    return Measurement(
        server,
        concurrency,
        middle,
        spread_percent=100 * (max(rates) - min(rates)) / middle.output_tokens_per_second,
        ratio=median(runs_of_first).output_tokens_per_second / middle.output_tokens_per_second,
        runs=runs,
    )


def median(runs: Sequence[Run]) -> Run:
    """Return the median of each figure over the runs."""
    return Run(*(statistics.median(getattr(run, field.name) for run in runs) for field in fields(Run)))


def row(server: str, concurrency: int, run: Run) -> str:
    """Return a table row below `HEADER`, without the last two columns."""
    return (
        f"{server:<24} {concurrency:>11} {run.requests:>8} {run.output_tokens_per_second:>8.1f}"
        f" {run.ttft_p50_ms:>8.0f} {run.ttft_p99_ms:>8.0f} {run.itl_p50_ms:>8.1f} {run.itl_p99_ms:>8.1f}"
        f" {run.client_cpu_percent:>12.1f}"
    )


def main() -> int:
    """Run the benchmark and return the exit code."""
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
    print(f"\nmedians of {load.repetitions} runs, {time.monotonic() - started:.0f} s\n{HEADER}")
    for result in measurements:
        columns = row(result.server, result.concurrency, result.median)
        print(columns, f"{result.spread_percent:>8.0f} {result.ratio:>5.2f}")
    if arguments.json:
        settings = asdict(load) | {"dtype": arguments.dtype, "cpus": os.cpu_count()}
        content = {"settings": settings, "measurements": [asdict(result) for result in measurements]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "urls",
        metavar="URL",
        nargs="*",
        help="base URL of an OpenAI server, with /v1; ratios are relative to the first",
    )
    parser.add_argument("--model_dir", type=Path, help="start the predictor and the baseline on this model instead")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of both, with --model_dir",
    )
    parser.add_argument(
        "--levels", type=_numbers, default=_numbers("1,2,4,8,16,32"), help="concurrency levels (default: 1,2,4,8,16,32)"
    )
    parser.add_argument(
        "--baseline_levels",
        type=_numbers,
        help="levels for the other servers (default: all; with --model_dir 1,8,32)",
    )
    parser.add_argument(
        "--requests",
        type=_number,
        default=4,
        help="requests per run, at least one per client (default: %(default)s)",
    )
    parser.add_argument("--input_tokens", type=_number, default=64, help="tokens per prompt (default: %(default)s)")
    parser.add_argument(
        "--output_tokens", type=_number, default=64, help="tokens per completion (default: %(default)s)"
    )
    parser.add_argument("--repetitions", type=_number, default=2, help="runs per level (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of the prompts (default: random)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures of all runs to FILE")
    arguments = parser.parse_args(argv)
    if bool(arguments.urls) == bool(arguments.model_dir):
        parser.error("pass one or more URLs, or --model_dir.")
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
