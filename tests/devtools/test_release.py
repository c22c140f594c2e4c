"""Releases: the changelog, the order of versions, and a dry run of all steps."""

import datetime
import subprocess
import sys
from pathlib import Path

import pytest

from devtools import release
from devtools.paths import ROOT
from devtools.release import ReleaseError

DATE = datetime.date(2026, 12, 1)
TEXT = """\
# Changelog

## [Unreleased]

### Added

- A thing.

## [0.9.0] - 2026-01-02

### Fixed

- Another one.
"""


def test_cut_changelog_dates_the_unreleased_changes() -> None:
    cut = release.cut(TEXT, "1.0.0", DATE)
    assert cut == TEXT.replace("## [Unreleased]\n", "## [Unreleased]\n\n## [1.0.0] - 2026-12-01\n")
    assert release.notes(cut, "1.0.0") == "### Added\n\n- A thing."
    assert release.notes(cut, "0.9.0") == "### Fixed\n\n- Another one."


def test_cut_changelog_without_changes_is_an_error() -> None:
    with pytest.raises(ReleaseError, match="has no changes below"):
        release.cut(release.cut(TEXT, "1.0.0", DATE), "1.1.0", DATE)
    with pytest.raises(ReleaseError, match=r"has 0\.9\.0 already"):
        release.cut(TEXT, "0.9.0", DATE)
    with pytest.raises(ReleaseError, match=r"Run `make changelog VERSION=2\.0\.0` first"):
        release.notes(TEXT, "2.0.0")


@pytest.mark.parametrize(
    ("version", "is_new"), [("1.2.10", True), ("1.2.9", False), ("1.2.9rc2", False), ("2.0.0", True)]
)
def test_version_must_be_above_all_tags(version: str, is_new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "run", lambda *_: "v1.2.9\nv1.2.9rc1\nv1.2.8\nvarious\n")
    if is_new:
        release.require_new(version)
    else:
        with pytest.raises(ReleaseError, match=r"is not above 1\.2\.9"):
            release.require_new(version)


@pytest.mark.parametrize("version", ["v1.0.0", "1.0", "1.0.0-rc.1", "1.0.0.dev1"])
def test_malformed_version_is_an_error(version: str) -> None:
    with pytest.raises(ReleaseError, match="Expected one as"):
        release.require_new(version)


def test_changelog_of_this_commit_can_be_released() -> None:
    text = (ROOT / release.CHANGELOG).read_text()
    assert "### " in release.notes(release.cut(text, "9999.0.0", DATE), "9999.0.0")


def test_build_into_a_folder_of_another_build_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kserve_llm-0.9.0.tar.gz").touch()
    assert release.main(["build", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} is not empty. Remove it, or choose another folder.\n"


@pytest.mark.packaging
def test_dry_run_builds_installs_and_pins_and_changes_nothing() -> None:
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    command = [sys.executable, "-m", "devtools.release", "dry-run", "9999.0.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tagged v9999.0.0; ")
    assert lines[1].startswith("built kserve_llm-9999.0.0.tar.gz, ")
    assert lines[2].startswith("built kserve_llm-9999.0.0-py3-none-")
    assert lines[3] == "installed: kserve-llm 9999.0.0"
    overlays = len(list((ROOT / "kustomize/overlays").glob("*/kustomization.yaml")))
    assert lines[4] == f"pinned the images in {overlays} rendered overlays"
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert after.stdout == before.stdout
    tags = subprocess.run(["git", "tag", "--list", "v9999*"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tags.stdout == ""
