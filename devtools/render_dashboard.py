"""Plot the Grafana dashboard with matplotlib: `python -m devtools.render_dashboard FILE.png`.

Runs the predictor on the demo model and a Prometheus (Debian's package) that scrapes it every second, sends requests
with increasing concurrency for 80 seconds, and plots every query of `manifests/monitoring/dashboard.json` at the
panel's position. Grafana's styling differs.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT
from devtools.processes import Predictor
from kserve_llm import bench
from kserve_llm.bench import Server

DASHBOARD = ROOT / "manifests" / "monitoring" / "dashboard.json"
RULES = ROOT / "manifests" / "prometheus" / "rules.yaml"
WAIT_SECONDS = 60
LEVELS = (1, 4, 16, 48)
LEVEL_SECONDS = 20
"""Duration of each concurrency level."""
OUTPUT_TOKENS = 60


def read() -> dict[str, Any]:
    """Load the deployed dashboard."""
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def substitute_variables(query: str) -> str:
    """Replace the dashboard's variables by All, and the rate interval by one minute."""
    return query.replace("$namespace", ".*").replace("$model", ".*").replace("$__rate_interval", "1m")


@contextmanager
def prometheus(folder: Path, predictor: Predictor) -> Iterator[httpx.Client]:
    """Run Prometheus with the project's rules and a PodMonitor's labels; yield a client of its API."""
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
        process = subprocess.Popen(["prometheus", *flags], cwd=folder, stderr=log, text=True)
        try:
            with httpx.Client(base_url=f"http://{address}/api/v1/", timeout=30, trust_env=False) as client:
                _wait_until(lambda: _is_ready(client), "Prometheus was not ready")
                yield client
        finally:
            processes.stop(process)
            if process.returncode:
                print((folder / "log").read_text(), file=sys.stderr)


def query_instant(client: httpx.Client, query: str) -> list[tuple[dict[str, str], float]]:
    """Return labels and values of an instant query."""
    response = client.get("query", params={"query": query}).raise_for_status()
    return [(series["metric"], float(series["value"][1])) for series in response.json()["data"]["result"]]


def wait_for(client: httpx.Client, query: str) -> None:
    """Wait until the query has a result.

    Raises:
        TimeoutError: no result within `WAIT_SECONDS`.
    """
    _wait_until(lambda: bool(query_instant(client, query)), f"{query} had no result")


def _is_ready(client: httpx.Client) -> bool:
    """Return whether Prometheus answers queries; its port is open before its storage is, with status 503."""
    try:
        return client.get(client.base_url.join("/-/ready")).is_success
    except httpx.TransportError:
        return False


def _wait_until(condition: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{failure} within {WAIT_SECONDS} s")
        time.sleep(0.2)


def main() -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m devtools.render_dashboard", description=__doc__)
    parser.add_argument("file", type=Path, help="the PNG to write")
    arguments = parser.parse_args()
    flags = ["--model_dir", str(DEMO_MODEL), "--dtype", "float32", "--log_level", "WARNING"]
    with (
        tempfile.TemporaryDirectory() as folder,
        processes.predictor(flags, model_name="demo", port=processes.free_port()) as predictor,
        prometheus(Path(folder), predictor) as client,
    ):
        wait_for(client, "kserve_llm_ready == 1")
        began = time.time()
        asyncio.run(load(Server("predictor", f"{predictor.url}/v1", "demo")))
        draw(client, began, time.time(), arguments.file)
    return 0


async def load(server: Server) -> None:
    """Send requests with increasing concurrency."""
    rng = random.Random(0)
    async with bench.make_client() as client:
        for concurrency in LEVELS:
            end = time.monotonic() + LEVEL_SECONDS
            while time.monotonic() < end:
                prompts = [f"{rng.randrange(1000)}+{rng.randrange(1000)}=" for _ in range(concurrency)]
                await bench.run(client, server, prompts, concurrency, OUTPUT_TOKENS)


def draw(client: httpx.Client, began: float, ended: float, file: Path) -> None:
    """Plot all panels for the Unix times `began` to `ended` into a PNG file."""
    import matplotlib.pyplot as plt  # slow to import, and not needed by the tests

    panels = read()["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(15, height * 0.36))
    figure.suptitle(read()["title"], x=0.01, ha="left", weight="bold")
    for panel in panels:
        position = panel["gridPos"]
        left, bottom = 0.012 + position["x"] / 24 * 0.985, 0.97 - (position["y"] + position["h"]) / height * 0.965
        if panel["type"] == "row":
            figure.text(left, bottom, panel["title"], weight="bold", size=12)
            continue
        wide, high = position["w"] / 24 * 0.985, position["h"] / height * 0.965
        axes = figure.add_axes((left + 0.026, bottom + 0.022, wide - 0.038, high - 0.052))
        axes.set_title(panel["title"], loc="left", size=9)
        axes.tick_params(labelsize=7)
        if panel["type"] == "timeseries":
            _lines(axes, client, panel, began, ended)
        else:
            axes.axis("off")
            _words(axes, client, panel)
    figure.savefig(file, dpi=80)


def _lines(axes: Any, client: httpx.Client, panel: dict[str, Any], began: float, ended: float) -> None:
    for target in panel["targets"]:
        window = {"start": began, "end": ended, "step": 1}
        response = client.get(
            "query_range", params={"query": substitute_variables(target["expr"]), **window}
        ).raise_for_status()
        for series in response.json()["data"]["result"]:
            label = target["legendFormat"]
            for name, value in series["metric"].items():
                label = label.replace(f"{{{{{name}}}}}", value)
            times, values = zip(*((at - began, float(value)) for at, value in series["values"]), strict=True)
            axes.plot(times, values, label=label, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="upper left", framealpha=0.6)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.set_ylabel({"s": "s", "reqps": "1/s", "percentunit": "share"}.get(unit, ""), size=7)


def _words(axes: Any, client: httpx.Client, panel: dict[str, Any]) -> None:
    for labels, value in query_instant(client, substitute_variables(panel["targets"][0]["expr"])):
        if panel["type"] == "stat":
            axes.text(0.5, 0.5, f"{value:g}", size=30, ha="center", va="center", color="green")
        else:
            rows = [f"{name}: {text or '-'}" for name, text in labels.items()]
            axes.text(0, 0.9, "\n".join(rows), size=9, va="top", family="monospace")


if __name__ == "__main__":
    sys.exit(main())
