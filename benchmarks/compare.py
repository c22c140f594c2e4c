"""The predictor, in 8 bits and in bfloat16, beside one-request-at-a-time and a peer, on one model in one run.

`python -m benchmarks.compare --model_dir DIR --peer 'vllm serve {model_dir} --port {port}'` starts them all, lets them
take turns as `benchmarks.throughput` does, and prints output tokens/s and the ratios of the medians.
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
"""Values of --quantization, each a server of its own."""


def table(measurements: Sequence[Measurement], others: Sequence[str]) -> str:
    """Lines for each concurrency: tokens/s of each server, and each of ours over each of the others."""
    lines = []
    for level in sorted({each.concurrency for each in measurements}):
        speed = {
            each.server: each.median.output_tokens_per_second for each in measurements if each.concurrency == level
        }
        noise = {each.server: each.spread_percent for each in measurements if each.concurrency == level}
        lines.append(f"{level} callers")
        lines += [f"  {name:<12} {rate:>7.1f} tokens/s, spread {noise[name]:.0f} %" for name, rate in speed.items()]
        lines += [
            f"  {ours} / {other}: {speed[ours] / speed[other]:.2f}"
            for ours in OURS
            for other in others
            if other in speed
        ]
    return "\n".join(lines)


def main() -> int:
    """Start, measure and print; the exit code."""
    arguments = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load = Load(64, 64, requests=4, repetitions=arguments.repetitions, seed=random.randrange(2**32))
    try:
        with ExitStack() as stack:
            started = [
                stack.enter_context(
                    servers.predictor(word, arguments.model_dir, ["--quantization", word, *arguments.flags.split()])
                )
                for word in OURS
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
    print(f"\nmedians of {load.repetitions} runs each, 64 tokens in and 64 out")
    print(table(measurements, [server.name for server in started[len(OURS) :]]))
    if arguments.json:
        result = {"cpus": os.cpu_count(), "measurements": [asdict(each) for each in measurements]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--peer", metavar="COMMAND", help="another OpenAI server, with {model_dir} and {port} in it")
    parser.add_argument("--flags", default="", help="more flags of the predictor, in one word")
    parser.add_argument(
        "--levels",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 8, 32],
        help="concurrencies (default: 1,8,32)",
    )
    parser.add_argument("--repetitions", type=int, default=3, help="runs at each level (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, each run's too, to FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
