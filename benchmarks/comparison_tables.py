"""Tables of a comparison, in Markdown."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.comparison import Case
from benchmarks.long_prompts import Disturbance

PAIRS = (
    ("ours-8bit", "vllm-bf16"),
    ("ours-8bit", "vllm-int8"),
    ("ours-8bit", "llamacpp-q8_0"),
    ("ours-8bit", "openvino-int8"),
    ("ours-none", "vllm-bf16"),
    ("ours-4bit", "llamacpp-q4_0"),
    ("ours-4bit", "openvino-int4"),
    ("ours-4bit", "ours-8bit"),
)
"""Servers whose ratios are of interest: of equal weights, and 8 bits with the fastest that others do in bfloat16."""
ABSENT = "-"


def machine(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about the machine, the versions and what was left out."""
    versions = facts["versions"] | {"Python": facts["python"], "commit": facts["revision"]}
    yield f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {', '.join(facts['isa'])}."
    yield f"Ours: {', '.join(f'{name} {version}' for name, version in versions.items())}."
    for peer, peer_versions in facts["peers"].items():
        yield f"{peer}: {', '.join(f'{name} {version}' for name, version in peer_versions.items())}."
    for name, reason in facts["left_out"].items():
        yield f"Left out: {name}: {reason}"


def rates(cases: Sequence[Case]) -> Iterator[str]:
    """Yield tokens/s with their spread and the time of a step, per number of callers."""

    def cell(case: Case) -> str:
        median = statistics.median(tokens_per_second(case))
        step = statistics.median(run.itl_p50_ms for run in case.runs)
        return f"{median:.1f} ± {spread_percent(tokens_per_second(case)) / 2:.0f} %, {step:.1f} ms"

    yield from _by_server(cases, lambda case: callers_text(case.callers), cell)


def ratios(cases: Sequence[Case], others: Iterable[tuple[str, str]] = ()) -> Iterator[str]:
    """Yield the ratio of tokens/s of `PAIRS` and other pairs: the median over pairs of runs, and their range."""
    found = {(case.server, case.callers): tokens_per_second(case) for case in cases}
    levels = sorted({case.callers for case in cases})
    rows = []
    for one, other in (*PAIRS, *others):
        if all((name, level) in found for name in (one, other) for level in levels):
            pairs = [[a / b for a, b in zip(found[one, level], found[other, level], strict=True)] for level in levels]
            cells = [f"{statistics.median(pair):.2f} ({min(pair):.2f} to {max(pair):.2f})" for pair in pairs]
            rows.append([f"{one} / {other}", *cells])
    yield from table(["ratio", *map(callers_text, levels)], rows)


def first_tokens(cases: Sequence[Case]) -> Iterator[str]:
    """Yield ms to the first token per length of the prompt: of the median caller, and of the last one."""

    def cell(case: Case) -> str:
        middle = statistics.median(run.ttft_p50_ms for run in case.runs)
        last = statistics.median(run.ttft_p99_ms for run in case.runs)
        return f"{middle:.0f}" if case.callers == 1 else f"{middle:.0f}, last {last:.0f}"

    yield from _by_server(cases, lambda case: f"{case.input_tokens} tokens, {callers_text(case.callers)}", cell)


def disturbances(found: Mapping[str, Sequence[Disturbance]]) -> Iterator[str]:
    """Yield ms between tokens of the streams that run when a long prompt arrives."""
    columns = ("before_p50_ms", "before_p99_ms", "during_p50_ms", "during_p99_ms")
    rows = []
    for server, measured in found.items():
        if not measured:
            rows.append([server, *[ABSENT] * (len(columns) + 1)])
            continue
        medians = [statistics.median(getattr(one, column) for one in measured) for column in columns]
        ratio = f"{medians[-1] / medians[0]:.1f}" if medians[0] else ABSENT
        rows.append([server, *(f"{value:.0f}" for value in medians), ratio])
    header = ["server", "quiet, median", "quiet, p99", "during, median", "during, p99", "p99 during / quiet median"]
    yield from table(header, rows)


def neighbors(cases: Sequence[Case]) -> str:
    """Say how much CPU time other processes used during the runs."""
    shares = [share for case in cases for share in case.other_cpu_percent]
    middle, most = statistics.median(shares), max(shares)
    return f"Other processes used {middle:.0f} % of one core during the median run, {most:.0f} % at most."


def tokens_per_second(case: Case) -> list[float]:
    """Return output tokens/s of each run."""
    return [run.output_tokens_per_second for run in case.runs]


def spread_percent(values: Sequence[float]) -> float:
    """Return highest minus lowest, in percent of the median."""
    return 100 * (max(values) - min(values)) / statistics.median(values)


def callers_text(number: int) -> str:
    """Return the number of callers with its noun."""
    return "1 caller" if number == 1 else f"{number} callers"


def _by_server(cases: Sequence[Case], column: Callable[[Case], str], cell: Callable[[Case], str]) -> Iterator[str]:
    """Yield a table with one row per server and one column per load."""
    columns = list(dict.fromkeys(column(case) for case in cases))
    cells = {(case.server, column(case)): cell(case) for case in cases}
    servers = dict.fromkeys(case.server for case in cases)
    yield from table(
        ["server", *columns], [[server, *(cells.get((server, name), ABSENT) for name in columns)] for server in servers]
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, with aligned columns for terminals."""
    lines = [header, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]
    for number, line in enumerate(lines):
        yield "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"
