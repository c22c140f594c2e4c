"""What /metrics says: the names that are documented, numbers that are true, and no more series whatever is asked."""

import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from devtools.processes import ROOT
from predictor.observability import metrics
from tests.predictor.servers import Server

ROW = re.compile(r"^\| (`[a-z0-9_`, ]+`) \|([^|]*)\|([^|]*)\|", re.MULTILINE)
SUFFIXES = ("_bucket", "_count", "_sum", "_created")
HOSTILE = 10_000


def documented() -> dict[str, set[str]]:
    """Labels beside `model_name` by metric, as the README's table has them."""
    readme = (ROOT / "predictor" / "README.md").read_text()
    table = readme.partition("| Metric | vLLM's name |")[2].partition("\n\n")[0]
    return {
        name: set(re.findall(r"`([a-z_]+)`", labels))
        for names, _, labels in ROW.findall(table)
        for name in re.findall(r"`([a-z0-9_]+)`", names)
    }


def samples(client: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every series of ours but the times of creation, by name without prefix and labels without the model's."""
    found = {}
    for family in parse_text(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith(metrics.PREFIX) and not sample.name.endswith("_created"):
                assert sample.labels.pop("model_name") == "demo"
                found[sample.name.removeprefix(metrics.PREFIX), frozenset(sample.labels.items())] = sample.value
    return found


def series(client: httpx.Client) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """Every series there is, KServe's and Python's as well."""
    families = parse_text(client.get("/metrics").text)
    return {(sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples}


def value(client: httpx.Client, name: str, **labels: str) -> float:
    return samples(client).get((name, frozenset(labels.items())), 0.0)


@pytest.fixture
def change(client: httpx.Client) -> Callable[..., float]:
    """By how much a series has changed since the test began."""
    before = samples(client)
    return lambda name, **labels: value(client, name, **labels) - before.get((name, frozenset(labels.items())), 0.0)


def complete(client: httpx.Client, **parameters: Any) -> httpx.Response:
    body = {"model": "demo", "prompt": "17+25=", "max_tokens": 9, "temperature": 0, **parameters}
    return client.post("/v1/completions", json=body)


def test_the_readme_lists_every_metric_with_its_labels(client: httpx.Client) -> None:
    complete(client).raise_for_status()
    found: defaultdict[str, set[str]] = defaultdict(set)
    for name, labels in samples(client):
        for suffix in SUFFIXES:
            name = name.removesuffix(suffix)
        found[name] |= {label for label, _ in labels} - {"le"}
    assert dict(found) == documented()


def test_kserves_own_histograms_are_there_too(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    for step in ("preprocess", "predict", "postprocess", "explain"):
        assert f"# TYPE request_{step}_seconds histogram" in text


def test_both_formats_hold_the_same(client: httpx.Client) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    response = client.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    plain, open_metrics = (
        {sample.name for family in families for sample in family.samples if sample.name.startswith(metrics.PREFIX)}
        for families in (parse_text(client.get("/metrics").text), parse_openmetrics(response.text))
    )
    assert plain == open_metrics


def test_promtool_finds_nothing_wrong_with_the_names(client: httpx.Client) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; it is in Debian's package prometheus")
    text = client.get("/metrics").text
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_tokens_and_times_of_a_sequence_are_counted(client: httpx.Client, change: Callable[..., float]) -> None:
    complete(client, ignore_eos=True, n=2).raise_for_status()
    assert change("request_finished_total", finished_reason="length") == 2
    assert change("generation_tokens_total") == 18
    assert change("inter_token_latency_seconds_count") == 16
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert change(f"{name}_seconds_count") == 2, name
    first, queue, prefill, whole = (
        change(f"{name}_seconds_sum")
        for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "e2e_request_latency")
    )
    assert first == pytest.approx(queue + prefill)
    assert 0 < first < whole
    assert change("engine_steps_total") >= 9


@pytest.mark.parametrize(
    ("path", "body", "protocol", "status"),
    [
        ("/v1/completions", {"model": "demo", "prompt": "1+1=", "max_tokens": 2}, "openai", 200),
        ("/v1/completions", {"model": "demo", "prompt": "1+1=", "max_tokens": -2}, "openai", 400),
        ("/v1/models/demo:predict", {"instances": ["1+1="]}, "v1", 200),
        ("/v2/models/demo/generate", {"text_input": "1+1="}, "generate", 200),
        ("/v2/models/demo/generate", {"text": "1+1="}, "generate", 422),
        ("/v2/models/demo/generate_stream", {"text_input": "1+1="}, "generate_stream", 200),
        ("/v2/models/demo/infer", {}, "v2", 400),
        ("/v2/models/unknown/infer", {}, "other", 404),
        ("/nowhere", {}, "other", 404),
    ],
)
def test_a_request_is_counted_by_protocol_and_status(
    client: httpx.Client, change: Callable[..., float], path: str, body: dict[str, Any], protocol: str, status: int
) -> None:
    assert client.post(path, json=body).status_code == status
    # It is counted when the last byte is on its way, which the client may see before.
    until = time.monotonic() + 10
    while not change("requests_total", protocol=protocol, status=str(status)) and time.monotonic() < until:
        time.sleep(0.01)
    assert change("requests_total", protocol=protocol, status=str(status)) == 1


def test_probes_are_not_counted(client: httpx.Client) -> None:
    before = {key: number for key, number in samples(client).items() if key[0] == "requests_total"}
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/demo/ready", "/metrics"):
        client.get(path)
    assert {key: number for key, number in samples(client).items() if key[0] == "requests_total"} == before


def test_the_start_is_told_phase_by_phase_and_what_is_served(client: httpx.Client) -> None:
    found = samples(client)
    phases = {dict(labels)["phase"]: number for (name, labels), number in found.items() if name == "load_phase_seconds"}
    assert set(phases) == {"imports", "snapshot", "tokenizer", "weights", "pack", "kv_cache", "warm_up"}
    assert phases["imports"] > 0.1
    assert phases["weights"] > 0
    [info] = [dict(labels) for name, labels in found if name == "model_info"]
    assert info == {"commit": "", "device": "cpu", "dtype": "float32", "quantization": "none"}
    assert value(client, "ready") == value(client, "live") == value(client, "self_check_success") == 1


def hostile(number: int) -> dict[str, Any]:
    """A request that brings a name of its own wherever one may stand."""
    name = f"{number}%22%0A{{x={number}}}"
    paths = (
        f"/v2/models/{name}/infer",
        f"/v1/models/{name}:predict",
        f"/{name}",
        f"/v2/models/demo/versions/{number}/generate",
        "/v1/completions",
    )
    headers = {
        "x-request-id": f"id-{number}",
        "x-request-timeout-seconds": f"-{number}",
        "user-agent": f"agent-{number}",
        "authorization": f"Bearer key-{number}",
        "traceparent": f"00-{number:032x}-{number:016x}-01",
    }
    method = ("POST", "GET", "PUT", f"M{number}")[number // len(paths) % 4]
    return {
        "method": method,
        "url": paths[number % len(paths)],
        "headers": headers,
        "json": {"model": name, "prompt": name, "user": name, f"field{number}": name},
    }


@pytest.mark.slow
def test_ten_thousand_hostile_requests_add_no_series(server: Server, client: httpx.Client) -> None:
    def send(numbers: range) -> set[int]:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            return {http.request(**hostile(number)).status_code for number in numbers}

    # One round of everything opens the series that are meant to be.
    assert send(range(20)) <= {400, 404, 405, 422}
    before = series(client)
    with ThreadPoolExecutor(4) as pool:
        statuses = set().union(*pool.map(send, (range(start, HOSTILE, 4) for start in range(4))))
    assert statuses <= {400, 404, 405, 422}
    assert series(client) == before


def test_every_label_value_is_one_of_a_known_set(client: httpx.Client) -> None:
    allowed = {
        "protocol": {*metrics.PROTOCOLS, metrics.OTHER},
        "phase": {"imports", "snapshot", "tokenizer", "weights", "pack", "kv_cache", "warm_up"},
        "finished_reason": {"eos_token", "length", "stop_sequence", "cancelled", "deadline", "failed"},
        "status": {str(status) for status in (*(200, 499), *range(400, 430), *(500, 503, 504))},
    }
    for (_, labels), (label, values) in product(samples(client), allowed.items()):
        assert dict(labels).get(label, next(iter(values))) in values
