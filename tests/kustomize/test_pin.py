"""`make pin`: writes the image digests of a release into the overlays."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from devtools.paths import ROOT
from tests.kustomize.conftest import RAY

PREDICTOR = f"registry.example/team/predictor@sha256:{'1' * 64}"
STORAGE_INITIALIZER = f"registry.example/team/storage-initializer@sha256:{'2' * 64}"
PREDICTOR_RAY = f"registry.example/team/predictor-ray@sha256:{'3' * 64}"
WORDS = (f"PREDICTOR={PREDICTOR}", f"STORAGE_INITIALIZER={STORAGE_INITIALIZER}")

PINNED = (
    "kustomize/components/images/kustomization.yaml",
    "manifests/cluster/storage-container/kustomization.yaml",
    "manifests/cluster/runtime/kustomization.yaml",
)
"""Files with names of images."""


def _make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "pin", *words], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for tree in ("kustomize", "manifests", "tests/kustomize/golden"):
        shutil.copytree(ROOT / tree, tmp_path / tree)
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


# The second run replaces a digest.
@pytest.mark.parametrize("times", [1, 2])
def test_pin_renders_every_overlay_with_the_digests(copy: Path, times: int) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: it renders")
    for _ in range(times):
        done = _make(copy, *WORDS, f"PREDICTOR_RAY={PREDICTOR_RAY}")
        assert done.returncode == 0, done.stderr
    rendered = list(copy.glob("tests/kustomize/golden/*.yaml"))
    assert rendered
    for golden in rendered:
        text = golden.read_text()
        predictor = PREDICTOR_RAY if golden.stem == RAY.name else PREDICTOR
        assert {predictor, STORAGE_INITIALIZER} <= set(text.split())
        assert "ghcr.io/example/kserve-llm" not in text
    component, *others = (yaml.safe_load((copy / name).read_text())["images"] for name in PINNED)
    assert all(image in component for images in others for image in images)


def test_pin_changes_only_names_and_digests(copy: Path) -> None:
    _make(copy, *WORDS)
    for name in PINNED:
        before, after = (ROOT / name).read_text().splitlines(), (copy / name).read_text().splitlines()
        changed = {new for old, new in zip(before, after, strict=True) if old != new}
        assert {line.split(":")[0].strip() for line in changed} == {"newName", "digest"}


@pytest.mark.parametrize(
    "words",
    [
        ["PREDICTOR=registry.example/predictor:latest"],
        [f"PREDICTOR={PREDICTOR}"],
        [*WORDS, "PREDICTOR_RAY=registry.example/predictor-ray:latest"],
    ],
)
def test_pin_rejects_names_without_a_digest_and_writes_nothing(copy: Path, words: list[str]) -> None:
    done = _make(copy, *words)
    assert done.returncode != 0
    assert "make pin PREDICTOR=" in done.stdout
    name = "kustomize/components/images/kustomization.yaml"
    assert (copy / name).read_text() == (ROOT / name).read_text()
