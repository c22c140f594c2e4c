"""Overlays and components render the same with the kustomize of other tools; docs/how-to/gitops.md lists them."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from devtools.kubectls import PACKAGES
from devtools.paths import ROOT
from tests.kustomize.conftest import BASE, COMPONENTS, GOLDEN, HOW_TO, IMAGES, OVERLAYS, PINNED, Render, kubectl_with

OLDEST, *_, NEWEST = PACKAGES


def run(version: str, *arguments: str) -> str:
    done = subprocess.run([kubectl_with(version), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", PACKAGES)
def test_overlays_render_the_same_with_every_kustomize(version: str) -> None:
    for folder in OVERLAYS:
        assert run(version, "kustomize", str(ROOT / folder)) == (GOLDEN / f"{folder.name}.yaml").read_text(), folder


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_components_render_the_same_with_the_oldest_and_newest_kustomize(
    version: str, render: Render, tmp_path: Path
) -> None:
    above = tmp_path.resolve()
    reference = {"name": "model-download", "behavior": "merge", "literals": [f"MODEL_REFERENCE={PINNED}"]}
    for folder in COMPONENTS:
        kustomization = {
            "resources": [os.path.relpath(ROOT / BASE, above)],
            "components": [os.path.relpath(ROOT / path, above) for path in dict.fromkeys([folder, IMAGES])],
            "configMapGenerator": [reference],
        }
        (above / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        rendered = tuple(yaml.load_all(run(version, "kustomize", str(above)), yaml.CSafeLoader))
        assert rendered == render(folder).objects, folder


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_installed_kubectl_has_the_named_kustomize(version: str) -> None:
    assert json.loads(run(version, "version", "--client", "--output=json"))["kustomizeVersion"] == f"v{version}"


def test_page_lists_the_tested_versions() -> None:
    text = (HOW_TO / "gitops.md").read_text().partition("## Versions of kustomize")[2]
    [listed] = re.findall(r"the same, byte by byte, with kustomize ([^:]+):", text)
    assert re.findall(r"\d+\.\d+\.\d+", listed) == list(PACKAGES)
