"""`cluster.sh` without a cluster: fake kubectl and curl record their calls."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools.paths import ROOT

WORKFLOW = ROOT / ".github/workflows/e2e.yaml"


def _run(mode: str, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Run the script; return the recorded calls and the applied objects."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    for tree in ("kustomize", "manifests"):
        shutil.copytree(ROOT / tree, folder / tree)
    # As after a release: the script must replace the released images.
    images = folder / "kustomize/components/images/kustomization.yaml"
    images.write_text(re.sub(r"newTag: 0\.\d+\.\d+", f"digest: sha256:{'0' * 64}", images.read_text()))
    (folder / "tests/e2e").mkdir(parents=True)
    shutil.copy(ROOT / "tests/e2e/cluster.sh", folder / "tests/e2e")
    (folder / "bin").mkdir()
    for name in ("kubectl", "curl"):
        shutil.copy(ROOT / f"tests/programs/fake_{name}", folder / "bin" / name)
    calls, rendered = folder / "calls", folder / "rendered.yaml"
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "REAL_KUBECTL": kubectl,
        "CALLS": str(calls),
        "RENDERED": str(rendered),
    }
    command = ["bash", str(folder / "tests/e2e/cluster.sh"), mode]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert not list(folder.glob("kustomize/overlays/e2e.*"))
    return calls.read_text(), list(yaml.safe_load_all(rendered.read_text()))


def _images(objects: list[dict[str, Any]]) -> set[str]:
    kinds = {"Job", "ServingRuntime"}
    pods = [manifest["spec"].get("template", manifest)["spec"] for manifest in objects if manifest["kind"] in kinds]
    return {container["image"] for pod in pods for container in pod["containers"]}


@pytest.mark.parametrize("mode", ["knative", "standard"])
def test_cluster_script_deploys_the_loaded_images(mode: str, tmp_path: Path) -> None:
    _, objects = _run(mode, tmp_path)
    (loaded,) = re.findall(r"kind load docker-image (.+)", WORKFLOW.read_text())
    assert _images(objects) == set(loaded.split())


def test_cluster_script_knative_sends_requests_before_and_after_scale_to_zero(tmp_path: Path) -> None:
    calls, _ = _run("knative", tmp_path)
    requests = re.findall(r"^curl .*", calls, re.MULTILINE)
    assert len(requests) == 2
    assert all("--header Host: llm.kserve-llm-dev.example.com" in call for call in requests)
    assert calls.count("port-forward --namespace istio-system service/istio-ingressgateway") == 2


def test_cluster_script_standard_checks_service_and_autoscaler(tmp_path: Path) -> None:
    calls, objects = _run("standard", tmp_path)
    assert calls.count("\ncurl ") == 1
    assert "port-forward --namespace kserve-llm-dev service/llm-predictor" in calls
    assert "get hpa" in calls
    (service,) = (manifest for manifest in objects if manifest["kind"] == "InferenceService")
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
