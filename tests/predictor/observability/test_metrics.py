import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from devtools.paths import ROOT
from predictor.observability import metrics
from tests.predictor.servers import HANG_SECONDS, Server

ROW = re.compile(r"^\| (`[a-z0-9_`, ]+`) \|([^|]*)\|([^|]*)\|", re.MULTILINE)
SUFFIXES = ("_bucket", "_count", "_sum", "_created")
LOAD_PHASES = {"imports", "snapshot", "tokenizer", "weights", "pack", "kv_cache", "warm_up"}
ALLOWED = {
    "protocol": {*metrics.PROTOCOLS, metrics.OTHER},
    "phase": LOAD_PHASES,
    "finished_reason": {"eos_token", "length", "stop_sequence", "tool_calls", "cancelled", "deadline", "failed"},
    "status": {str(status) for status in (200, 499, *range(400, 430), 500, 503, 504)},
}
GAPS = ("inter_token_latency_seconds_count", "inter_token_latency_seconds_sum")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def documented_labels() -> dict[str, set[str]]:
    """Labels by metric in the page's table; without `model_name`."""
    page = (ROOT / "docs/how-to/monitoring.md").read_text()
    table = page.partition("| Metric | vLLM's name |")[2].partition("\n\n")[0]
    return {
        name: set(re.findall(r"`([a-z_]+)`", labels))
        for names, _, labels in ROW.findall(table)
        for name in re.findall(r"`([a-z0-9_]+)`", names)
    }


def samples(client: httpx.Client) -> Samples:
    """The demo model's series, by name without prefix and labels without the model's."""
    return {
        (sample.name.removeprefix(metrics.PREFIX), frozenset(sample.labels.items() - {("model_name", "demo")})): (
            sample.value
        )
        for family in parse_text(client.get("/metrics").text)
        for sample in family.samples
        if sample.name.startswith(metrics.PREFIX) and not sample.name.endswith("_created")
        if sample.labels["model_name"] == "demo"
    }


