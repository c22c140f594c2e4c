"""Build the wheel from a copy of the sources, as the images do."""

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from devtools.paths import ROOT
from tests.images.conftest import Environment

LIBRARY = "predictor/kernels/cpu/libnative.so"
STALE = b"of another platform"

pytestmark = pytest.mark.packaging

on_amd64 = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the C code is compiled for Linux on x86_64 only",
)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("builder"))
    environment.install("--require-hashes", "--no-deps", "--requirement", ROOT / "images/requirements-build.txt")
    return environment


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Sources of the wheel with a stale library and, as in an image, no .gitignore that excludes it."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("kserve_llm", "predictor", "preflight", "snapshot_format", "storage_initializer"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (folder / LIBRARY).write_bytes(STALE)
    return folder


def _wheel(builder: Environment, sources: Path) -> Path:
    target = sources.parent / "wheels"
    words: list[str | Path] = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", target]
    builder.pip("wheel", *words, sources)
    (wheel,) = target.iterdir()
    return wheel


@on_amd64
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_wheel_with_a_compiler_contains_the_library(
    builder: Environment, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    wheel = _wheel(builder, sources)
    assert re.fullmatch(r"kserve_llm-[\d.]+-py3-none-\w*linux\w*_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(LIBRARY).startswith(b"\x7fELF")
        page = {str(file.relative_to(ROOT)) for file in (ROOT / "predictor/entrypoints/http/playground").iterdir()}
        assert page <= set(archive.namelist())
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert b"kserve-llm = kserve_llm.cli:main" in archive.read(entry_points)
        assert "kserve_llm/local_server.py" in archive.namelist()
        unwanted = (".c", ".h", ".o", "Dockerfile", "requirements.txt")
        assert not [name for name in archive.namelist() if name.endswith(unwanted)]


@on_amd64
def test_wheel_without_a_compiler_is_pure_python(
    builder: Environment, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nonexistent")
    wheel = _wheel(builder, sources)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".c", ".h", ".o", ".so"))]


def test_wheel_of_the_initializer_builds_without_the_predictor(builder: Environment, sources: Path) -> None:
    for name in ("kserve_llm", "predictor", "preflight"):
        shutil.rmtree(sources / name)
    wheel = _wheel(builder, sources)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "storage_initializer/__main__.py" in archive.namelist()
    assert not (sources / "predictor").exists()


def test_sdist_contains_c_sources_and_no_binaries(builder: Environment, sources: Path) -> None:
    shutil.copy(ROOT / ".gitignore", sources)
    command: list[str | Path] = [
        builder.python,
        "-m",
        "hatchling",
        "build",
        "--target",
        "sdist",
        "--directory",
        sources.parent,
    ]
    subprocess.run(command, cwd=sources, check=True)
    (archive,) = sources.parent.glob("*.tar.gz")
    shutil.unpack_archive(archive, sources.parent, filter="data")
    (unpacked,) = (path.parent for path in sources.parent.glob("*/PKG-INFO"))
    sources_in = {path.name for path in (unpacked / "predictor/kernels/csrc").glob("*.[ch]")}
    assert sources_in == {path.name for path in (ROOT / "predictor/kernels/csrc").glob("*.[ch]")} != set()
    assert (unpacked / "hatch_build.py").is_file()
    assert not list(unpacked.rglob("*.so"))
    # Building a source distribution leaves an editable installation's library in place.
    assert (sources / LIBRARY).read_bytes() == STALE
