"""The command line: output and exit codes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from devtools.paths import ROOT
from preflight.__main__ import main
from preflight.deployment import Deployment
from tests.preflight.conftest import FakeCluster

Rendered = Callable[[str], Deployment]
Capture = pytest.CaptureFixture[str]

PROD = ROOT / "kustomize/overlays/prod"


@pytest.fixture
def broken(tmp_path: Path, rendered: Rendered) -> Path:
    """An overlay of prod with a mistake in a patch."""
    rendered("prod")  # Skips without kubectl.
    patch = [{"op": "replace", "path": "/spec/predictor/model/storageUri", "value": "pvc://models/7b"}]
    kustomization = {
        "resources": [os.path.relpath(PROD, tmp_path.resolve())],
        "patches": [{"target": {"kind": "InferenceService"}, "patch": yaml.safe_dump(patch)}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return tmp_path


def test_main_without_errors_returns_0(rendered: Rendered, capsys: Capture) -> None:
    rendered("prod")
    assert main([str(PROD)]) == 0
    *warnings, summary = capsys.readouterr().out.splitlines()
    assert all("were not checked" in warning for warning in warnings)
    flags = ("affinity", "nodeselector", "tolerations")
    assert summary.endswith(
        "needs: rollout 4 nvidia.com/gpu, 16 cpu, 64.0 GiB of memory; knative flags "
        + ", ".join(f"kubernetes.podspec-{flag}" for flag in flags)
    )


def test_command_with_an_error_exits_with_1_and_one_line(broken: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "preflight", str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: InferenceService/llm: storageUri 'pvc://models/7b' mounts a sub-path")


def test_main_json_prints_findings_and_needs(broken: Path, capsys: Capture) -> None:
    assert main(["--json", str(broken)]) == 1
    output = json.loads(capsys.readouterr().out)
    [error] = [finding for finding in output["findings"] if finding["severity"] == "error"]
    assert set(error) == {"where", "problem", "remedy", "source", "severity"}
    assert output["needs"]["secrets"] == []


def test_main_with_a_check_error_returns_2(tmp_path: Path, capsys: Capture, rendered: Rendered) -> None:
    rendered("prod")
    assert main([str(tmp_path)]) == 2
    assert main([str(PROD), "--crds", str(tmp_path)]) == 2
    assert main([str(PROD), "--model-config", str(tmp_path / "none.json")]) == 2
    render, crds, config = capsys.readouterr().err.splitlines()
    assert re.search(r"does not render: unable to find one of .*\. ", render)
    assert "contains no CustomResourceDefinition" in crds
    assert "is not a config.json of a decoder" in config


def test_main_context_checks_the_cluster(cluster: FakeCluster, rendered: Rendered, capsys: Capture) -> None:
    rendered("dev")
    cluster.config_map("config-defaults", {"max-revision-timeout-seconds": "300"})
    cluster.answers["/apis/apiextensions.k8s.io/v1/customresourcedefinitions"] = {"items": []}
    cluster.answers["/apis/storage.k8s.io/v1/storageclasses"] = {"items": []}
    cluster.forbidden |= {"/version/", "/api/v1/nodes"}
    assert main([str(ROOT / "kustomize/overlays/dev"), "--context", "here"]) == 1
    output = capsys.readouterr().out
    assert "timeout is 600 s, more than Knative's maximum of 300 s" in output
    assert "Knative Serving is not installed" in output


def test_main_context_validates_with_the_schemas_of_the_cluster(
    cluster: FakeCluster, rendered: Rendered, capsys: Capture
) -> None:
    rendered("dev")
    predictor = {"type": "object", "properties": {"model": {"type": "object"}}}
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {"predictor": predictor}}}}
    version = {"name": "v1beta1", "served": True, "schema": {"openAPIV3Schema": schema}}
    spec = {"group": "serving.kserve.io", "names": {"kind": "InferenceService"}, "versions": [version]}
    cluster.answers["/apis/apiextensions.k8s.io/v1/customresourcedefinitions"] = {"items": [{"spec": spec}]}
    cluster.forbidden |= {"/version/", "/api/v1/nodes"}
    main([str(ROOT / "kustomize/overlays/dev"), "--context", "here"])
    output = capsys.readouterr().out
    assert "InferenceService/llm: $.spec.predictor: Additional properties are not allowed ('automountServiceA" in output
    assert "ServingRuntime/kserve-llm: its fields were not checked" in output


def test_main_model_config_checks_memory(rendered: Rendered, capsys: Capture) -> None:
    rendered("dev")
    assert main([str(ROOT / "kustomize/overlays/dev"), "--model-config", str(PROD / "model-config.json")]) == 1
    assert "the memory limit is 4.0 GiB" in capsys.readouterr().out
