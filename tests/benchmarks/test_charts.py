"""`benchmarks.charts`, and the figures in docs/benchmarks.md, which are those of the committed results."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import charts, comparison_tables
from benchmarks.comparison import Case
from benchmarks.long_prompts import Disturbance
from devtools.paths import ROOT
from kserve_llm.bench import Run

PAGE = ROOT / "docs" / "benchmarks.md"
SVG = {"svg": "http://www.w3.org/2000/svg"}


def case(server: str, *rates: float, callers: int = 8, tokens: int = 64) -> dict[str, Any]:
    runs = [Run(8, 512, 512, 1.0, rate, rate, rate, 20.0, 40.0, 1.0) for rate in rates]
    return asdict(Case(server, callers, tokens, 64, runs, [3.0 for _ in rates]))


def bars(chart: str) -> list[tuple[str, float]]:
    """Class and width of every bar."""
    rectangles = ElementTree.fromstring(chart).findall("svg:rect", SVG)[1:]  # noqa: S314
    return [(rectangle.attrib["class"], float(rectangle.attrib["width"])) for rectangle in rectangles]


def test_charts_bars_are_medians_on_a_scale_of_their_panel() -> None:
    content = {
        "throughput": [
            case("ours-8bit", 100.0, 200.0, 400.0),
            case("vllm-bf16", 50.0, 100.0, 100.0),
            case("ours-8bit", 10.0, callers=1),
        ]
    }
    drawn = charts.draw_all(content)
    assert list(drawn) == ["throughput.svg"], "nothing else was measured"
    chart = drawn["throughput.svg"]
    # 520 units are as wide as the highest run of a panel.
    assert bars(chart) == [("ours", 520.0), ("ours", 260.0), ("peer", 130.0)]
    texts = [text.text for text in ElementTree.fromstring(chart).findall("svg:text", SVG)]  # noqa: S314
    assert texts == [
        "1 caller",
        "kserve-llm, 8 bits",
        "10.0",
        "8 callers",
        "kserve-llm, 8 bits",
        "200",
        "vLLM, bfloat16",
        "100",
    ]


def test_charts_first_tokens_and_long_prompts_have_a_panel_for_each_load() -> None:
    content = {
        "throughput": [],
        "first_token": [case("peer <x>", 30.0, callers=1, tokens=128), case("peer <x>", 60.0, callers=1, tokens=512)],
        "during_a_prompt": {"ours-8bit": [asdict(Disturbance(10.0, 20.0, 30.0, 40.0))], "gone": []},
    }
    drawn = charts.draw_all(content)
    assert list(drawn) == ["first-token.svg", "long-prompt.svg"]
    assert "prompt of 512 tokens, 1 caller" in drawn["first-token.svg"]
    assert bars(drawn["first-token.svg"]) == [("peer", 520.0), ("peer", 520.0)]
    assert re.findall(r'class="value"[^>]*>([^<]+)', drawn["long-prompt.svg"]) == ["10.0", "40.0"]


def test_charts_of_two_files_have_the_parts_of_both(tmp_path: Path) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    files[0].write_text(json.dumps({"throughput": [case("one", 1.0)], "first_token": []}))
    files[1].write_text(json.dumps({"throughput": [case("two", 2.0)], "first_token": [case("two", 3.0)]}))
    assert charts.read(files) == {"throughput": [case("one", 1.0)], "first_token": [case("two", 3.0)]}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What the files have measured to which the page links."""
    links = dict.fromkeys(re.findall(r"\(\.\./(benchmarks/results/\S+\.json)\)", PAGE.read_text()))
    assert links
    return charts.read(ROOT / link for link in links)


def test_committed_charts_are_those_of_the_results_of_the_page(results: dict[str, Any]) -> None:
    drawn = charts.draw_all(results)
    shown = {Path(name).name for name in re.findall(r"\(images/benchmarks/(\S+\.svg)\)", PAGE.read_text())}
    assert shown == set(drawn)
    for name, chart in drawn.items():
        assert (ROOT / "docs/images/benchmarks" / name).read_text() == chart, "run `python -m benchmarks.charts`"


def test_ratios_of_the_page_are_those_of_the_results(results: dict[str, Any]) -> None:
    table = "\n".join(comparison_tables.ratios(charts.cases(results["throughput"])))
    assert table in PAGE.read_text()
