"""Make a release, and try it: `python -m devtools.release COMMAND`; docs/release.md explains the steps.

Standard library only, since the release workflow runs it without the development environment.
"""

import argparse
import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from devtools.paths import ROOT

CHANGELOG = Path("CHANGELOG.md")
UNRELEASED = "## [Unreleased]"
VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:rc(\d+))?")
TRIAL_DIGESTS = {
    name: f"registry.example/trial/{name.lower().replace('_', '-')}@sha256:{digit * 64}"
    for name, digit in (("PREDICTOR", "a"), ("STORAGE_INITIALIZER", "b"), ("PREDICTOR_RAY", "c"))
}
"""Images that a dry run pins, as the release workflow pins those that it has pushed."""


class ReleaseError(Exception):
    """A release is not possible; the message is a sentence for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m devtools.release", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in (
        ("changelog", "give the unreleased changes a version and today's date in CHANGELOG.md"),
        ("notes", "print the changes of a version"),
        ("dry-run", "make the release of this commit in a temporary clone, and check what it brings"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("version", metavar="VERSION", help="without v, as 1.2.0 or 1.2.0rc1")
    build_parser = commands.add_parser("build", help="build the sdist, and the wheel from it")
    build_parser.add_argument("folder", metavar="DIR", type=Path, help="for both")
    arguments = parser.parse_args(argv)
    try:
        match arguments.command:
            case "changelog":
                require_new(arguments.version)
                CHANGELOG.write_text(cut(CHANGELOG.read_text(), arguments.version, datetime.date.today()))
            case "notes":
                print(notes(CHANGELOG.read_text(), arguments.version))
            case "build":
                build(ROOT, arguments.folder.absolute())
            case "dry-run":
                dry_run(arguments.version)
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def cut(text: str, version: str, date: datetime.date) -> str:
    """Return a changelog in which the unreleased changes are those of a version, below an empty section.

    Raises:
        ReleaseError: there are none, or the version is listed already.
    """
    if f"## [{version}]" in text:
        raise ReleaseError(f"{CHANGELOG} has {version} already.")
    if not _section(text, "Unreleased"):
        raise ReleaseError(f"{CHANGELOG} has no changes below {UNRELEASED}.")
    return text.replace(UNRELEASED, f"{UNRELEASED}\n\n## [{version}] - {date.isoformat()}", 1)


def notes(text: str, version: str) -> str:
    """Return the changes of a version.

    Raises:
        ReleaseError: there are none.
    """
    section = _section(text, version)
    if not section:
        raise ReleaseError(f"{CHANGELOG} has no changes of {version}. Run `make changelog VERSION={version}` first.")
    return section


def _section(text: str, name: str) -> str:
    found = re.search(rf"^## \[{re.escape(name)}\][^\n]*\n(.*?)(?=^## \[|\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def require_new(version: str) -> None:
    """Check that a version is well-formed, and higher than all tags.

    Raises:
        ReleaseError: it is not.
    """
    if not VERSION.fullmatch(version):
        raise ReleaseError(f"{version!r} is not a version. Expected one as 1.2.0 or 1.2.0rc1, without v.")
    tags = run(["git", "tag", "--list", "v*"], ROOT).split()
    released = [tag.removeprefix("v") for tag in tags if VERSION.fullmatch(tag.removeprefix("v"))]
    newest = max(released, key=_order, default="")
    if newest and _order(version) <= _order(newest):
        raise ReleaseError(f"{version} is not above {newest}, the newest tag.")


def _order(version: str) -> tuple[float, ...]:
    found = VERSION.fullmatch(version)
    assert found is not None
    major, minor, patch, candidate = found.groups()
    return int(major), int(minor), int(patch), float(candidate or "inf")


def build(root: Path, folder: Path) -> tuple[Path, Path]:
    """Build the sdist of a checkout and the wheel of this sdist, with the locked build backend; return both.

    Raises:
        ReleaseError: a command failed, or the folder has files of another build.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ReleaseError(f"{folder} is not empty. Remove it, or choose another folder.")
    with tempfile.TemporaryDirectory() as scratch:
        python = make_environment(Path(scratch, "backend"), root / "images/requirements-build.txt")
        run([python, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder], root)
        (sdist,) = folder.glob("*.tar.gz")
        shutil.unpack_archive(sdist, scratch, filter="data")
        sources = Path(scratch, sdist.name.removesuffix(".tar.gz"))
        run([python, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder], sources)
        (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def make_environment(folder: Path, requirements: Path) -> Path:
    """Make a virtual environment with locked packages and return its interpreter.

    Raises:
        ReleaseError: pip failed.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    flags = ["--require-hashes", "--no-deps", "--only-binary", ":all:"]
    pip(python, "install", *flags, "--requirement", requirements)
    return python


def dry_run(version: str) -> None:
    """Make the release of the current commit in a temporary clone, and print what it brings; nothing is kept.

    Raises:
        ReleaseError: a step failed.
    """
    require_new(version)
    if run(["git", "status", "--porcelain", "--untracked-files=no"], ROOT):
        print("Changes that are not committed are left out.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        clone, folder = Path(scratch, "clone"), Path(scratch, "dist")
        run(["git", "clone", "--quiet", ROOT.as_uri(), clone], ROOT)
        changelog = clone / CHANGELOG
        changelog.write_text(cut(changelog.read_text(), version, datetime.date.today()))
        _commit_and_tag(clone, version)
        print(f"tagged v{version}; {len(notes(changelog.read_text(), version).splitlines())} lines of changes")
        sdist, wheel = build(clone, folder)
        for file in (sdist, wheel):
            _require_version(file, version)
            print(f"built {file.name}, {file.stat().st_size} bytes, sha256 {_sha256(file)}")
        print(f"installed: {install(wheel, clone, Path(scratch, 'user'))}")
        print(f"pinned the images in {pin(clone)} rendered overlays")


def _commit_and_tag(clone: Path, version: str) -> None:
    identity = ["-c", "user.name=release", "-c", "user.email=release@example.invalid"]
    message = f"release: {version}"
    run(["git", *identity, "commit", "--quiet", "--all", "--message", message], clone)
    run(["git", *identity, "tag", "--annotate", "--message", message, f"v{version}"], clone)


def _require_version(file: Path, version: str) -> None:
    if not file.name.startswith((f"kserve_llm-{version}-", f"kserve_llm-{version}.tar")):
        raise ReleaseError(f"{file.name} does not have version {version}.")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def install(wheel: Path, root: Path, folder: Path) -> str:
    """Install a wheel next to the locked packages that it needs, and return what its command prints.

    Raises:
        ReleaseError: a package is missing, or the command fails.
    """
    python = make_environment(folder, root / "images/storage_initializer/requirements.txt")
    pip(python, "install", "--no-deps", "--no-index", wheel)
    pip(python, "check")
    run([python, "-m", "storage_initializer", "--help"], folder)
    return run([folder / "bin/kserve-llm", "--version"], folder).strip()


def pip(python: Path, *words: str | Path) -> None:
    """Run this interpreter's pip in the environment of another one.

    Raises:
        ReleaseError: it failed.
    """
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python)]
    run([*command, *words], python.parent)


def pin(root: Path) -> int:
    """Pin the images of a checkout to digests; return the number of rendered overlays, which all have them.

    Raises:
        ReleaseError: kubectl is missing, or an overlay has an image without a digest.
    """
    if shutil.which("kubectl") is None:
        raise ReleaseError("kubectl is missing, which renders the overlays. Install it.")
    run(["make", "pin", *(f"{name}={image}" for name, image in TRIAL_DIGESTS.items())], root)
    rendered = sorted(root.glob("tests/kustomize/golden/*.yaml"))
    for file in rendered:
        for image in re.findall(r"image: (\S+)", file.read_text()):
            if image not in TRIAL_DIGESTS.values():
                raise ReleaseError(f"{image} in {file.name} is not pinned. Add it to IMAGE_NAMES of the Makefile.")
    return len(rendered)


def run(command: Sequence[str | Path], folder: Path) -> str:
    """Run a command and return its output.

    Raises:
        ReleaseError: it failed; the message has its output.
    """
    words = [str(word) for word in command]
    # What the shell of a release sets for images does not reach a build in which the tag decides.
    variables = {name: value for name, value in os.environ.items() if name != "SETUPTOOLS_SCM_PRETEND_VERSION"}
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"`{' '.join(words)}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
