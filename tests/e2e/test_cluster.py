"""What `cluster.sh` does where there is no cluster: kubectl only renders, and curl only notes what it was asked for."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github/workflows/e2e.yaml"
KUBECTL = """#!/usr/bin/env bash
echo "kubectl $*" >> "$CALLS"
case "$1 $2" in
  apply*) "$REAL_KUBECTL" kustomize "$3" > "$RENDERED" ;;
  port-forward*) exec sleep 300 ;;
  "get inferenceservice") printf http://llm.kserve-llm-dev.example.com ;;
  "get hpa") echo llm-predictor ;;
esac
"""
# As the real one tries until the port is open, this one waits for who opens it.
CURL = """#!/usr/bin/env bash
until [ "$(grep -c '^kubectl port-forward' "$CALLS")" -gt "$(grep -c '^curl' "$CALLS")" ]; do sleep 0.02; done
echo "curl $*" >> "$CALLS"
"""


def _ran(mode: str, folder: Path) -> tuple[str, list[dict]]:
    """What was called, and the objects that were applied."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: it renders the overlay")
    for tree in ("kustomize", "manifests"):
        shutil.copytree(ROOT / tree, folder / tree)
    # As after a release: what was tagged there must not be what is tested here.
    images = folder / "kustomize/components/images/kustomization.yaml"
    images.write_text(re.sub(r"newTag: 0\.\d+\.\d+", f"digest: sha256:{'0' * 64}", images.read_text()))
    (folder / "tests/e2e").mkdir(parents=True)
    shutil.copy(ROOT / "tests/e2e/cluster.sh", folder / "tests/e2e")
    (folder / "bin").mkdir()
    for name, script in {"kubectl": KUBECTL, "curl": CURL}.items():
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    calls, rendered = folder / "calls", folder / "rendered.yaml"
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "REAL_KUBECTL": kubectl,
        "CALLS": str(calls),
        "RENDERED": str(rendered),
    }
    script = ["bash", folder / "tests/e2e/cluster.sh", mode]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(folder.glob("kustomize/overlays/e2e.*"))
    return calls.read_text(), list(yaml.safe_load_all(rendered.read_text()))


def _images(objects: list[dict]) -> set[str]:
    pods = [each["spec"].get("template", each)["spec"] for each in objects if each["kind"] in {"Job", "ServingRuntime"}]
    return {container["image"] for pod in pods for container in pod["containers"]}


@pytest.mark.parametrize("mode", ["knative", "standard"])
def test_cluster_script_deploys_the_loaded_images(mode: str, tmp_path: Path) -> None:
    _, objects = _ran(mode, tmp_path)
    (loaded,) = re.findall(r"kind load docker-image (.+)", WORKFLOW.read_text())
    assert _images(objects) == set(loaded.split())


def test_cluster_script_knative_sends_requests_before_and_after_scale_to_zero(tmp_path: Path) -> None:
    calls, _ = _ran("knative", tmp_path)
    asked = re.findall(r"^curl .*", calls, re.MULTILINE)
    assert len(asked) == 2
    assert all("--header Host: llm.kserve-llm-dev.example.com" in call for call in asked)
    assert calls.count("port-forward --namespace istio-system service/istio-ingressgateway") == 2


def test_cluster_script_standard_checks_service_and_autoscaler(tmp_path: Path) -> None:
    calls, objects = _ran("standard", tmp_path)
    assert calls.count("\ncurl ") == 1
    assert "port-forward --namespace kserve-llm-dev service/llm-predictor" in calls
    assert "get hpa" in calls
    (service,) = (each for each in objects if each["kind"] == "InferenceService")
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
