"""The rules as promtool sees them: they parse, each alert fires when it should and only then, and has a runbook."""

import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools.processes import ROOT
from predictor.observability import metrics

RULES = ROOT / "manifests" / "prometheus" / "rules.yaml"
CASES = Path(__file__).with_name("rules_test.yaml")
LIMIT = re.compile(r" (?:==|>) [\d.]+")
"""What an alert compares with; of several, all must hold."""
RUNBOOK = ROOT / "manifests" / "monitoring" / "RUNBOOK.md"


def rules() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(RULES.read_text())
    return loaded


def every(kind: str, document: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """All rules of the kind `alert` or `record`."""
    for group in (document or rules())["groups"]:
        yield from (rule for rule in group["rules"] if kind in rule)


ALERTS = [rule["alert"] for rule in every("alert")]


def promtool(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed; it is in Debian's package prometheus")
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=False)


def run_cases(folder: Path, document: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    """The cases on these rules without annotations, whose text promtool would compare as well."""
    document = copy.deepcopy(document)
    for rule in every("alert", document):
        rule.pop("annotations", None)
    (folder / "rules.yaml").write_text(yaml.safe_dump(document))
    shutil.copy(CASES, folder)
    return promtool("test", "rules", folder / CASES.name)


def noticed(folder: Path, mistake: Callable[[dict[str, Any]], dict[str, Any]]) -> set[str]:
    """Alerts whose cases fail once `mistake` has changed every alert's rule."""
    document = rules()
    for rule in every("alert", document):
        rule |= mistake(rule)
    done = run_cases(folder, document)
    return set(re.findall(r"alertname: ?(\w+)", done.stdout + done.stderr))


def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    done = run_cases(tmp_path, rules())
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_cases_notice_every_alert_that_never_fires(tmp_path: Path) -> None:
    assert noticed(tmp_path, lambda _: {"expr": "vector(0) > 1"}) == set(ALERTS)


def test_the_cases_notice_every_alert_that_always_fires(tmp_path: Path) -> None:
    assert noticed(tmp_path, lambda _: {"expr": "vector(1)", "for": "0s"}) == set(ALERTS)


def test_the_cases_notice_every_alert_that_does_not_wait(tmp_path: Path) -> None:
    waits = {rule["alert"] for rule in every("alert") if "for" in rule}
    assert noticed(tmp_path, lambda _: {"for": "0s"}) == waits


@pytest.mark.parametrize("number", [0, 1])
def test_the_cases_notice_every_limit_that_is_not_asked_for(tmp_path: Path, number: int) -> None:
    def without(rule: dict[str, Any]) -> dict[str, Any]:
        limits = list(LIMIT.finditer(rule["expr"]))
        start, end = limits[number].span() if number < len(limits) else (0, 0)
        return {"expr": rule["expr"][:start] + rule["expr"][end:]}

    limited = {rule["alert"] for rule in every("alert") if len(LIMIT.findall(rule["expr"])) > number}
    assert noticed(tmp_path, without) == limited


def test_every_alert_has_a_case_that_fires_and_one_that_must_not() -> None:
    cases = [each for test in yaml.safe_load(CASES.read_text())["tests"] for each in test.get("alert_rule_test", [])]
    for fires in (True, False):
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) is fires} == set(ALERTS)


def test_the_runbook_has_a_section_for_every_alert_and_no_other() -> None:
    sections = re.findall(r"^## (.+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == ALERTS
    for rule in every("alert"):
        assert rule["annotations"]["runbook"] == f"manifests/monitoring/RUNBOOK.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_links_of_the_runbook_lead_to_its_sections() -> None:
    text = RUNBOOK.read_text()
    assert {link.lower() for link in re.findall(r"\(#([a-z0-9-]+)\)", text)} <= {alert.lower() for alert in ALERTS}


def test_the_operator_gets_the_same_rules() -> None:
    manifest = yaml.safe_load((ROOT / "manifests/monitoring/prometheus-rule.yaml").read_text())
    assert manifest["spec"] == rules(), "run `make render`"


def test_rules_ask_for_metrics_that_there_are_and_limits_that_are_buckets() -> None:
    readme = (ROOT / "predictor" / "README.md").read_text()
    for expr in (rule["expr"] for rule in (*every("alert"), *every("record"))):
        for name in re.findall(r"\bkserve_llm_([a-z0-9_]+)", expr):
            assert f"`{re.sub('_(bucket|count|sum)$', '', name)}`" in readme, name
        for limit in re.findall(r'le="([^"]+)"', expr):
            buckets = metrics.GAP_SECONDS if "inter_token" in expr else metrics.SECONDS
            assert float(limit) in buckets


def test_alerts_ask_for_rules_that_are_recorded() -> None:
    recorded = {rule["record"] for rule in every("record")}
    asked = {name for rule in every("alert") for name in re.findall(r"kserve_llm:[\w:]+", rule["expr"])}
    assert asked
    assert asked <= recorded
