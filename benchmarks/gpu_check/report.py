"""Write the results of all stages as JSON and as Markdown; standard library only."""

import datetime
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import bars

Figures = Mapping[str, Any]


def save(figures: Figures) -> None:
    """Write a stage's figures so far, called after each of them: the stage may be killed at its time limit."""
    output = Path(os.environ["GPU_CHECK_OUTPUT"])
    new = output.with_suffix(".new")
    new.write_text(json.dumps(figures))
    new.replace(output)


def read(output: Path) -> dict[str, Any]:
    """Return what a stage has saved; nothing if it has not come that far."""
    try:
        figures: dict[str, Any] = json.loads(output.read_text())
    except FileNotFoundError:
        return {}
    return figures


def write(folder: Path, device: str, date: datetime.date, versions: Figures, results: Mapping[str, Figures]) -> Path:
    """Merge stages into the day's results of this device, write both files, and return the Markdown one.

    The file is named after the device as the stage `device` has found it, in this call or in an earlier one.
    """
    name = results.get("device", {}).get("name") or _known_name(folder, date) or device
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{date}.json"
    content = read(file)
    content |= {"date": str(date), "name": name, "versions": versions}
    content["stages"] = content.get("stages", {}) | results
    content["bars"] = bars.compare(content["stages"])
    file.write_text(json.dumps(content, indent=2) + "\n")
    markdown = file.with_suffix(".md")
    markdown.write_text("\n".join(_lines(content)) + "\n")
    return markdown


def _known_name(folder: Path, date: datetime.date) -> str | None:
    """Return the device of the day's results, if there is one file of them."""
    files = list(folder.glob(f"*-{date}.json"))
    return read(files[0]).get("name") if len(files) == 1 else None


def _lines(content: Figures) -> Iterator[str]:
    stages = content["stages"]
    installed = content["versions"]["installed"]
    packages = ", ".join(
        f"{name} {installed[name]}" for name in ("torch", "transformers", "bitsandbytes") if name in installed
    )
    yield from (f"# {content['name']}, {content['date']}", "", f"Python {content['versions']['python']}, {packages}.")
    yield from _table(
        ("stage", "status", "seconds"),
        [(name, stage["status"], f"{stage['seconds']:.0f}") for name, stage in stages.items()],
    )
    if "copy_bytes_per_second" in stages.get("device", {}):
        yield from ("", f"Memory bandwidth, copying: {stages['device']['copy_bytes_per_second'] / 1e9:.0f} GB/s.")
    if "modes" in stages.get("load", {}):
        yield from _load_table(stages["load"]["modes"])
    if "counts" in stages.get("tests", {}):
        counts = ", ".join(f"{number} {outcome.lower()}" for outcome, number in stages["tests"]["counts"].items())
        yield from ("", f"Tests: {counts or 'none ran'}.")
        yield from (f"- {name}" for name in stages["tests"]["failed"])
    for name, stage in stages.items():
        if name.startswith("bench-"):
            yield from _bench_lines(name, stage, stages.get("device", {}))
        elif name.startswith("modes-") and "quantizations" in stage:
            yield from ("", f"## {name.removeprefix('modes-')} in every quantization")
            yield from _mode_table(stage["quantizations"])
    yield from ("", "## Bars for an H100 or H200")
    yield from _table(("bar", "limit", "measured", "result"), [_bar_cells(bar) for bar in content["bars"]])


def _bar_cells(bar: Figures) -> tuple[str, ...]:
    result = {None: "not measured", True: "pass", False: "fail"}[bar["passed"]]
    return bar["name"], bar["limit"], bar["measured"] or "", result


def _mode_table(modes: Mapping[str, Figures]) -> Iterator[str]:
    levels = next((list(mode["tokens_per_second"]) for mode in modes.values() if "error" not in mode), [])
    rows: list[tuple[str, ...]] = []
    for mode, figures in modes.items():
        if "error" in figures:
            rows.append((mode, figures["error"], *("" for _ in range(len(levels) + 2))))
        else:
            memory = figures["device_bytes"]
            rates = [f"{figures['tokens_per_second'][level]:.1f}" for level in levels]
            cells = (f"{figures['load_seconds']:.1f}", str(figures["kv_cache_tokens"]), *rates)
            rows.append((mode, "" if memory is None else f"{memory / 2**30:.2f}", *cells))
    rates_header = [f"tokens/s, {level} at a time" for level in levels]
    yield from _table(("mode", "weights, GiB", "load, s", "KV cache, tokens", *rates_header), rows)


def _load_table(modes: Mapping[str, Figures]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = []
    for mode, figures in modes.items():
        if "error" in figures:
            rows.append((mode, figures["error"], "", "", ""))
        else:
            memory = figures.get("device_bytes")
            rows.append(
                (
                    mode,
                    f"{figures['correct']:.1%}",
                    f"{figures['load_seconds']:.2f}",
                    f"{figures['warm_up_seconds']:.2f}",
                    "" if memory is None else f"{memory / 2**20:.1f}",
                )
            )
    yield from _table(("mode", "correct sums", "load, s", "warm-up, s", "weights, MiB"), rows)


def _bench_lines(name: str, stage: Figures, device: Figures) -> Iterator[str]:
    yield from ("", f"## {name.removeprefix('bench-')}", "")
    if "weight_bytes" in stage:
        yield f"- weights: {stage['weight_bytes'] / 1e9:.2f} GB, made and written in {stage['make_seconds']:.1f} s"
    if "ready_seconds" in stage:
        yield f"- ready after {stage['ready_seconds']:.1f} s"
    if "first_token_ms" in stage:
        prompt = stage["long_prompt_tokens"]
        yield f"- first token of a prompt of {prompt} tokens on an idle server: {stage['first_token_ms']:.0f} ms"
    if stage.get("disturbed"):
        quiet, during = stage["disturbed"]["before_p99_ms"], stage["disturbed"]["during_p99_ms"]
        yield f"- inter-token p99 of other streams: {quiet:.1f} ms, {during:.1f} ms during such a prompt"
    if share := bars.bandwidth_share(stage, device):
        floor = 1000 * stage["weight_bytes"] / device["copy_bytes_per_second"]
        yield f"- one caller: {share:.2f} of the memory bandwidth (at least {floor:.2f} ms per token)"
    if "levels" in stage:
        rows = [
            (
                str(level["concurrency"]),
                f"{level['tokens_per_second']:.1f}",
                *(f"{level[key]:.1f}" for key in ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")),
                _ratio(level, stage.get("sequential", [])),
            )
            for level in stage["levels"]
        ]
        yield from _table(
            ("callers", "tokens/s", "TTFT p50, ms", "TTFT p99", "ITL p50, ms", "ITL p99", "x sequential"), rows
        )
    if stage.get("sequential"):
        rates = ", ".join(
            f"{level['tokens_per_second']:.1f} at {level['concurrency']}" for level in stage["sequential"]
        )
        yield from ("", f"Sequential `generate`, tokens/s by callers: {rates}.")


def _ratio(level: Figures, sequential: list[Figures]) -> str:
    ratio = bars.ratio(level, sequential)
    return "" if ratio is None else f"{ratio:.1f}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield ""
    for cells in (header, ("---",) * len(header), *rows):
        yield f"| {' | '.join(cells)} |"
