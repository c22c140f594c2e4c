"""The images' requirements hold exactly what the programs need, in the versions that the tests run with, by hash.

Offline: what a package needs is asked of the packages installed here, which have the same versions. `make lint` runs
this one too.
"""

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.images.conftest import PINNED, ROOT, locked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _needs(*extras: str, group: str | None = None) -> list[str]:
    """Requirements as pyproject.toml says them."""
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
}


def _constrained() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


def _closure(words: list[str]) -> set[str]:
    """Names of all that these requirements bring along here, without torch and what is only torch's."""
    names: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(word), frozenset({""})) for word in words]
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = any(requirement.marker.evaluate({"extra": extra}) for extra in extras) if requirement.marker else True
        key = (name, frozenset(requirement.extras))
        if not wanted or name == "torch" or key in seen:
            continue
        seen.add(key)
        names.add(name)
        needs = importlib.metadata.requires(name) or []
        waiting += [(Requirement(need), frozenset({"", *requirement.extras})) for need in needs]
    return names


# What builds the wheel is installed only where pip builds one, so there is nothing here to ask.
@pytest.mark.parametrize("path", sorted(LOCKS.keys() - {"images/requirements-build.txt"}))
def test_a_lock_holds_what_is_needed_and_nothing_else(path: str) -> None:
    assert set(locked(path)) == _closure(LOCKS[path]), "run `make lock`"


@pytest.mark.parametrize("path", LOCKS)
def test_a_lock_has_the_versions_that_the_tests_run_with(path: str) -> None:
    constrained, ours = _constrained(), locked(path)
    differing = {name: version for name, version in ours.items() if constrained.get(name, version) != version}
    assert not differing, "run `make lock`"
    for word in LOCKS[path]:
        requirement = Requirement(word)
        name = canonicalize_name(requirement.name)
        assert name == "torch" or requirement.specifier.contains(ours[name]), f"{word}: run `make lock`"


@pytest.mark.parametrize("path", LOCKS)
def test_a_lock_says_a_hash_for_everything_and_no_index(path: str) -> None:
    text = (ROOT / path).read_text()
    entries = re.findall(r"^[A-Za-z0-9]", text, re.MULTILINE)
    assert len(entries) == len(PINNED.findall(text)) > 1
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)


@pytest.mark.parametrize("path", ["images/predictor/Dockerfile", "images/storage_initializer/Dockerfile"])
def test_torch_is_the_version_that_the_tests_run_with(path: str) -> None:
    assert f"ARG TORCH_VERSION={_constrained()['torch']}\n" in (ROOT / path).read_text()
