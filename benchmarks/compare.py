"""Compare the predictor (8-bit and unquantized) with the sequential baseline and a peer, in one run.

`python -m benchmarks.compare --model_dir DIR --peer 'vllm serve {model_dir} --port {port}'` starts all servers,
measures them in turns as `benchmarks.throughput` does, and prints output tokens/s and the ratios of the medians.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks import servers, throughput
from benchmarks.servers import BenchmarkError
from benchmarks.throughput import Load, Measurement
from devtools.processes import DemoError

OURS = ("8bit", "none")
"""Values of --quantization; one server for each."""


def table(measurements: Sequence[Measurement], others: Sequence[str]) -> str:
    """Return the tokens/s of each server and the ratios of ours to the others, per concurrency."""
    lines = []
    for level in sorted({measurement.concurrency for measurement in measurements}):
        results = {measurement.server: measurement for measurement in measurements if measurement.concurrency == level}
        rates = {name: result.median.output_tokens_per_second for name, result in results.items()}
        lines.append(f"concurrency {level}")
        lines += [
            f"  {name:<12} {rate:>7.1f} tokens/s, spread {results[name].spread_percent:.0f} %"
            for name, rate in rates.items()
        ]
        lines += [
            f"  {ours} / {other}: {rates[ours] / rates[other]:.2f}"
            for ours in OURS
            for other in others
            if other in rates
        ]
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark and return the exit code."""
    arguments = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load = Load(64, 64, requests=4, repetitions=arguments.repetitions, seed=random.randrange(2**32))
    try:
        with ExitStack() as stack:
            started = [
                stack.enter_context(
                    servers.predictor(mode, arguments.model_dir, ["--quantization", mode, *arguments.flags.split()])
                )
                for mode in OURS
            ]
            if arguments.peer:
                started.append(stack.enter_context(servers.peer(arguments.peer, arguments.model_dir)))
            started.append(stack.enter_context(servers.sequential(arguments.model_dir, "auto")))
            print(throughput.HEADER, file=sys.stderr)
            measurements = asyncio.run(throughput.compare(started, load, arguments.levels, arguments.levels))
    except (BenchmarkError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    print(f"\nmedians of {load.repetitions} runs, 64 input and 64 output tokens")
    print(table(measurements, [server.name for server in started[len(OURS) :]]))
    if arguments.json:
        result = {"cpus": os.cpu_count(), "measurements": [asdict(measurement) for measurement in measurements]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument(
        "--peer", metavar="COMMAND", help="command of another OpenAI server, with {model_dir} and {port}"
    )
    parser.add_argument("--flags", default="", help="further flags of the predictor, as one argument")
    parser.add_argument(
        "--levels",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 8, 32],
        help="concurrency levels (default: 1,8,32)",
    )
    parser.add_argument("--repetitions", type=int, default=3, help="runs per level (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures of all runs to FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
