"""Load on OpenAI servers, and what it measures: throughput and latency at increasing concurrency.

Sends streamed OpenAI completions. The load is a closed loop: each of C concurrent clients sends its next request when
the previous one is complete.

    output tokens/s  completion tokens of a run, counted by the server, over the wall time from the first request sent
                     to the last one completed
    TTFT             ms from sending a request to its first text that is not empty
    ITL              ms between two text events of a request; one token each if the server sends every token; 0 where
                     a few tokens came in one event
    client CPU       CPU time of this program over the wall time of the run, in percent of one core
    spread           highest minus lowest output tokens/s of a server's runs, in percent of the median
    ratio            output tokens/s of the first server over those of this server, at the same concurrency

Percentiles are nearest-rank, over the requests (TTFT) or the gaps (ITL) of one run. The servers alternate (A B B A …),
so that noise and drift of the machine affect all of them. The table has medians over a server's runs, per column.
Prompts are unique, so that prefix caches do not help. An incomplete completion ends the benchmark.
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2

from kserve_llm.errors import BenchmarkError

API_KEY_VARIABLE = "OPENAI_API_KEY"
"""Variable of OpenAI's clients, for servers that need a key."""
CONNECT_SECONDS = 30
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


@dataclass(frozen=True, slots=True, eq=False)
class Server:
    """A server: base URL including `/v1`, and the model's name in requests.

    Equality is identity, so that a server can be compared with itself to measure noise.
    """

    name: str
    url: str
    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request; null removes one."""
    process_id: int | None = None
    """Of the process that was started for it."""


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


def find(name: str, url: str) -> Server:
    """Return the server at `url` with the first model that it lists.

    Raises:
        BenchmarkError: it lists none.
    """
    try:
        response = httpx2.get(f"{url}/models", headers=_headers(), timeout=CONNECT_SECONDS, trust_env=False)
        return Server(name, url, response.raise_for_status().json()["data"][0]["id"])
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise BenchmarkError(
            f"{url}/models lists no model; pass the base URL of an OpenAI server, with /v1: {error}"
        ) from None


def make_client() -> httpx2.AsyncClient:
    """Return a client for any number of concurrent requests, each with a connection of its own.

    llama.cpp closes a connection after a stream, and a server that was suspended may close one that is idle.
    """
    return httpx2.AsyncClient(
        headers=_headers(),
        timeout=httpx2.Timeout(CONNECT_SECONDS, read=READ_TIMEOUT_SECONDS),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
    )


def _headers() -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def word(index: int) -> str:
    """Return the text of token `index` for the models of `benchmarks.make_model`."""
    return f" w{index}"


def make_prompts(rng: random.Random, number: int, words: int) -> list[str]:
    """Return `number` prompts of `words` random words each."""
    return ["".join(word(rng.randrange(WORDS)) for _ in range(words)) for _ in range(number)]


def make_token_prompts(rng: random.Random, number: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Return `number` prompts of `tokens` random token ids each: from 1 on, below `vocabulary` and `WORDS`."""
    return [[rng.randrange(1, min(WORDS, vocabulary)) for _ in range(tokens)] for _ in range(number)]


async def complete(client: httpx2.AsyncClient, server: Server, prompt: Prompt, output_tokens: int) -> Completion:
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
                for event in _events(lines):
                    if "error" in event:
                        raise BenchmarkError(f"{server.name} failed in a stream: {event['error']}")
                    if any(choice["text"] for choice in event.get("choices", ())):
                        arrivals.append(now)
                    usage = event.get("usage") or usage
    except (httpx2.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{server.name} sent an incomplete response: {error!r}") from error
    if not usage.keys() >= {"prompt_tokens", "completion_tokens"}:
        raise BenchmarkError(f"{server.name} sent no usage; it must support stream_options.include_usage.")
    if usage["completion_tokens"] != output_tokens:
        raise BenchmarkError(
            f"{server.name} generated {usage['completion_tokens']} of {output_tokens} tokens; "
            "it must support max_tokens and ignore_eos."
        )
    if not arrivals:
        raise BenchmarkError(f"{server.name} sent no text.")
    return Completion(sent, arrivals, usage["prompt_tokens"], usage["completion_tokens"])


def _events(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith(b"data:") and not line.strip().endswith(b"[DONE]"):
            yield json.loads(line.removeprefix(b"data:"))


async def run(
    client: httpx2.AsyncClient, server: Server, prompts: Sequence[Prompt], concurrency: int, output_tokens: int
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


async def count_words(client: httpx2.AsyncClient, server: Server, rng: random.Random, input_tokens: int) -> int:
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


def table(measurements: Sequence[Measurement]) -> str:
    """Return the medians as a table."""
    rows = [
        f"{row(one.server, one.concurrency, one.median)} {one.spread_percent:>8.0f} {one.ratio:>5.2f}"
        for one in measurements
    ]
    return "\n".join([HEADER, *rows])


def write_json(file: Path, settings: Mapping[str, Any], measurements: Sequence[Measurement]) -> None:
    """Write all figures of all runs, with the settings of the benchmark."""
    content = {"settings": settings, "measurements": [asdict(one) for one in measurements]}
    file.write_text(json.dumps(content, indent=2) + "\n")


def add_load_flags(parser: argparse.ArgumentParser, *, levels: str) -> None:
    """Add the flags of a load and of its levels of concurrency; `parse_load` reads them."""
    parser.add_argument(
        "--levels", type=numbers, default=numbers(levels), help=f"concurrency levels (default: {levels})"
    )
    parser.add_argument(
        "--requests",
        type=_number,
        default=4,
        help="requests per run, at least one per client (default: %(default)s)",
    )
    parser.add_argument(
        "--input_tokens", "--input-tokens", type=_number, default=64, help="tokens per prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--output_tokens",
        "--output-tokens",
        type=_number,
        default=64,
        help="tokens per completion (default: %(default)s)",
    )
    parser.add_argument("--repetitions", type=_number, default=2, help="runs per level (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of the prompts (default: random)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures of all runs to FILE")


def parse_load(arguments: argparse.Namespace) -> Load:
    """Return the load of parsed flags."""
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    return Load(arguments.input_tokens, arguments.output_tokens, arguments.requests, arguments.repetitions, seed)


def numbers(text: str) -> list[int]:
    """Parse positive numbers that are separated by commas."""
    return [_number(part) for part in text.split(",")]


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)
