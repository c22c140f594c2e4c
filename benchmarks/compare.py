"""Compare the predictor with the servers that are named for CPUs: vLLM, llama.cpp and OpenVINO GenAI.

`python -m benchmarks.peers install llamacpp openvino vllm` builds them once. Then `python -m benchmarks.compare
--model_dir DIR` starts all servers with all cores on the same weights, and measures them in turns over HTTP, with the
same prompts of token ids and completions of an exact length. Servers that are not measured are suspended.

    tokens/s     output tokens/s of 1, 8 and 32 callers, 64 input and 64 output tokens: median ± half of the spread; and
                 the time of one step: the median time between two tokens of a stream
    ratio        of two servers: the median over pairs of runs that follow each other, and their range
    first token  ms from a request to its first token, for prompts of 128, 512 and 2,048 tokens and 1 or 8 callers
    during       ms between the tokens of 8 streams, quiet and while a prompt of 2,048 tokens is computed
    a prompt
"""

import argparse
import asyncio
import datetime
import itertools
import json
import random
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import comparison_tables, machine, servers
from benchmarks.comparison import Case, Comparison, Load
from benchmarks.long_prompts import Disturbance
from benchmarks.peers import catalog, environments
from benchmarks.peers.__main__ import PEERS_DIR
from devtools.processes import DemoError
from kserve_llm import bench
from kserve_llm.bench import Server
from kserve_llm.errors import BenchmarkError

OURS = ("8bit", "none", "4bit")
"""Values of --quantization; one server for each."""
TOKENS = 64
"""Of prompts and completions, where tokens/s are measured."""
FIRST_TOKENS = 4
"""Tokens of a completion of which only the first counts."""
Starter = Callable[[], AbstractContextManager[Server]]


