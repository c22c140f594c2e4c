"""A real Prometheus that scrapes a predictor under load: every dashboard query and rule has a value."""

import asyncio
import math
import random
import shutil
from collections.abc import Iterator

import httpx
import pytest
import yaml

from devtools import processes
from devtools import render_dashboard as dashboard
from devtools.paths import ROOT
from kserve_llm import bench
from kserve_llm.bench import Server

SECONDS_AT_MOST = 600.0


def queries() -> list[str]:
    """Return every query of the dashboard with its variables substituted."""
    return [
        dashboard.substitute_variables(target["expr"])
        for panel in dashboard.read()["panels"]
        for target in panel.get("targets", [])
    ]


RECORDED = [
    rule["record"]
    for group in yaml.safe_load(dashboard.RULES.read_text())["groups"]
    for rule in group["rules"]
    if "record" in rule
]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield the API of a Prometheus that scraped a predictor during 20 requests, 4 at a time."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed; it is in Debian's package prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    arguments = ["--model_dir", str(ROOT / "demo/model"), "--dtype", "float32", "--log_level", "WARNING"]
    with (
        processes.predictor(arguments, model_name="demo", port=processes.free_port()) as predictor,
        dashboard.prometheus(folder, predictor) as client,
    ):
        server = Server("predictor", f"{predictor.url}/v1", "demo")
        dashboard.wait_for(client, "kserve_llm_ready == 1")
        asyncio.run(load(server))
        # The last rules need two samples of every series.
        dashboard.wait_for(client, "kserve_llm:request_errors:ratio_rate6h >= 0")
        dashboard.wait_for(client, "kserve_llm:time_to_first_token_slow:ratio_rate6h >= 0")
        dashboard.wait_for(client, "kserve_llm:batch_size:mean5m > 0")
        yield client


async def load(server: Server) -> None:
    prompts = [f"{number}+1=" for number in random.Random(0).sample(range(100), 20)]
    async with bench.make_client() as client:
        # A series starts with the first request of its kind, and a rate needs an increase after that.
        for part in (prompts[:4], prompts[4:]):
            await bench.run(client, server, part, 4, 40)
            await asyncio.sleep(2.5)


@pytest.mark.slow
@pytest.mark.parametrize("query", queries())
def test_dashboard_query_returns_values(observed: httpx.Client, query: str) -> None:
    samples = dashboard.query_instant(observed, query)
    assert samples
    assert all(math.isfinite(value) and value >= 0 for _, value in samples), samples


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_recording_rule_has_a_plausible_value(observed: httpx.Client, name: str) -> None:
    [(labels, value)] = dashboard.query_instant(observed, name)
    assert (labels["namespace"], labels["model_name"]) == ("llm", "demo")
    assert math.isfinite(value)
    if ":ratio_" in name:
        assert 0 <= value <= 1
    elif "batch_size" in name:
        assert 0 < value <= 4
    elif "seconds" in name:
        assert 0 < value < SECONDS_AT_MOST
    else:
        assert value > 0


@pytest.mark.slow
def test_prometheus_counts_equal_those_of_the_client(observed: httpx.Client) -> None:
    [(_, tokens)] = dashboard.query_instant(observed, "kserve_llm_generation_tokens_total")
    [(_, finished)] = dashboard.query_instant(observed, 'kserve_llm_request_finished_total{finished_reason="length"}')
    assert (tokens, finished) == (20 * 40, 20)


@pytest.mark.slow
def test_healthy_predictor_fires_no_alert(observed: httpx.Client) -> None:
    rules = observed.get("rules").json()["data"]["groups"]
    assert [rule for group in rules for rule in group["rules"] if rule["health"] != "ok"] == []
    assert dashboard.query_instant(observed, 'ALERTS{alertstate="firing"}') == []


def test_dashboard_rows_are_in_order_and_panels_do_not_overlap() -> None:
    panels = dashboard.read()["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Availability", "Latency", "Saturation", "Usage"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
