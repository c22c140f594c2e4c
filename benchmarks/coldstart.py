"""Measure the time from process start to readiness, by phase, next to a peer.

`python -m benchmarks.coldstart --model_dir DIR --peer 'vllm serve {model_dir} --port {port}'` starts each server
`--repetitions` times with a warm page cache and prints medians. The reference is a Python process that only imports
torch, transformers and kserve.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import httpx

from benchmarks import servers
from devtools.processes import DemoError
from kserve_llm.bench import Server
from kserve_llm.errors import BenchmarkError

IMPORTS = "import torch, transformers, kserve"
_PHASE = re.compile(r'^kserve_llm_load_phase_seconds\{.*phase="(\w+)".*\} (\S+)$', re.MULTILINE)


def main() -> int:
    """Run the benchmark and return the exit code."""
    arguments = parse(sys.argv[1:])
    modes = {f"predictor, {mode}": mode for mode in arguments.quantization.split(",")}
    seconds: dict[str, list[float]] = {}
    phases: dict[str, list[dict[str, float]]] = {}
    try:
        for repetition in range(arguments.repetitions + 1):
            starts: dict[str, float] = {"imports": imports()}
            start_phases: dict[str, dict[str, float]] = {}
            for name, mode in modes.items():
                flags = ["--quantization", mode, *arguments.flags.split()]
                starts[name], start_phases[name] = start(servers.predictor(name, arguments.model_dir, flags))
            if arguments.peer and repetition:
                starts["peer"], _ = start(servers.peer(arguments.peer, arguments.model_dir))
            print({name: round(value, 2) for name, value in starts.items()}, file=sys.stderr)
            if repetition:  # the first one fills the page cache
                for name, value in starts.items():
                    seconds.setdefault(name, []).append(value)
                for name, values in start_phases.items():
                    phases.setdefault(name, []).append(values)
    except (BenchmarkError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"medians of {arguments.repetitions} starts, warm page cache")
    for name, ready in medians.items():
        to_peer = f", {ready / medians['peer']:.3f} x the peer" if name in modes and arguments.peer else ""
        print(f"{name:<18} {ready:>6.2f} s, {ready / medians['imports']:.2f} x the imports{to_peer}")
        if name in phases:
            middle = {phase: statistics.median(values[phase] for values in phases[name]) for phase in phases[name][0]}
            print("  " + ", ".join(f"{phase} {value:.2f}" for phase, value in middle.items()))
    return 0


def imports() -> float:
    """Return the seconds that the bare imports take."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.monotonic() - began


def start(server: AbstractContextManager[Server]) -> tuple[float, dict[str, float]]:
    """Start and stop a server; return the seconds until it is ready, in total and by phase."""
    began = time.monotonic()
    with server as running:
        seconds = time.monotonic() - began
        text = httpx.get(running.url.removesuffix("/v1") + "/metrics", trust_env=False, timeout=30).text
        return seconds, {phase: float(value) for phase, value in _PHASE.findall(text)}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coldstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument(
        "--peer", metavar="COMMAND", help="command of another OpenAI server, with {model_dir} and {port}"
    )
    parser.add_argument("--quantization", default="8bit,none", help="modes of the predictor (default: %(default)s)")
    parser.add_argument("--flags", default="", help="further flags of the predictor, as one argument")
    parser.add_argument("--repetitions", type=int, default=3, help="starts per server (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
