"""Recording and alerting rules: promtool test cases, mutations of the rules, runbook sections."""

import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools.paths import ROOT
from predictor.observability import metrics

RULES = ROOT / "manifests" / "prometheus" / "rules.yaml"
CASES = Path(__file__).with_name("rules_test.yaml")
LIMIT = re.compile(r" (?:==|>) [\d.]+")
"""A threshold of an alert; an alert with several requires all of them."""
RUNBOOK = ROOT / "manifests" / "monitoring" / "RUNBOOK.md"


def rules() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(RULES.read_text())
    return loaded


def every(kind: str, document: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rules of the kind `alert` or `record`."""
    for group in (document or rules())["groups"]:
        yield from (rule for rule in group["rules"] if kind in rule)


ALERTS = [rule["alert"] for rule in every("alert")]


def promtool(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed; it is in Debian's package prometheus")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def run_cases(folder: Path, document: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    """Run the test cases on rules without annotations, whose text promtool would compare."""
    document = copy.deepcopy(document)
    for rule in every("alert", document):
        rule.pop("annotations", None)
    (folder / "rules.yaml").write_text(yaml.safe_dump(document))
    shutil.copy(CASES, folder)
    return promtool("test", "rules", folder / CASES.name)


def failing_alerts(folder: Path, mutate: Callable[[dict[str, Any]], dict[str, Any]]) -> set[str]:
    """Return the alerts whose cases fail after every alert's rule is mutated."""
    document = rules()
    for rule in every("alert", document):
        rule |= mutate(rule)
    done = run_cases(folder, document)
    return set(re.findall(r"alertname: ?(\w+)", done.stdout + done.stderr))


def test_rules_pass_promtool_check() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_rules_pass_the_promtool_cases(tmp_path: Path) -> None:
    done = run_cases(tmp_path, rules())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_cases_fail_for_every_alert_that_never_fires(tmp_path: Path) -> None:
    assert failing_alerts(tmp_path, lambda _: {"expr": "vector(0) > 1"}) == set(ALERTS)


@pytest.mark.slow
def test_cases_fail_for_every_alert_that_always_fires(tmp_path: Path) -> None:
    assert failing_alerts(tmp_path, lambda _: {"expr": "vector(1)", "for": "0s"}) == set(ALERTS)


@pytest.mark.slow
def test_cases_fail_for_every_alert_without_its_wait(tmp_path: Path) -> None:
    waits = {rule["alert"] for rule in every("alert") if "for" in rule}
    assert failing_alerts(tmp_path, lambda _: {"for": "0s"}) == waits


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_cases_fail_for_every_alert_without_a_threshold(tmp_path: Path, number: int) -> None:
    def without(rule: dict[str, Any]) -> dict[str, Any]:
        limits = list(LIMIT.finditer(rule["expr"]))
        start, end = limits[number].span() if number < len(limits) else (0, 0)
        return {"expr": rule["expr"][:start] + rule["expr"][end:]}

    limited = {rule["alert"] for rule in every("alert") if len(LIMIT.findall(rule["expr"])) > number}
    assert failing_alerts(tmp_path, without) == limited


def test_every_alert_has_a_firing_and_a_silent_case() -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test.get("alert_rule_test", [])]
    for fires in (True, False):
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) is fires} == set(ALERTS)


def test_runbook_sections_equal_the_alerts() -> None:
    sections = re.findall(r"^## (.+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == ALERTS
    for rule in every("alert"):
        assert rule["annotations"]["runbook"] == f"manifests/monitoring/RUNBOOK.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_runbook_links_point_to_its_sections() -> None:
    text = RUNBOOK.read_text()
    links = {link.lower() for link in re.findall(r"\(#([a-z0-9-]+)\)", text)}
    assert links
    assert links <= {alert.lower() for alert in ALERTS}


def test_prometheus_rule_equals_the_rules_file() -> None:
    manifest = yaml.safe_load((ROOT / "manifests/monitoring/prometheus-rule.yaml").read_text())
    assert manifest["spec"] == rules(), "run `make render`"


def test_rules_use_documented_metrics_and_existing_buckets() -> None:
    page = (ROOT / "docs/how-to/monitoring.md").read_text()
    for expr in (rule["expr"] for rule in (*every("alert"), *every("record"))):
        for name in re.findall(r"\bkserve_llm_([a-z0-9_]+)", expr):
            assert f"`{re.sub('_(bucket|count|sum)$', '', name)}`" in page, name
        for limit in re.findall(r'le="([^"]+)"', expr):
            buckets = metrics.GAP_SECONDS if "inter_token" in expr else metrics.SECONDS
            assert float(limit) in buckets


def test_alerts_use_recorded_rules() -> None:
    recorded = {rule["record"] for rule in every("record")}
    names = {name for rule in every("alert") for name in re.findall(r"kserve_llm:[\w:]+", rule["expr"])}
    assert names
    assert names <= recorded


def documented_queries() -> list[str]:
    blocks = [
        block
        for page in sorted((ROOT / "docs/how-to").glob("*.md"))
        for block in re.findall(r"^```text\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    return [block for block in blocks if "kserve_llm_" in block]


def test_documented_queries_are_valid_and_use_documented_metrics(tmp_path: Path) -> None:
    queries = documented_queries()
    assert len(queries) >= 3
    pages = "".join((ROOT / "docs/how-to" / name).read_text() for name in ("monitoring.md", "api-keys.md"))
    for name in re.findall(r"\bkserve_llm_([a-z0-9_]+)", "".join(queries)):
        assert f"`{re.sub('_(bucket|count|sum)$', '', name)}`" in pages, name
    recorded = [{"record": f"documented:{index}", "expr": query} for index, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "documented", "rules": recorded}]}))
    done = promtool("check", "rules", tmp_path / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
