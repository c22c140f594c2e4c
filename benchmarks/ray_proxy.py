"""Measure what Ray Serve's proxy adds to a request: the same predictor behind it, and as a plain server.

Both run the demo model with one thread, on this machine, at the same time. Rounds of requests alternate between them,
so that noise and drift affect both. A request goes to one replica.

    p50, p90    ms from sending a request to the end of its response, or to the first event of a stream
    added       p50 through the proxy minus p50 of the plain server
    requests/s  of `--clients` concurrent clients, for completions of one token
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from ray import serve

from devtools import processes, ray_cluster
from devtools.paths import DEMO_MODEL
from devtools.processes import DemoError
from predictor.entrypoints import ray_serve

MODEL = "demo"
WARM_UP = 5
Send = Callable[[httpx.Client], float]


def _completion(tokens: int, *, stream: bool = False) -> dict[str, Any]:
    sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    return {"model": MODEL, "prompt": "1+1=", **sampling}


def _get(client: httpx.Client) -> float:
    started = time.perf_counter()
    client.get("/v1/models").raise_for_status()
    return time.perf_counter() - started


def _whole(tokens: int) -> Send:
    def send(client: httpx.Client) -> float:
        started = time.perf_counter()
        client.post("/v1/completions", json=_completion(tokens)).raise_for_status()
        return time.perf_counter() - started

    return send


def _first_event(client: httpx.Client) -> float:
    started = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=_completion(16, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        seconds = time.perf_counter() - started
        for _ in lines:
            pass
    return seconds


def _last_event(client: httpx.Client) -> float:
    started = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=_completion(64, stream=True)) as response:
        for _ in response.iter_lines():
            pass
    return time.perf_counter() - started


REQUESTS: dict[str, Send] = {
    "GET /v1/models": _get,
    "completion, 1 token": _whole(1),
    "completion, 64 tokens": _whole(64),
    "first event of a stream": _first_event,
    "stream of 64 tokens": _last_event,
}


def _percentile(seconds: Sequence[float], percent: int) -> float:
    return statistics.quantiles(seconds, n=100)[percent - 1] * 1000


def compare(clients: Sequence[httpx.Client], rounds: int, per_round: int) -> None:
    """Print the latencies of both servers, one request at a time."""
    print(f"{'request':<26} plain_p50 plain_p90 serve_p50 serve_p90 added_ms")
    for name, send in REQUESTS.items():
        measured: list[list[float]] = [[] for _ in clients]
        for client in clients:
            for _ in range(WARM_UP):
                send(client)
        for _ in range(rounds):
            for client, seconds in zip(clients, measured, strict=True):
                seconds += [send(client) for _ in range(per_round)]
        plain, served = ([_percentile(each, percent) for percent in (50, 90)] for each in measured)
        figures = [*plain, *served, served[0] - plain[0]]
        print(f"{name:<26} " + " ".join(f"{figure:>9.2f}" for figure in figures), flush=True)


def compare_throughput(clients: Sequence[httpx.Client], rounds: int, per_round: int, concurrency: int) -> None:
    """Print the requests/s of both servers with concurrent clients."""
    rates: list[list[float]] = [[] for _ in clients]
    send = _whole(1)
    with ThreadPoolExecutor(concurrency) as pool:
        for _ in range(rounds):
            for client, measured in zip(clients, rates, strict=True):
                started = time.perf_counter()
                list(pool.map(send, [client] * per_round))
                measured.append(per_round / (time.perf_counter() - started))
    plain, served = (statistics.median(each) for each in rates)
    print(f"{concurrency} clients: {plain:.0f} requests/s plain, {served:.0f} through Serve")


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_proxy", description="Measure Ray Serve's proxy.")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each server (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=10, help="requests per round (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="concurrent clients (default: %(default)s)")
    arguments = parser.parse_args()
    settings = {"model_dir": str(DEMO_MODEL), "dtype": "float32", "num_threads": "1", "log_level": "WARNING"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    print(json.dumps({"cpus": os.cpu_count(), "load": os.getloadavg()[0], **vars(arguments)}))
    try:
        with (
            processes.predictor(flags, model_name=MODEL, port=processes.free_port()) as plain,
            ray_cluster.running(nodes=1) as serve_url,
            httpx.Client(base_url=plain.url, timeout=60, trust_env=False) as plain_client,
            httpx.Client(base_url=serve_url, timeout=60, trust_env=False) as serve_client,
        ):
            serve.run(ray_serve.app({**settings, "served_model_name": MODEL}))
            clients = (plain_client, serve_client)
            compare(clients, arguments.rounds, arguments.requests)
            compare_throughput(clients, arguments.rounds, arguments.requests * 5, arguments.clients)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
