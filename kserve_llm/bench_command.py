"""`kserve-llm bench`: the throughput of a running server, or of a model that is served for the time."""

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kserve_llm import bench, local_server
from kserve_llm.bench import Load
from kserve_llm.errors import BenchmarkError, CommandError
from kserve_llm.local_server import LocalModel

STOPPED = 130
"""Exit code after Ctrl-C, as of shells."""


def is_url(target: str) -> bool:
    """Whether the target of a benchmark is a running server."""
    return target.startswith(("http://", "https://"))


def run_server(url: str, load: Load, levels: Sequence[int], json: Path | None) -> int:
    """Measure a running OpenAI server, at its base URL with or without `/v1`, and return the exit code.

    Raises:
        BenchmarkError: the server lists no model, or a completion failed.
    """
    base = url.rstrip("/")
    try:
        _measure(url, base if base.endswith("/v1") else f"{base}/v1", load, levels, json)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return STOPPED
    return 0


def run_model(model: LocalModel, load: Load, levels: Sequence[int], json: Path | None) -> int:
    """Fetch, verify and serve a model, measure it, and return the exit code.

    Raises:
        BenchmarkError: a completion failed.
    """
    port = local_server.free_port()
    with local_server.running(model, port) as (child, is_ready):
        if not is_ready:
            return child.wait()
        try:
            _measure(model.name, f"{model.url(port)}/v1", load, levels, json)
        except BenchmarkError:
            if not child.is_stopped:
                raise
            # The server ended with the signal.
            print("Stopped.", file=sys.stderr)
            return STOPPED
    return 0


def _measure(name: str, url: str, load: Load, levels: Sequence[int], json: Path | None) -> None:
    started = time.monotonic()
    server = bench.find(name, url)
    print(bench.HEADER, file=sys.stderr)
    measurements = asyncio.run(bench.compare([server], load, levels, levels))
    print(f"\nmedians of {load.repetitions} runs, {time.monotonic() - started:.0f} s\n{bench.table(measurements)}")
    if json:
        try:
            bench.write_json(json, asdict(load) | {"cpus": os.cpu_count()}, measurements)
        except OSError as error:
            raise CommandError(f"{json} cannot be written: {error.strerror}. Pass another file to --json.") from None
