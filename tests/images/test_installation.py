"""Install each lock into an environment with torch only, as the Dockerfiles do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.paths import ROOT
from tests.images.conftest import Environment, locked

# A CUDA build of torch downloads several GB.
pytestmark = [pytest.mark.packaging, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def torch(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("torch"))
    environment.install(*re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    return environment


def test_initializer_lock_is_complete(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    path = "images/storage_initializer/requirements.txt"
    environment.install("--require-hashes", "--no-deps", "--requirement", ROOT / path)
    assert "No broken requirements" in environment.pip("check")
    assert environment.installed() == locked(path)


@pytest.mark.parametrize(
    "path",
    [
        "images/storage_initializer/requirements-prepare.txt",
        "images/predictor/requirements.txt",
        "images/predictor/requirements-ray.txt",
    ],
)
def test_lock_with_torch_is_complete(path: str, torch: Environment, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    # Hard links are safe, since pip replaces files, and torch takes half a gigabyte.
    shutil.copytree(torch.packages, environment.packages, copy_function=os.link, dirs_exist_ok=True)
    environment.install("--require-hashes", "--no-deps", "--requirement", ROOT / path)
    assert "No broken requirements" in environment.pip("check")
    installed, expected = environment.installed(), locked(path)
    assert installed.items() >= expected.items()
    # A CUDA build of torch installs its libraries.
    others = {
        name for name in installed.keys() - expected.keys() if not name.startswith(("cuda-", "nvidia-", "triton"))
    }
    assert others == {"torch"}


@pytest.mark.parametrize(
    "path",
    [
        "images/requirements-build.txt",
        "images/storage_initializer/requirements.txt",
        "images/storage_initializer/requirements-prepare.txt",
        "images/predictor/requirements.txt",
        "images/predictor/requirements-ray.txt",
    ],
)
def test_lock_has_arm64_wheels(path: str, tmp_path: Path) -> None:
    (python,) = re.findall(
        r"^ARG BASE=python:(3\.\d+)", (ROOT / "images/predictor/Dockerfile").read_text(), re.MULTILINE
    )
    words: list[str | Path] = [
        "--dry-run",
        "--target",
        tmp_path,
        "--python-platform",
        "aarch64-manylinux_2_36",  # glibc of Debian 12; the base image has this or a newer one
        "--python-version",
        python,
    ]
    # The Dockerfiles compile psutil.
    words += ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-binary", "psutil"]
    uv: list[str | Path] = [Path(sys.executable).parent / "uv", "pip", "install"]
    done = subprocess.run([*uv, *words, "--requirement", ROOT / path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
