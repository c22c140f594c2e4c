"""Install wheels without a network, and compare what is installed with constraints.txt; standard library only."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REQUIRED = ("torch", "transformers", "kserve", "fastapi", "uvicorn", "llguidance", "accelerate", "safetensors")
"""Without these the predictor does not start."""
_LIST_VERSIONS = """
import importlib.metadata, json
found = reversed(list(importlib.metadata.distributions()))
print(json.dumps({one.name.lower().replace("_", "-"): one.version for one in found}))
"""
"""Reversed, since the first of two distributions of a name is the one that is imported."""

SOURCES_VERSION = "0.0.0"
"""Version of sources without a history."""


class InstallError(Exception):
    """The wheels cannot be installed; the message is one sentence for the user."""


def install(wheels: Path, site: Path) -> None:
    """Install all wheels below a folder into the directory `site`, replacing those that are there.

    Raises:
        InstallError: there are none, or pip failed.
    """
    files = sorted(map(str, wheels.rglob("*.whl")))
    if not files:
        raise InstallError(f"{wheels} has no wheels. Run `make gpu-wheels` and carry the folder along.")
    site.mkdir(parents=True, exist_ok=True)
    flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--upgrade", "--target", str(site), *files]
    if subprocess.run(command).returncode:
        raise InstallError("pip could not install the wheels; its output has the reason.")


def declare_project(pyproject: Path, site: Path) -> None:
    """Write the project's own package metadata into `site`: it runs from its sources, and reads its version there.

    Tags, which have the version, do not come along with the sources.
    """
    name, version = tomllib.loads(pyproject.read_text())["project"]["name"], SOURCES_VERSION
    directory = site / f"{name.replace('-', '_')}-{version}.dist-info"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def compare_versions(environment: Mapping[str, str], constraints: Path) -> dict[str, Any]:
    """Return `python`, the `installed` version of each pinned package, those that `differ`, and what is `missing`.

    Args:
        environment: of the stages' processes, whose packages are listed.
        constraints: pinned packages, one `name==version` per line.
    """
    pins = {}
    for line in constraints.read_text().splitlines():
        name, equals, version = line.partition("==")
        if equals:
            pins[name.lower().replace("_", "-")] = version
    command = [sys.executable, "-c", _LIST_VERSIONS]
    listed = json.loads(
        subprocess.run(command, env=dict(environment), check=True, capture_output=True, text=True).stdout
    )
    installed = {name: listed[name] for name in sorted(pins.keys() & listed.keys())}
    return {
        "python": sys.version.split()[0],
        "installed": installed,
        # "2.13.0+cu130" is a build of 2.13.0.
        "differ": {name: pins[name] for name, version in installed.items() if version.partition("+")[0] != pins[name]},
        "missing": [name for name in REQUIRED if name not in listed],
    }


def describe(versions: Mapping[str, Any]) -> str:
    """Return the comparison as lines of text."""
    lines = [f"Python {versions['python']}"]
    for name, pinned in versions["differ"].items():
        lines.append(f"{name} is {versions['installed'][name]}, constraints.txt has {pinned}")
    if versions["missing"]:
        lines.append(f"missing: {', '.join(versions['missing'])}")
    return "\n".join(lines)
