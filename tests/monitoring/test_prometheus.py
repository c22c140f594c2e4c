"""A real Prometheus with our rules reads the running predictor under load: dashboard and rules find what they seek."""

import asyncio
import json
import math
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks import throughput
from demo import processes
from demo.processes import ROOT, Predictor

RULES = ROOT / "manifests" / "prometheus" / "rules.yaml"
WAIT_SECONDS = 60
SECONDS_AT_MOST = 600.0


@contextmanager
def prometheus(folder: Path, predictor: Predictor) -> Iterator[httpx.Client]:
    """One that reads every second, with the labels that a PodMonitor would give; a client of its API."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed; it is in Debian's package prometheus")
    target = {"targets": [predictor.url.removeprefix("http://")], "labels": {"namespace": "llm", "pod": "llm-0"}}
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "predictor", "static_configs": [target]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{processes.free_port()}"
    flags = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, *flags], cwd=folder, stderr=log, text=True)
        try:
            with httpx.Client(base_url=f"http://{address}/api/v1/", timeout=30, trust_env=False) as client:
                yield client
        finally:
            processes.stop(process)
            print((folder / "log").read_text())  # noqa: T201, shown by pytest where a test failed


def ask(client: httpx.Client, query: str) -> list[tuple[dict[str, str], float]]:
    """Labels and values of an instant query."""
    response = client.get("query", params={"query": query}).raise_for_status()
    return [(each["metric"], float(each["value"][1])) for each in response.json()["data"]["result"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "manifests/monitoring/dashboard.json").read_text())
    return loaded


def queries() -> list[str]:
    """Every query of the dashboard, with its variables filled in as Grafana does."""
    return [
        target["expr"].replace("$namespace", ".*").replace("$model", ".*").replace("$__rate_interval", "1m")
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


RECORDED = [
    rule["record"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
    if "record" in rule
]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The API of a Prometheus that has seen a predictor with 20 requests, 4 at a time."""
    folder = tmp_path_factory.mktemp("prometheus")
    arguments = ["--model_dir", str(ROOT / "demo/model"), "--dtype", "float32", "--log_level", "WARNING"]
    with (
        processes.predictor(arguments, model_name="demo", port=processes.free_port()) as predictor,
        prometheus(folder, predictor) as client,
    ):
        server = throughput.Server("predictor", f"{predictor.url}/v1", "demo")
        wait_for(client, "kserve_llm_ready == 1")
        asyncio.run(load(server))
        # The last of the rules needs two samples of everything.
        wait_for(client, "kserve_llm:request_errors:ratio_rate6h >= 0")
        wait_for(client, "kserve_llm:time_to_first_token_slow:ratio_rate6h >= 0")
        wait_for(client, "kserve_llm:batch_size:mean5m > 0")
        yield client


async def load(server: throughput.Server) -> None:
    prompts = [f"{number}+1=" for number in random.Random(0).sample(range(100), 20)]
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        # Series begin with the first request of their kind, and a rate needs to see one grow.
        for part in (prompts[:4], prompts[4:]):
            await throughput.run(client, server, part, 4, 40)
            await asyncio.sleep(2.5)


def wait_for(client: httpx.Client, query: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            if ask(client, query):
                return
        except httpx.TransportError:
            pass  # It opens its port when it has read its configuration.
        time.sleep(0.2)
    raise AssertionError(f"{query} has found nothing within {WAIT_SECONDS} s")


@pytest.mark.slow
@pytest.mark.parametrize("query", queries())
def test_every_query_of_the_dashboard_finds_something(observed: httpx.Client, query: str) -> None:
    found = ask(observed, query)
    assert found
    assert all(math.isfinite(value) and value >= 0 for _, value in found), found


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_every_recording_rule_has_a_plausible_value(observed: httpx.Client, name: str) -> None:
    [(labels, value)] = ask(observed, name)
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
    [(_, tokens)] = ask(observed, "kserve_llm_generation_tokens_total")
    [(_, finished)] = ask(observed, 'kserve_llm_request_finished_total{finished_reason="length"}')
    assert (tokens, finished) == (20 * 40, 20)


@pytest.mark.slow
def test_no_alert_fires_on_a_healthy_predictor(observed: httpx.Client) -> None:
    rules = observed.get("rules").json()["data"]["groups"]
    assert [rule for group in rules for rule in group["rules"] if rule["health"] != "ok"] == []
    assert ask(observed, 'ALERTS{alertstate="firing"}') == []


def test_the_dashboard_answers_four_questions_in_order_without_overlaps() -> None:
    panels = dashboard()["panels"]
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
