"""From the start of the process to the first answer that it could give: phases of ours, and a peer beside it.

`python -m benchmarks.coldstart --model_dir DIR --peer 'vllm serve {model_dir} --port {port}'` starts each in turn,
`--repetitions` times, the page cache warm, and prints medians. The floor is the bare import of torch, transformers and
kserve in a Python of its own.
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
from benchmarks.servers import BenchmarkError, Server
from devtools.processes import DemoError

FLOOR = "import torch, transformers, kserve"
_PHASE = re.compile(r'^kserve_llm_load_phase_seconds\{.*phase="(\w+)".*\} (\S+)$', re.MULTILINE)


def main() -> int:
    """Start each in turn, and print; the exit code."""
    arguments = parse(sys.argv[1:])
    kinds = {f"predictor, {word}": word for word in arguments.quantization.split(",")}
    seconds: dict[str, list[float]] = {"bare imports": []} | {name: [] for name in kinds}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    try:
        for repetition in range(arguments.repetitions + 1):
            took: dict[str, float] = {"bare imports": imports()}
            told: dict[str, dict[str, float]] = {}
            for name, word in kinds.items():
                flags = ["--quantization", word, *arguments.flags.split()]
                took[name], told[name] = start(servers.predictor(name, arguments.model_dir, flags))
            if arguments.peer and repetition:
                took["peer"], _ = start(servers.peer(arguments.peer, arguments.model_dir))
            print({name: round(each, 2) for name, each in took.items()}, file=sys.stderr)
            if repetition:  # the first one fills the page cache
                for name, each in took.items():
                    seconds.setdefault(name, []).append(each)
                for name, each_phase in told.items():
                    phases[name].append(each_phase)
    except (BenchmarkError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    floor = statistics.median(seconds["bare imports"])
    print(f"medians of {arguments.repetitions} starts each, the page cache warm")
    for name, each in seconds.items():
        ready = statistics.median(each)
        of_peer = (
            f", {ready / statistics.median(seconds['peer']):.3f} x the peer" if name in kinds and arguments.peer else ""
        )
        print(f"{name:<18} {ready:>6.2f} s, {ready / floor:.2f} x the imports{of_peer}")
        if name in phases:
            middle = {phase: statistics.median(of[phase] for of in phases[name]) for phase in phases[name][0]}
            print("  " + ", ".join(f"{phase} {taken:.2f}" for phase, taken in middle.items()))
    return 0


def imports() -> float:
    """Seconds of the floor."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", FLOOR], check=True)
    return time.monotonic() - began


def start(server: AbstractContextManager[Server]) -> tuple[float, dict[str, float]]:
    """Seconds until it is ready, and those of each phase that it tells of; it is stopped again."""
    began = time.monotonic()
    with server as running:
        seconds = time.monotonic() - began
        text = httpx.get(running.url.removesuffix("/v1") + "/metrics", trust_env=False, timeout=30).text
        return seconds, {phase: float(taken) for phase, taken in _PHASE.findall(text)}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coldstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--peer", metavar="COMMAND", help="another OpenAI server, with {model_dir} and {port} in it")
    parser.add_argument("--quantization", default="8bit,none", help="of the predictor (default: %(default)s)")
    parser.add_argument("--flags", default="", help="more flags of the predictor, in one word")
    parser.add_argument("--repetitions", type=int, default=3, help="starts of each (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