def main() -> int:
    """Run the benchmark and return the exit code."""
    arguments = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in arguments.peers:
            catalog.prepared(name, arguments.model_dir, arguments.peers_dir)
        if arguments.prepare_only:
            return 0
        facts = machine.facts() | {"peers": peer_facts(arguments.peers, arguments.peers_dir)}
        with ExitStack() as stack:
            started, left_out = start_all(stack, starters(arguments))
            measure(started, facts, left_out, arguments)
    except (BenchmarkError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    return 0


def starters(arguments: argparse.Namespace) -> dict[str, Starter]:
    """Return how each server is started, by its name in the results."""
    cache = ["--kv_cache_tokens", str(catalog.SEQUENCES * catalog.CONTEXT_TOKENS)]
    model_dir = arguments.model_dir
    found: dict[str, Starter] = {}
    for mode in arguments.ours:
        flags = ["--quantization", mode, *cache, *arguments.flags.split()]
        found[f"ours-{mode}"] = partial(servers.predictor, f"ours-{mode}", model_dir, flags)
    for name in arguments.peers:
        found[name] = partial(catalog.start, name, model_dir, arguments.peers_dir)
    if arguments.peer:
        found["peer"] = partial(servers.peer, arguments.peer, model_dir)
    return found


def start_all(stack: ExitStack, starters: Mapping[str, Starter]) -> tuple[list[Server], dict[str, str]]:
    """Start all servers at once; return those that are ready, in order, and why others are not.

    Raises:
        BenchmarkError: none of them is ready.
    """
    started, left_out = [], {}

    def enter(starter: Starter) -> Server:
        return stack.enter_context(starter())

    before = psutil.Process().children()
    with ThreadPoolExecutor(len(starters)) as pool:
        try:
            waiting = {name: pool.submit(enter, starter) for name, starter in starters.items()}
            wait(waiting.values())
        except KeyboardInterrupt:
            for child in psutil.Process().children():
                if child not in before:
                    child.terminate()  # or else the pool would wait until it is ready
            raise
    for name, future in waiting.items():
        try:
            started.append(future.result())
        except (BenchmarkError, DemoError) as error:
            left_out[name] = str(error)
            print(f"left out: {name}: {error}", file=sys.stderr)
    if not started:
        raise BenchmarkError("No server has started; see their output.")
    return started, left_out


def measure(
    started: Sequence[Server], facts: Mapping[str, Any], left_out: dict[str, str], arguments: argparse.Namespace
) -> None:
    """Measure the servers, and report after each kind of load, so that an interruption loses only the rest.

    Servers that fail are added to `left_out`.
    """
    vocabulary = json.loads((arguments.model_dir / "config.json").read_text())["vocab_size"]
    comparison = Comparison(started, vocabulary, arguments.seed, left_out)
    machine_facts = {**facts, "left_out": left_out}
    content: dict[str, Any] = {"date": str(datetime.date.today()), "machine": machine_facts}
    content["settings"] = settings(arguments)
    print(bench.HEADER, file=sys.stderr)
    loads = [Load(level, TOKENS, TOKENS, arguments.requests, arguments.repetitions) for level in arguments.levels]
    rates = asyncio.run(comparison.measure(loads))
    content["throughput"] = [asdict(case) for case in rates]
    report(content, rates, [], {}, arguments.results)
    prompts = [
        Load(callers, tokens, FIRST_TOKENS, callers, arguments.prompt_repetitions)
        for tokens in arguments.prompts
        for callers in arguments.prompt_callers
    ]
    first = asyncio.run(comparison.measure(prompts))
    content["first_token"] = [asdict(case) for case in first]
    report(content, rates, first, {}, arguments.results)
    found: dict[str, list[Disturbance]] = {}
    if arguments.long_prompt:
        found = asyncio.run(comparison.disturb(arguments.long_prompt, arguments.prompt_repetitions))
    content["during_a_prompt"] = {name: [asdict(one) for one in measured] for name, measured in found.items()}
    print("\n".join(report(content, rates, first, found, arguments.results)))


def report(
    content: Mapping[str, Any],
    rates: Sequence[Case],
    first: Sequence[Case],
    found: Mapping[str, Sequence[Disturbance]],
    folder: Path | None,
) -> list[str]:
    """Return the lines of the report; write them to `folder` with all figures in JSON, named after CPU and date."""
    ours: list[str] = []
    others: list[str] = []
    for name in dict.fromkeys(case.server for case in rates):
        if name not in catalog.PEERS:
            (ours if name.startswith("ours-") else others).append(name)
    lines = [f"# {content['machine']['cpu']}, {content['date']}", "", *comparison_tables.machine(content["machine"])]
    if rates:
        lines += _section(f"Output tokens/s and ms per step, {TOKENS} input and {TOKENS} output tokens")
        lines += comparison_tables.rates(rates)
        lines += _section("Ratios of tokens/s")
        lines += comparison_tables.ratios(rates, itertools.product(ours, others))
    if first:
        lines += _section("Milliseconds to the first token")
        lines += comparison_tables.first_tokens(first)
    if found:
        long_prompt = content["settings"]["long_prompt"]
        lines += _section(f"Milliseconds between tokens of 8 streams, and a prompt of {long_prompt} tokens")
        lines += comparison_tables.disturbances(found)
    if rates or first:
        lines += ["", comparison_tables.neighbors([*rates, *first])]
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", content["machine"]["cpu"].lower()).strip("-")
        file = folder / f"{name}-{content['machine']['cores']}-cores-{content['date']}.md"
        file.write_text("\n".join(lines) + "\n")
        file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    return lines


def _section(title: str) -> list[str]:
    return ["", f"## {title}", ""]


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that decide the figures."""
    names = ["flags", "levels", "requests", "repetitions", "seed"]
    names += ["prompts", "prompt_callers", "prompt_repetitions", "long_prompt"]
    return {name: getattr(arguments, name) for name in names}


def peer_facts(peers: Sequence[str], peers_dir: Path) -> dict[str, dict[str, str]]:
    """Return the versions of each peer's packages, and whether llama.cpp uses AMX.

    Raises:
        BenchmarkError: one is not installed.
    """
    names = sorted({catalog.PEERS[name].environment for name in peers})
    facts = {name: environments.versions(peers_dir, name) for name in names}
    if "llamacpp" in facts:
        facts["llamacpp"]["AMX"] = catalog.amx_of_llamacpp(peers_dir)
    return facts


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model_dir", type=Path, required=True)
    add("--ours", type=_names(OURS), default=OURS, help="values of --quantization (default: 8bit,none,4bit)")
    add(
        "--peers", type=_names(catalog.PEERS), default=list(catalog.PEERS), help="peers, comma-separated (default: all)"
    )
    add("--peers_dir", type=Path, default=PEERS_DIR, help="their environments and models (default: %(default)s)")
    add("--peer", metavar="COMMAND", help="command of another OpenAI server, with {model_dir} and {port}")
    add("--flags", default="", help="further flags of the predictor, as one argument")
    add("--levels", type=_numbers, default=[1, 8, 32], help="numbers of callers (default: 1,8,32)")
    add("--requests", type=int, default=4, help="per run, at least one per caller (default: %(default)s)")
    add("--repetitions", type=int, default=3, help="runs of each server and number of callers (default: %(default)s)")
    add("--prompts", type=_numbers, default=[128, 512, 2048], help="tokens of prompts whose first token is measured")
    add("--prompt_callers", type=_numbers, default=[1, 8], help="numbers of callers of these prompts (default: 1,8)")
    add("--prompt_repetitions", type=int, default=3, help="runs of each server and prompt (default: %(default)s)")
    add("--long_prompt", type=int, default=2048, help="tokens of the prompt that arrives at 8 streams; 0: none")
    add("--results", type=Path, metavar="FOLDER", help="write the report and all figures to FOLDER")
    add("--prepare_only", action="store_true", help="write the peers' models and stop")
    add("--seed", type=int, default=random.randrange(2**32), help="seed of the prompts (default: random)")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _names(known: Sequence[str] | Mapping[str, Any]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = [part for part in text.split(",") if part]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
        return found

    return names


if __name__ == "__main__":
    sys.exit(main())
