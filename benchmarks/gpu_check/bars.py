"""Compare the figures of the stages with what is expected of an H100 or H200; standard library only."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

Figures = Mapping[str, Any]

SHAPE = "7b"
CALLERS = 64
LEAST_BANDWIDTH_SHARE = 0.65
LEAST_RATIO = 20
MOST_FIRST_TOKEN_MS = 150
MOST_DISTURBANCE = 2
MOST_READY_SECONDS = 20
MOST_SAMPLING = 0.05
SAMPLING_KINDS = ("temperature", "top_p 0.9", "top_k 20, top_p 0.8", "penalties", "mask of a grammar")
"""Of `benchmarks.sampling`, with as many rows as CALLERS."""
LEAST_CORRECT = 0.97
"""As of `demo.evaluate`."""
MODES = ("bfloat16", "8bit", "4bit", "fp8")


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and its limit; `passed` and `measured` are None if the figure has not been measured."""

    name: str
    limit: str
    measured: str | None = None
    passed: bool | None = None


def compare(stages: Figures) -> list[dict[str, Any]]:
    """Return all bars, as dictionaries, for the results of the stages by name."""
    bench = stages.get(f"bench-{SHAPE}", {})
    return [asdict(bar) for bar in (*_bench(bench, stages.get("device", {})), *_correctness(stages))]


def bandwidth_share(bench: Figures, device: Figures) -> float | None:
    """Return the time to read all weights over that of one caller's step; None if it has not been measured.

    So it is where most tokens arrived together, with no time between them.
    """
    bandwidth, single = device.get("copy_bytes_per_second"), _level(bench.get("levels", []), 1)
    if not bandwidth or not single or not single["itl_p50_ms"] or "weight_bytes" not in bench:
        return None
    return float(1000 * bench["weight_bytes"] / bandwidth / single["itl_p50_ms"])


def ratio(level: Figures, sequential: list[Figures]) -> float | None:
    """Return tokens/s over those of sequential `generate`, which are the same for any number of callers."""
    if not sequential:
        return None
    return float(level["tokens_per_second"] / max(other["tokens_per_second"] for other in sequential))


def _bench(bench: Figures, device: Figures) -> Iterator[Bar]:
    crowd = _level(bench.get("levels", []), CALLERS)
    step_ms = crowd["itl_p50_ms"] if crowd else None
    disturbed = bench.get("disturbed") or {}
    yield _at_least(
        f"{SHAPE}, one caller: share of the memory bandwidth", LEAST_BANDWIDTH_SHARE, bandwidth_share(bench, device)
    )
    yield _at_least(
        f"{SHAPE}, {CALLERS} callers: tokens/s over those of sequential `generate`",
        LEAST_RATIO,
        None if crowd is None else ratio(crowd, bench.get("sequential", [])),
    )
    yield _at_most(
        f"{SHAPE}: first token of a prompt of {bench.get('long_prompt_tokens', 2000)} tokens on an idle server, ms",
        MOST_FIRST_TOKEN_MS,
        bench.get("first_token_ms"),
    )
    yield _at_most(
        f"{SHAPE}: inter-token p99 of other streams during such a prompt, over that before",
        MOST_DISTURBANCE,
        disturbed["during_p99_ms"] / disturbed["before_p99_ms"] if disturbed.get("before_p99_ms") else None,
    )
    yield _at_most(f"{SHAPE}: ready, s", MOST_READY_SECONDS, bench.get("ready_seconds"))
    durations = device.get("sampling_ms", {})
    for kind in SAMPLING_KINDS:
        share = durations[kind] / step_ms if step_ms and kind in durations else None
        yield _at_most(f"{SHAPE}, {CALLERS} callers: sampling by {kind}, share of a step", MOST_SAMPLING, share)


def _correctness(stages: Figures) -> Iterator[Bar]:
    tests = stages.get("tests", {})
    name, counts = "tests marked `gpu`", tests.get("counts")
    if counts:
        measured = ", ".join(f"{number} {outcome.lower()}" for outcome, number in counts.items())
        yield Bar(name, "all pass", measured, tests["status"] == "passed")
    else:
        yield Bar(name, "all pass")
    modes = stages.get("load", {}).get("modes", {})
    for mode in MODES:
        correct = modes[mode].get("correct", 0.0) if mode in modes else None
        yield _at_least(f"{mode}: share of correct sums", LEAST_CORRECT, correct)


def _at_least(name: str, limit: float, value: float | None) -> Bar:
    return _bar(name, f"at least {limit:g}", value, lambda measured: measured >= limit)


def _at_most(name: str, limit: float, value: float | None) -> Bar:
    return _bar(name, f"at most {limit:g}", value, lambda measured: measured <= limit)


def _bar(name: str, limit: str, value: float | None, is_passed: Callable[[float], bool]) -> Bar:
    return Bar(name, limit) if value is None else Bar(name, limit, f"{value:.3g}", is_passed(value))


def _level(levels: list[Figures], callers: int) -> Figures | None:
    return next((level for level in levels if level["concurrency"] == callers), None)
