"""The images' locks hold exactly the required packages, at the tested versions, with hashes.

Offline: requirements come from the metadata of the installed packages, which have the same versions. `make lint` runs
this file too.
"""

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from devtools.paths import ROOT
from tests.images.conftest import PINNED, locked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _needs(*extras: str, group: str | None = None) -> list[str]:
    """Requirements from pyproject.toml."""
    project = PROJECT["project"]
    words = [] if group == "build" else list(project["dependencies"])
    for extra in extras:
        words += project["optional-dependencies"][extra]
    if group:
        words += PROJECT["dependency-groups"][group]
    return words


LOCKS = {
    "images/requirements-build.txt": _needs(group="build"),
    "images/storage_initializer/requirements.txt": _needs(),
    "images/storage_initializer/requirements-prepare.txt": _needs("prepare", group="beside-torch"),
    "images/predictor/requirements.txt": _needs("predictor", "tracing", group="beside-torch"),
    "images/predictor/requirements-ray.txt": _needs("predictor", "tracing", "ray", group="beside-torch"),
}


def _constrained() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


def _closure(words: list[str]) -> set[str]:
    """Names of all packages that these requirements install here, without torch and its own requirements."""
    names: set[str] = set()
    visited: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(word), frozenset({""})) for word in words]
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        applies = any(requirement.marker.evaluate({"extra": extra}) for extra in extras) if requirement.marker else True
        key = (name, frozenset(requirement.extras))
        if not applies or name == "torch" or key in visited:
            continue
        visited.add(key)
        names.add(name)
        needs = importlib.metadata.requires(name) or []
        waiting += [(Requirement(need), frozenset({"", *requirement.extras})) for need in needs]
    return names


# The build backend is not installed here, so its requirements are unknown.
@pytest.mark.parametrize("path", sorted(LOCKS.keys() - {"images/requirements-build.txt"}))
def test_lock_holds_exactly_the_required_packages(path: str) -> None:
    assert set(locked(path)) == _closure(LOCKS[path]), "run `make lock`"


@pytest.mark.parametrize("path", LOCKS)
def test_lock_versions_equal_the_constraints(path: str) -> None:
    constrained, pinned = _constrained(), locked(path)
    differing = {name: version for name, version in pinned.items() if constrained.get(name, version) != version}
    assert not differing, "run `make lock`"
    for word in LOCKS[path]:
        requirement = Requirement(word)
        name = canonicalize_name(requirement.name)
        assert name == "torch" or requirement.specifier.contains(pinned[name]), f"{word}: run `make lock`"


@pytest.mark.parametrize("path", LOCKS)
def test_lock_has_hashes_and_no_index(path: str) -> None:
    text = (ROOT / path).read_text()
    entries = re.findall(r"^[A-Za-z0-9]", text, re.MULTILINE)
    assert len(entries) == len(PINNED.findall(text)) > 1
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)


@pytest.mark.parametrize("path", ["images/predictor/Dockerfile", "images/storage_initializer/Dockerfile"])
def test_dockerfile_torch_version_equals_the_constraints(path: str) -> None:
    assert f"ARG TORCH_VERSION={_constrained()['torch']}\n" in (ROOT / path).read_text()
