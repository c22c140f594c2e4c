"""A real Prometheus with our rules reads the running predictor under load: dashboard and rules find what they seek."""

import asyncio
import math
import random
import shutil
from collections.abc import Iterator

import httpx
import pytest
import yaml

from benchmarks import throughput
from benchmarks.servers import Server
from devtools import processes
from devtools import render_dashboard as dashboard
from devtools.processes import ROOT

SECONDS_AT_MOST = 600.0


def queries() -> list[str]:
    """Every query of the dashboard, with its variables filled in as Grafana does."""
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
    """The API of a Prometheus that has seen a predictor with 20 requests, 4 at a time."""
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
        # The last of the rules needs two samples of everything.
        dashboard.wait_for(client, "kserve_llm:request_errors:ratio_rate6h >= 0")
        dashboard.wait_for(client, "kserve_llm:time_to_first_token_slow:ratio_rate6h >= 0")
        dashboard.wait_for(client, "kserve_llm:batch_size:mean5m > 0")
        yield client


async def load(server: Server) -> None:
    prompts = [f"{number}+1=" for number in random.Random(0).sample(range(100), 20)]
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        # Series begin with the first request of their kind, and a rate needs to see one grow.
        for part in (prompts[:4], prompts[4:]):
            await throughput.run(client, server, part, 4, 40)
            await asyncio.sleep(2.5)


@pytest.mark.slow
@pytest.mark.parametrize("query", queries())
def test_every_query_of_the_dashboard_finds_something(observed: httpx.Client, query: str) -> None:
    found = dashboard.query_instant(observed, query)
    assert found
    assert all(math.isfinite(value) and value >= 0 for _, value in found), found


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_every_recording_rule_has_a_plausible_value(observed: httpx.Client, name: str) -> None:
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
def test_prometheus_and_the_client_count_the_same(observed: httpx.Client) -> None:
    [(_, tokens)] = dashboard.query_instant(observed, "kserve_llm_generation_tokens_total")
    [(_, finished)] = dashboard.query_instant(observed, 'kserve_llm_request_finished_total{finished_reason="length"}')
    assert (tokens, finished) == (20 * 40, 20)


@pytest.mark.slow
def test_no_alert_fires_on_a_healthy_predictor(observed: httpx.Client) -> None:
    rules = observed.get("rules").json()["data"]["groups"]
    assert [rule for group in rules for rule in group["rules"] if rule["health"] != "ok"] == []
    assert dashboard.query_instant(observed, 'ALERTS{alertstate="firing"}') == []


def test_the_dashboard_answers_four_questions_in_order_without_overlaps() -> None:
    panels = dashboard.read()["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Is it up?", "Is it fast enough?", "Why not?", "How much is it used?"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
