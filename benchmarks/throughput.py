"""Measure throughput and latency of servers at increasing concurrency.

Takes any OpenAI servers. With `--model_dir`, starts the predictor and the sequential baseline
(`benchmarks.sequential`) on that model and compares them. `kserve_llm.bench` explains load and figures.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks import servers
from devtools.processes import DemoError
from kserve_llm import bench
from kserve_llm.errors import BenchmarkError


def main() -> int:
    """Run the benchmark and return the exit code."""
    arguments = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load = bench.parse_load(arguments)
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            if arguments.model_dir:
                flags = ["--dtype", arguments.dtype]
                ours = stack.enter_context(servers.predictor("predictor", arguments.model_dir, flags))
                compared = [ours, stack.enter_context(servers.sequential(arguments.model_dir, arguments.dtype))]
            else:
                compared = [bench.find(url, url.rstrip("/")) for url in arguments.urls]
            print(bench.HEADER, file=sys.stderr)
            measurements = asyncio.run(bench.compare(compared, load, arguments.levels, arguments.baseline_levels))
    except (BenchmarkError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    print(f"\nmedians of {load.repetitions} runs, {time.monotonic() - started:.0f} s\n{bench.table(measurements)}")
    if arguments.json:
        settings = asdict(load) | {"dtype": arguments.dtype, "cpus": os.cpu_count()}
        bench.write_json(arguments.json, settings, measurements)
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
        "--baseline_levels",
        type=bench.numbers,
        help="levels for the other servers (default: all; with --model_dir 1,8,32)",
    )
    bench.add_load_flags(parser, levels="1,2,4,8,16,32")
    arguments = parser.parse_args(argv)
    if bool(arguments.urls) == bool(arguments.model_dir):
        parser.error("pass one or more URLs, or --model_dir.")
    if arguments.baseline_levels is None:
        arguments.baseline_levels = [1, 8, 32] if arguments.model_dir else arguments.levels
    return arguments


if __name__ == "__main__":
    sys.exit(main())
