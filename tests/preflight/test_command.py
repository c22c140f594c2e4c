"""The command: what it prints, and with which exit code it ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from preflight.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PROD = ROOT / "kustomize/overlays/prod"


@pytest.fixture
def broken(tmp_path, rendered):
    """Prod, with one mistake in a patch."""
    rendered("prod")  # Skips without kubectl.
    patch = [{"op": "replace", "path": "/spec/predictor/model/storageUri", "value": "pvc://models/7b"}]
    kustomization = {
        "resources": [os.path.relpath(PROD, tmp_path.resolve())],
        "patches": [{"target": {"kind": "InferenceService"}, "patch": yaml.safe_dump(patch)}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return tmp_path


def test_ends_with_0_where_nothing_is_wrong(rendered, capsys):
    rendered("prod")
    assert main([str(PROD)]) == 0
    *warnings, summary = capsys.readouterr().out.splitlines()
    assert all("were not checked" in warning for warning in warnings)
    flags = ("affinity", "nodeselector", "tolerations")
    assert summary.endswith("needs: knative flags " + ", ".join(f"kubernetes.podspec-{flag}" for flag in flags))


def test_ends_with_1_and_one_line_where_something_is(broken):
    command = [sys.executable, "-W", "error", "-m", "preflight", str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: InferenceService/llm: storageUri 'pvc://models/7b' mounts a sub-path")


def test_speaks_json(broken, capsys):
    assert main(["--json", str(broken)]) == 1
    said = json.loads(capsys.readouterr().out)
    [error] = [finding for finding in said["findings"] if finding["severity"] == "error"]
    assert set(error) == {"where", "problem", "remedy", "severity"}
    assert said["needs"]["secrets"] == []


def test_ends_with_2_where_it_cannot_look(tmp_path, capsys, rendered):
    rendered("prod")
    assert main([str(tmp_path)]) == 2
    assert main([str(PROD), "--crds", str(tmp_path)]) == 2
    assert main([str(PROD), "--model-config", str(tmp_path / "none.json")]) == 2
    render, crds, config = capsys.readouterr().err.splitlines()
    assert re.search(r"does not render \(unable to find one of .*\); ", render)
    assert "holds no CustomResourceDefinition" in crds
    assert "is no config.json of a decoder" in config


def test_asks_the_cluster_of_a_context(cluster, rendered, capsys):
    rendered("dev")
    cluster.config_map("config-defaults", {"max-revision-timeout-seconds": "300"})
    cluster.answers["/apis/apiextensions.k8s.io/v1/customresourcedefinitions"] = {"items": []}
    cluster.answers["/apis/storage.k8s.io/v1/storageclasses"] = {"items": []}
    cluster.forbidden.add("/version/")
    assert main([str(ROOT / "kustomize/overlays/dev"), "--context", "here"]) == 1
    said = capsys.readouterr().out
    assert "timeout is 600 s, over the 300 s that Knative allows" in said
    assert "the cluster has no Knative Serving" in said


def test_takes_the_schema_of_custom_kinds_from_the_cluster(cluster, rendered, capsys):
    rendered("dev")
    predictor = {"type": "object", "properties": {"model": {"type": "object"}}}
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {"predictor": predictor}}}}
    version = {"name": "v1beta1", "served": True, "schema": {"openAPIV3Schema": schema}}
    spec = {"group": "serving.kserve.io", "names": {"kind": "InferenceService"}, "versions": [version]}
    cluster.answers["/apis/apiextensions.k8s.io/v1/customresourcedefinitions"] = {"items": [{"spec": spec}]}
    cluster.forbidden.add("/version/")
    main([str(ROOT / "kustomize/overlays/dev"), "--context", "here"])
    said = capsys.readouterr().out
    assert "InferenceService/llm: $.spec.predictor: Additional properties are not allowed ('automountServiceA" in said
    assert "ServingRuntime/kserve-llm: its fields were not checked" in said


def test_says_that_a_model_does_not_fit(rendered, capsys):
    rendered("dev")
    assert main([str(ROOT / "kustomize/overlays/dev"), "--model-config", str(PROD / "model-config.json")]) == 1
    assert "the memory limit is 4.0 GiB" in capsys.readouterr().out
