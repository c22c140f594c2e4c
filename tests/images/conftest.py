"""Lock files, and virtual environments to install them into."""

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.utils import canonicalize_name

from devtools.paths import ROOT

PACKAGES = ("kserve_llm", "predictor", "preflight", "snapshot_format", "storage_initializer")
"""Packages of the wheel."""
PINNED = re.compile(
    r"^([A-Za-z0-9._-]+)==(\S+)(?: ; (.+?))? \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def locked(path: str) -> dict[str, str]:
    """Versions by name that pip would install here from a lock."""
    pins = PINNED.findall((ROOT / path).read_text())
    return {name: version for name, version, marker, _ in pins if not marker or Marker(marker).evaluate()}


class Environment:
    """An empty virtual environment, filled by the pip of the current one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin/python"
        (self.packages,) = folder.glob("lib/python3.*/site-packages")

    def pip(self, *words: str | Path) -> str:
        """Run pip in the environment and return its output."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *words: str | Path) -> None:
        self.pip("install", "--quiet", "--no-compile", "--only-binary", ":all:", *words)

    def installed(self) -> dict[str, str]:
        """Versions by name."""
        return {
            canonicalize_name(package["name"]): package["version"]
            for package in json.loads(self.pip("list", "--format=json"))
        }


def copy_sources(folder: Path) -> Path:
    """Copy what the wheel is made from, without compiled files, into a new folder."""
    folder.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def build_wheel(builder: Environment, sources: Path) -> Path:
    """Build a wheel as the images do."""
    target = sources.parent / "wheels"
    words: list[str | Path] = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", target]
    builder.pip("wheel", *words, sources)
    (wheel,) = target.iterdir()
    return wheel


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The locked build backend."""
    environment = Environment(tmp_path_factory.mktemp("builder"))
    environment.install("--require-hashes", "--no-deps", "--requirement", ROOT / "images/requirements-build.txt")
    return environment
