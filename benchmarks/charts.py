"""Draw the charts of a comparison as SVG, from the JSON files that `benchmarks.compare --results` wrote.

`python -m benchmarks.charts FOLDER FILE...` writes `throughput.svg`, `first-token.svg` and `long-prompt.svg`. Several
files are of runs that each measured a part.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.comparison import Case
from benchmarks.comparison_tables import callers_text, tokens_per_second
from benchmarks.long_prompts import Disturbance
from kserve_llm.bench import Run

NAMES = {
    "ours-8bit": "kserve-llm, 8 bits",
    "ours-none": "kserve-llm, bfloat16",
    "ours-4bit": "kserve-llm, 4 bits",
    "vllm-bf16": "vLLM, bfloat16",
    "vllm-int8": "vLLM, int8",
    "llamacpp-q8_0": "llama.cpp, q8_0",
    "llamacpp-q4_0": "llama.cpp, q4_0",
    "openvino-int8": "OpenVINO, int8",
    "openvino-int4": "OpenVINO, int4",
}
PARTS = ("throughput", "first_token", "during_a_prompt")
WIDTH, LABEL_WIDTH, VALUE_WIDTH = 760, 170, 70
ROW_HEIGHT, BAR_HEIGHT, TITLE_HEIGHT = 22, 14, 34
STYLE = """
    svg { --paper: #ffffff; --ink: #1b1f27; --muted: #525a68; --peer: #a9b4c6; --ours: #2a5fc4; }
    @media (prefers-color-scheme: dark) {
      svg { --paper: #16181d; --ink: #eceef2; --muted: #a9b0bd; --peer: #5a6578; --ours: #8fb6ff; }
    }
    text { font: 13px system-ui, sans-serif; fill: var(--ink); }
    .title { font-weight: 600; }
    .label { text-anchor: end; }
    .value { fill: var(--muted); }
    .paper { fill: var(--paper); }
    .peer { fill: var(--peer); }
    .ours { fill: var(--ours); }
    .range { stroke: var(--ink); }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One server's figure, with the range over its runs."""

    server: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars with a common scale."""

    title: str
    bars: Sequence[Bar]


def main() -> int:
    """Write the charts and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.charts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the charts are written")
    parser.add_argument("files", type=Path, nargs="+", help="results of benchmarks.compare")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, text in draw_all(read(arguments.files)).items():
        (arguments.folder / name).write_text(text)
    return 0


def read(files: Iterable[Path]) -> dict[str, Any]:
    """Return the parts that the files have measured; of two with the same part, the first one's."""
    parts: dict[str, Any] = {}
    for file in files:
        content = json.loads(file.read_text())
        parts = {name: content[name] for name in PARTS if content.get(name)} | parts
    return parts


def draw_all(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the charts by file name; a part that was not measured has none."""
    rates, first = cases(content.get("throughput", ())), cases(content.get("first_token", ()))
    found = {
        server: [Disturbance(**one) for one in measured]
        for server, measured in content.get("during_a_prompt", {}).items()
        if measured
    }
    charts = {
        "throughput.svg": ("Output tokens/s, more is better", rate_panels(rates)),
        "first-token.svg": ("Milliseconds to the first token, less is better", first_token_panels(first)),
        "long-prompt.svg": ("Milliseconds between tokens of 8 streams, less is better", disturbance_panels(found)),
    }
    return {name: draw(title, panels) for name, (title, panels) in charts.items() if panels}


def cases(entries: Iterable[Mapping[str, Any]]) -> list[Case]:
    """Return the cases of a results file."""
    return [Case(**{**entry, "runs": [Run(**run) for run in entry["runs"]]}) for entry in entries]


def rate_panels(measured: Sequence[Case]) -> list[Panel]:
    """Return tokens/s, a panel for each number of callers."""
    return [
        Panel(
            callers_text(level),
            [_bar(case.server, tokens_per_second(case)) for case in measured if case.callers == level],
        )
        for level in sorted({case.callers for case in measured})
    ]


def first_token_panels(measured: Sequence[Case]) -> list[Panel]:
    """Return times to the first token of the median caller, a panel for each load."""
    loads = sorted({(case.callers, case.input_tokens) for case in measured})
    return [
        Panel(
            f"prompt of {tokens} tokens, {callers_text(callers)}",
            [
                _bar(case.server, [run.ttft_p50_ms for run in case.runs])
                for case in measured
                if (case.callers, case.input_tokens) == (callers, tokens)
            ],
        )
        for callers, tokens in loads
    ]


def disturbance_panels(found: Mapping[str, Sequence[Disturbance]]) -> list[Panel]:
    """Return times between tokens of running streams: quiet, and while a long prompt is computed."""
    if not found:
        return []
    quiet = [_bar(server, [one.before_p50_ms for one in measured]) for server, measured in found.items()]
    during = [_bar(server, [one.during_p99_ms for one in measured]) for server, measured in found.items()]
    return [Panel("quiet, median", quiet), Panel("while a long prompt is computed, 99th percentile", during)]


def draw(title: str, panels: Sequence[Panel]) -> str:
    """Return an SVG image of the panels below each other, legible on light and dark pages."""
    lines: list[str] = []
    top = 0
    for panel in panels:
        lines += _panel(panel, top)
        top += TITLE_HEIGHT + ROW_HEIGHT * len(panel.bars)
    height = top + ROW_HEIGHT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-labelledby="title">\n  <title id="title">{escape(title)}</title>\n'
        f"  <style>{STYLE}  </style>\n"
        f'  <rect class="paper" width="{WIDTH}" height="{height}" rx="8"/>\n'
    )
    return head + "\n".join(lines) + "\n</svg>\n"


def _panel(panel: Panel, top: int) -> list[str]:
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / max(bar.high for bar in panel.bars)
    lines = [f'  <text class="title" x="{LABEL_WIDTH}" y="{top + 24}">{escape(panel.title)}</text>']
    for row, bar in enumerate(panel.bars):
        y = top + TITLE_HEIGHT + ROW_HEIGHT * row
        middle, baseline = y + BAR_HEIGHT / 2, y + 12
        kind = "ours" if bar.server.startswith("ours-") else "peer"
        low, high = (LABEL_WIDTH + scale * value for value in (bar.low, bar.high))
        name = escape(NAMES.get(bar.server, bar.server))
        lines += [
            f'  <text class="label" x="{LABEL_WIDTH - 8}" y="{baseline}">{name}</text>',
            f'  <rect class="{kind}" x="{LABEL_WIDTH}" y="{y}" width="{scale * bar.value:.1f}" height="{BAR_HEIGHT}"/>',
            f'  <path class="range" d="M{low:.1f} {middle}H{high:.1f}"/>',
            f'  <text class="value" x="{high + 6:.1f}" y="{baseline}">{_number(bar.value)}</text>',
        ]
    return lines


def _bar(server: str, values: Sequence[float]) -> Bar:
    return Bar(server, statistics.median(values), min(values), max(values))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
