"""The workflows say nothing that is not there, and bring in nothing that could become another thing.

Their form is check-jsonschema's, what they may do is zizmor's: see `make lint`.
"""

import re
import subprocess
from collections.abc import Iterator

import pytest
import yaml

from tests.images.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
TEXTS = {path.name: path.read_text() for path in WORKFLOWS}
FOLDERS = ("benchmarks", "kustomize", "manifests", "predictor", "preflight", "storage_initializer", "tests", ".github")


def _steps() -> Iterator[tuple[str, dict]]:
    """Every step, and the name of its workflow."""
    for name, text in TEXTS.items():
        for job in yaml.safe_load(text)["jobs"].values():
            yield from ((name, step) for step in job.get("steps", []))


SCRIPTS = [pytest.param(step["run"], id=f"{name}: {step['run'][:20]}") for name, step in _steps() if "run" in step]


def test_an_action_is_a_commit_with_its_version_beside_it_and_the_same_everywhere() -> None:
    pins: dict[str, set[str]] = {}
    for text in TEXTS.values():
        for action, pin in re.findall(r"uses: (?!\./)([^@\s]+)@(.*)", text):
            assert re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", pin), f"{action}@{pin}"
            pins.setdefault(action, set()).add(pin)
    assert pins
    assert {action: found for action, found in pins.items() if len(found) > 1} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_bash(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_calls_targets_of_make_that_are_there(script: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {called for called in re.findall(r"\bmake ([a-z-]+)", script) if called not in targets} == set()


@pytest.mark.parametrize("name", TEXTS)
def test_a_workflow_names_files_that_are_there(name: str) -> None:
    paths = re.findall(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]+", TEXTS[name])
    assert {path for path in paths if not list(ROOT.glob(path.replace("**", "*")))} == set()


def test_an_image_is_built_from_a_target_that_is_there() -> None:
    jobs = yaml.safe_load(TEXTS["images.yaml"])["jobs"].values()
    built = [(job["with"]["dockerfile"], job["with"].get("target")) for job in jobs if "with" in job]
    assert {dockerfile for dockerfile, _ in built} == {
        "images/predictor/Dockerfile",
        "images/storage_initializer/Dockerfile",
    }
    for dockerfile, target in built:
        assert not target or re.search(rf"^FROM .* AS {target}$", (ROOT / dockerfile).read_text(), re.MULTILINE)
