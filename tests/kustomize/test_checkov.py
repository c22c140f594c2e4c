"""What a scanner of others says of the rendered prod: nothing but what .checkov.yaml explains."""

import json
import shutil
import subprocess

import pytest
import yaml


def test_checkov_finds_what_is_explained_and_nothing_else(render, tree, tmp_path):
    checkov = shutil.which("checkov", path=str(tree.root / ".venv-checkov/bin")) or shutil.which("checkov")
    if checkov is None:
        pytest.skip(
            "checkov is not installed: its dependencies clash with ours, so `make checkov` gives it a place of its own"
        )
    prod = render(tree.prod)
    # It knows no InferenceService: the predictor is shown to it as the pod that KServe makes.
    metadata = {"name": "llm-predictor", "namespace": prod.namespace}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": prod.predictor_pod.spec}
    known = [each for each in prod.objects if "kserve" not in each["apiVersion"]]
    file = tmp_path / "prod.yaml"
    file.write_text(yaml.safe_dump_all([*known, pod]))
    command = [checkov, "--file", str(file), "--framework", "kubernetes", "--output", "json", "--skip-download"]
    # In an empty folder, where it finds no configuration and looks at nothing else.
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 100
    explained = yaml.safe_load((tree.root / ".checkov.yaml").read_text())["skip-check"]
    assert {each["check_id"] for each in report["results"]["failed_checks"]} == set(explained)
