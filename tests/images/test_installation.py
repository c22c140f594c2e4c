"""What a lock installs, really: into an environment that has torch and nothing else, as the Dockerfiles do it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.conftest import ROOT, Environment, locked

# Where torch is CUDA's, gigabytes of it are fetched.
pytestmark = [pytest.mark.packaging, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def torch(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("torch"))
    environment.install(*re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    return environment


def test_the_initializers_lock_wants_for_nothing(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    path = "images/storage_initializer/requirements.txt"
    environment.install("--require-hashes", "--no-deps", "--requirement", ROOT / path)
    assert "No broken requirements" in environment.pip("check")
    assert environment.installed() == locked(path)


@pytest.mark.parametrize(
    "path", ["images/storage_initializer/requirements-prepare.txt", "images/predictor/requirements.txt"]
)
def test_a_lock_wants_for_nothing_beside_torch(path: str, torch: Environment, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    # Hard links: pip replaces files and never writes into one, and torch is half a gigabyte.
    shutil.copytree(torch.packages, environment.packages, copy_function=os.link, dirs_exist_ok=True)
    environment.install("--require-hashes", "--no-deps", "--requirement", ROOT / path)
    assert "No broken requirements" in environment.pip("check")
    installed, wanted = environment.installed(), locked(path)
    assert installed.items() >= wanted.items()
    # Where the index has CUDA's build, its libraries come with torch.
    others = {name for name in installed.keys() - wanted.keys() if not name.startswith(("cuda-", "nvidia-", "triton"))}
    assert others == {"torch"}


@pytest.mark.parametrize(
    "path",
    [
        "images/requirements-build.txt",
        "images/storage_initializer/requirements.txt",
        "images/storage_initializer/requirements-prepare.txt",
        "images/predictor/requirements.txt",
    ],
)
def test_a_lock_has_wheels_for_arm64(path: str, tmp_path: Path) -> None:
    (python,) = re.findall(
        r"^ARG BASE=python:(3\.\d+)", (ROOT / "images/predictor/Dockerfile").read_text(), re.MULTILINE
    )
    words = [
        "--dry-run",
        "--target",
        tmp_path,
        "--python-platform",
        "aarch64-unknown-linux-gnu",
        "--python-version",
        python,
    ]
    # The Dockerfiles bring a compiler for psutil.
    words += ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-binary", "psutil"]
    uv = [Path(sys.executable).parent / "uv", "pip", "install"]
    done = subprocess.run([*uv, *words, "--requirement", ROOT / path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
