"""What contributors meet first: the development container, owners of code, templates."""

import json
import re
import tomllib

import pytest

from devtools.paths import ROOT

CONTAINER = ROOT / ".devcontainer"
PACKAGES = {
    "buildah": "buildah",
    "cc": "gcc",
    "chromium": "chromium",
    "curl": "curl",
    "debootstrap": "debootstrap",
    "gcc": "gcc",
    "git": "git",
    "kubectl": "kubernetes-client",
    "lua5.1": "lua5.1",
    "openssl": "openssl",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "qemu-x86_64": "qemu-user",
}
"""Debian packages of the programs without which tests are skipped."""
ELSEWHERE = {"bash", "checkov"}
"""Part of every Debian; and of an environment of its own, `make checkov`."""


def test_devcontainer_has_the_program_of_every_optional_test() -> None:
    sources = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    programs = {name for text in sources for name in re.findall(r'which\("([^"]+)"', text)}
    programs |= {"buildah", "debootstrap"}
    dockerfile = re.sub(r"^ *#.*\n", "", (CONTAINER / "Dockerfile").read_text(), flags=re.MULTILINE)
    installed = set(dockerfile.split())
    missing = {name for name in programs - ELSEWHERE if PACKAGES.get(name) not in installed}
    assert not missing, "add its package to PACKAGES and to .devcontainer/Dockerfile"


def test_devcontainer_installs_with_make() -> None:
    container = json.loads((CONTAINER / "devcontainer.json").read_text())
    assert (CONTAINER / container["build"]["dockerfile"]).is_file()
    assert container["postCreateCommand"] == "make install"
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter.removeprefix("${containerWorkspaceFolder}/") == ".venv/bin/python"
    python = re.search(r"^FROM python:(3\.\d+)-", (CONTAINER / "Dockerfile").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python is not None
    assert f"Programming Language :: Python :: {python[1]}" in project["classifiers"]


def test_code_owners_have_existing_paths_and_every_package() -> None:
    lines = [
        line.split() for line in (ROOT / ".github/CODEOWNERS").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    paths = [path for path, *_ in lines]
    assert all(owner.startswith("@OWNER/") for _, *owners in lines for owner in owners)
    assert all(path == "*" or (ROOT / path.strip("/")).exists() for path in paths)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {f"/{package}/" for package in wheel["packages"]} <= set(paths)
    # A change of these changes what is released.
    assert {"/.github/", "/images/", "/SECURITY.md"} <= set(paths)


@pytest.mark.parametrize("name", ["pull_request_template.md", "ISSUE_TEMPLATE/bug.yaml", "ISSUE_TEMPLATE/feature.yaml"])
def test_template_names_existing_targets_and_files(name: str) -> None:
    text = (ROOT / ".github" / name).read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in re.findall(r"`make ([^`]+)`", text):
        assert set(words.split()) <= set(targets)
    for path in re.findall(r"`([\w./-]+(?:\.md|/))`", text):
        assert (ROOT / path).exists(), path


def test_reports_have_a_private_way() -> None:
    assert "security/advisories/new" in (ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text()
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md"):
        assert "in private" in (ROOT / name).read_text()
