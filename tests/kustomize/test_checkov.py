"""Checkov's findings for the rendered prod equal the exceptions in .checkov.yaml."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from devtools.paths import ROOT
from tests.kustomize.conftest import PROD, Render


def test_checkov_findings_equal_the_documented_exceptions(render: Render, tmp_path: Path) -> None:
    checkov = shutil.which("checkov", path=str(ROOT / ".venv-checkov/bin")) or shutil.which("checkov")
    if checkov is None:
        pytest.skip("checkov is not installed; `make checkov` installs it into a separate environment")
    prod = render(PROD)
    # Checkov has no checks for an InferenceService, so it gets the pod that KServe creates from it.
    metadata = {"name": "llm-predictor", "namespace": prod.namespace}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": prod.predictor_pod.spec}
    objects = [manifest for manifest in prod.objects if "kserve" not in manifest["apiVersion"]]
    file = tmp_path / "prod.yaml"
    file.write_text(yaml.safe_dump_all([*objects, pod]))
    command = [checkov, "--file", str(file), "--framework", "kubernetes", "--output", "json", "--skip-download"]
    # In an empty folder, where it finds no configuration and no other files.
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 100
    exceptions = yaml.safe_load((ROOT / ".checkov.yaml").read_text())["skip-check"]
    assert {check["check_id"] for check in report["results"]["failed_checks"]} == set(exceptions)