def series(client: httpx.Client) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """All series, including KServe's and Python's."""
    families = parse_text(client.get("/metrics").text)
    return {(sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples}


def value(client: httpx.Client, name: str, **labels: str) -> float:
    return samples(client).get((name, frozenset(labels.items())), 0.0)


@pytest.fixture
def change(client: httpx.Client) -> Callable[..., float]:
    """Difference of a series since the beginning of the test."""
    before = samples(client)
    return lambda name, **labels: value(client, name, **labels) - before.get((name, frozenset(labels.items())), 0.0)


def complete(client: httpx.Client, **parameters: Any) -> httpx.Response:
    body = {"model": "demo", "prompt": "17+25=", "max_tokens": 9, "temperature": 0, **parameters}
    return client.post("/v1/completions", json=body)


def test_metrics_equal_readme_table(client: httpx.Client) -> None:
    complete(client).raise_for_status()
    labels_by_metric: defaultdict[str, set[str]] = defaultdict(set)
    for name, labels in samples(client):
        for suffix in SUFFIXES:
            name = name.removesuffix(suffix)
        labels_by_metric[name] |= {label for label, _ in labels} - {"le"}
    assert dict(labels_by_metric) == documented_labels()


def test_metrics_include_kserve_histograms(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    for step in ("preprocess", "predict", "postprocess", "explain"):
        assert f"# TYPE request_{step}_seconds histogram" in text


def test_metrics_in_both_formats_have_same_names(client: httpx.Client) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    response = client.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    plain, open_metrics = (
        {sample.name for family in families for sample in family.samples if sample.name.startswith(metrics.PREFIX)}
        for families in (parse_text(client.get("/metrics").text), parse_openmetrics(response.text))
    )
    assert plain == open_metrics


def test_metrics_pass_promtool(client: httpx.Client) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; it is in Debian's package prometheus")
    text = client.get("/metrics").text
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_count_tokens_observes_one_gap_per_token_after_the_first_step() -> None:
    model_metrics = metrics.ModelMetrics("gaps")
    model_metrics.count_tokens(2, None)
    model_metrics.count_tokens(3, 0.3)
    gaps = {name: REGISTRY.get_sample_value(f"{metrics.PREFIX}{name}", {"model_name": "gaps"}) for name in GAPS}
    assert gaps == {"inter_token_latency_seconds_count": 3, "inter_token_latency_seconds_sum": pytest.approx(0.3)}


def test_completion_counts_tokens_and_latencies(client: httpx.Client, change: Callable[..., float]) -> None:
    complete(client, ignore_eos=True, n=2).raise_for_status()
    assert change("request_finished_total", finished_reason="length") == 2
    assert change("generation_tokens_total") == 18
    # A slow reader gets several tokens in its first step, and those have no gap.
    assert change("inter_token_latency_seconds_count") <= 16
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
def test_request_is_counted_by_protocol_and_status(
    server: Server,
    client: httpx.Client,
    change: Callable[..., float],
    path: str,
    body: dict[str, Any],
    protocol: str,
    status: int,
) -> None:
    assert client.post(path, json=body).status_code == status
    # The request is counted after its last byte is sent.
    server.wait_for(lambda: change("requests_total", protocol=protocol, status=str(status)) > 0)
    assert change("requests_total", protocol=protocol, status=str(status)) == 1


def test_probe_is_not_counted(client: httpx.Client) -> None:
    before = {key: number for key, number in samples(client).items() if key[0] == "requests_total"}
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/demo/ready", "/metrics"):
        client.get(path)
    assert {key: number for key, number in samples(client).items() if key[0] == "requests_total"} == before


def test_metrics_after_load_have_phases_and_model_info(client: httpx.Client) -> None:
    current = samples(client)
    phases = {
        dict(labels)["phase"]: number for (name, labels), number in current.items() if name == "load_phase_seconds"
    }
    assert set(phases) == LOAD_PHASES
    assert phases["imports"] > 0.1
    assert phases["weights"] > 0
    [info] = [dict(labels) for name, labels in current if name == "model_info"]
    assert info == {
        "commit": "",
        "adapter": "",
        "device": "cpu",
        "dtype": "float32",
        "quantization": "none",
        "tensor_parallel_size": "1",
    }
    assert value(client, "ready") == value(client, "live") == value(client, "self_check_success") == 1


def hostile(number: int) -> dict[str, Any]:
    """A request with a new value in every place that a client controls."""
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


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_requests_add_no_series(server: Server, client: httpx.Client, count: int) -> None:
    def send(numbers: range) -> set[int]:
        with httpx.Client(base_url=server.url, timeout=HANG_SECONDS, trust_env=False) as http:
            return {http.request(**hostile(number)).status_code for number in numbers}

    # One round of each kind creates the intended series.
    assert send(range(20)) <= {400, 404, 405, 422}
    before = series(client)
    with ThreadPoolExecutor(4) as pool:
        statuses = set().union(*pool.map(send, (range(start, count, 4) for start in range(4))))
    assert statuses <= {400, 404, 405, 422}
    assert series(client) == before


def unexpected_labels(current: Samples) -> dict[str, set[str]]:
    """Values outside of ALLOWED, and labels of ALLOWED without any value."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    for _, labels in current:
        for label, label_value in labels:
            values[label].add(label_value)
    return {
        label: values[label] - allowed
        for label, allowed in ALLOWED.items()
        if not values[label] or values[label] - allowed
    }


def test_label_values_come_from_fixed_sets(client: httpx.Client) -> None:
    complete(client).raise_for_status()
    assert client.get("/nowhere").status_code == 404
    server_samples = samples(client)
    assert unexpected_labels(server_samples) == {}
    planted = frozenset({("protocol", "planted"), ("status", "200")})
    assert unexpected_labels({**server_samples, ("requests_total", planted): 1.0}) == {"protocol": {"planted"}}
    without_phases = {key: number for key, number in server_samples.items() if key[0] != "load_phase_seconds"}
    assert unexpected_labels(without_phases) == {"phase": set()}
