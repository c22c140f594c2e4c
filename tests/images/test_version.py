"""The version comes from tags, also where the history is missing."""

import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.version import Version

from devtools.paths import ROOT
from tests.images.conftest import Environment, copy_sources

VARIABLE = "SETUPTOOLS_SCM_PRETEND_VERSION"
FILES = (".gitattributes", ".git_archival.txt", ".gitignore")
"""What a repository has besides the sources of the wheel."""

pytestmark = pytest.mark.packaging


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, which the version does not need, and no version from outside."""
    monkeypatch.setenv("CC", "/nonexistent")
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this checkout that a package is made from, as a repository with two commits and no tag."""
    folder = copy_sources(tmp_path_factory.mktemp("repository") / "sources")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", ".")
    for message in ("one", "two"):
        git(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return folder


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def clone(repository: Path, target: Path, *flags: str) -> Path:
    subprocess.run(["git", "clone", "--quiet", *flags, repository.as_uri(), target], check=True)
    return target


def version(builder: Environment, folder: Path) -> str:
    """Version that the build backend gives a folder."""
    command: Sequence[str | Path] = [builder.python, "-m", "hatchling", "version"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_version_of_a_tag_and_of_the_commit_after_it(builder: Environment, repository: Path, tmp_path: Path) -> None:
    copy = clone(repository, tmp_path / "copy")
    git(copy, "tag", "v9.8.7")
    assert version(builder, copy) == "9.8.7"
    assert (
        subprocess.run(
            ["make", "--no-print-directory", "--file", ROOT / "Makefile", "version"],
            cwd=copy,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        == "9.8.7\n"
    )
    git(copy, "commit", "--quiet", "--allow-empty", "--message", "three")
    assert re.fullmatch(r"9\.8\.8\.dev1\+g[0-9a-f]{7,}", version(builder, copy))


@pytest.mark.parametrize("flags", [[], ["--depth", "1"]], ids=["whole", "shallow"])
def test_clone_without_tags_is_installed(repository: Path, tmp_path: Path, flags: list[str]) -> None:
    copy = clone(repository, tmp_path / "copy", *flags)
    environment = Environment(tmp_path / "environment")
    # As `make install` does, without the packages that ours needs.
    environment.pip("install", "--no-deps", "--editable", copy)
    installed = Version(environment.installed()["kserve-llm"])
    assert installed.is_devrelease
    revision = git(copy, "rev-parse", "HEAD")
    assert installed.local is not None
    assert revision.startswith(installed.local.removeprefix("g"))


def test_version_of_an_archive_is_that_of_its_tag(builder: Environment, repository: Path, tmp_path: Path) -> None:
    copy = clone(repository, tmp_path / "copy")
    git(copy, "tag", "v9.8.7")
    git(copy, "archive", "--format=tar", "--output", str(tmp_path / "archive.tar"), "v9.8.7")
    with tarfile.open(tmp_path / "archive.tar") as archive:
        archive.extractall(tmp_path / "archive", filter="data")
    assert version(builder, tmp_path / "archive") == "9.8.7"


def test_version_of_an_sdist_is_that_of_its_name(builder: Environment, repository: Path, tmp_path: Path) -> None:
    copy = clone(repository, tmp_path / "copy")
    git(copy, "tag", "v9.8.7")
    command: Sequence[str | Path] = [builder.python, "-m", "hatchling", "build", "--target", "sdist", "--directory"]
    subprocess.run([*command, tmp_path], cwd=copy, check=True)
    shutil.unpack_archive(tmp_path / "kserve_llm-9.8.7.tar.gz", tmp_path, filter="data")
    builder.pip(
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        tmp_path / "kserve_llm-9.8.7",
    )
    assert (tmp_path / "kserve_llm-9.8.7-py3-none-any.whl").is_file()


def test_folder_without_history_needs_the_variable(
    builder: Environment, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(repository, tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))
    command: Sequence[str | Path] = [builder.python, "-m", "hatchling", "version"]
    done = subprocess.run(command, cwd=tmp_path / "copy", check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert VARIABLE in done.stdout + done.stderr
    monkeypatch.setenv(VARIABLE, "1.2.3")
    assert version(builder, tmp_path / "copy") == "1.2.3"
