"""Workflows refer to existing files and targets, and pin their actions.

check-jsonschema validates their schema and zizmor their security; see `make lint`.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
TEXTS = {path.name: path.read_text() for path in WORKFLOWS}
FOLDERS = (
    "benchmarks",
    "devtools",
    "kserve_llm",
    "kustomize",
    "manifests",
    "predictor",
    "preflight",
    "snapshot_format",
    "storage_initializer",
    "tests",
    ".github",
)


def _steps() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every step with the name of its workflow."""
    for name, text in TEXTS.items():
        for job in yaml.safe_load(text)["jobs"].values():
            yield from ((name, step) for step in job.get("steps", []))


SCRIPTS = [pytest.param(step["run"], id=f"{name}: {step['run'][:20]}") for name, step in _steps() if "run" in step]


def test_workflow_actions_are_pinned_to_one_commit() -> None:
    pins: dict[str, set[str]] = {}
    for text in TEXTS.values():
        for action, pin in re.findall(r"uses: (?!\./)([^@\s]+)@(.*)", text):
            assert re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", pin), f"{action}@{pin}"
            pins.setdefault(action, set()).add(pin)
    assert pins
    assert {action: commits for action, commits in pins.items() if len(commits) > 1} == {}


@pytest.mark.parametrize("name", TEXTS)
def test_workflow_has_no_permissions_by_default(name: str) -> None:
    workflow = yaml.safe_load(TEXTS[name])
    assert workflow["permissions"] == {}
    # A job that calls another workflow passes its own permissions on.
    assert [job for job, content in workflow["jobs"].items() if "permissions" not in content] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_workflow_script_is_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_workflow_script_make_targets_exist(script: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {called for called in re.findall(r"\bmake ([a-z-]+)", script) if called not in targets} == set()


@pytest.mark.parametrize("name", TEXTS)
def test_workflow_paths_exist(name: str) -> None:
    paths = re.findall(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]+", TEXTS[name])
    assert {path for path in paths if not list(ROOT.glob(path.replace("**", "*")))} == set()


@pytest.mark.parametrize(("tag", "is_candidate"), [("v1.2.0", False), ("v1.2.0rc1", True)])
def test_workflow_releases_a_candidate_as_a_prerelease(tag: str, is_candidate: bool, tmp_path: Path) -> None:
    for name, line in (("python", "exit 0"), ("gh", 'printf "%s\\n" "$@"')):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
    [script] = [
        step["run"] for name, step in _steps() if name == "release.yaml" and "gh release" in step.get("run", "")
    ]
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_REF_NAME": tag, "RUNNER_TEMP": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-e", "-c", script], env=variables, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    words = done.stdout.splitlines()
    assert words[:3] == ["release", "create", tag]
    assert ("--prerelease" in words) == is_candidate


def test_workflow_tags_images_as_versions_are_written() -> None:
    """1.2.0rc1 is a version of PEP 440 and none of Semantic Versioning, by which its image would have no tag."""
    [step] = [step for _, step in _steps() if step.get("id") == "tags"]
    assert "type=pep440,pattern={{version}}" in step["with"]["tags"].splitlines()


def test_workflow_image_targets_exist() -> None:
    jobs = yaml.safe_load(TEXTS["images.yaml"])["jobs"].values()
    built = [(job["with"]["dockerfile"], job["with"].get("target")) for job in jobs if "with" in job]
    assert {dockerfile for dockerfile, _ in built} == {
        "images/predictor/Dockerfile",
        "images/storage_initializer/Dockerfile",
    }
    for dockerfile, target in built:
        assert not target or re.search(rf"^FROM .* AS {target}$", (ROOT / dockerfile).read_text(), re.MULTILINE)


def test_workflow_pushes_every_image_of_the_overlays() -> None:
    jobs = yaml.safe_load(TEXTS["images.yaml"])["jobs"].values()
    pushed = {job["with"]["name"] for job in jobs if "with" in job}
    component = yaml.safe_load((ROOT / "kustomize/components/images/kustomization.yaml").read_text())
    names = [image["newName"].rpartition("/")[2] for image in component["images"]]
    assert {name for name in names if name.startswith("kserve-llm-")} == pushed
