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
from tests.images.conftest import PACKAGES, Environment, build_wheel, copy_sources

LIBRARY = "predictor/kernels/cpu/libnative.so"
STALE = b"of another platform"
VERSION = "9.8.7"

pytestmark = pytest.mark.packaging

on_amd64 = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the C code is compiled for Linux on x86_64 only",
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of the wheel with a stale library and, as in an image, no .gitignore that excludes it."""
    folder = copy_sources(tmp_path / "sources")
    (folder / LIBRARY).write_bytes(STALE)
    # As the Dockerfiles do, which have no history.
    monkeypatch.setenv("SETUPTOOLS_SCM_PRETEND_VERSION", VERSION)
    return folder


@on_amd64
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_wheel_with_a_compiler_contains_the_library(
    builder: Environment, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    wheel = build_wheel(builder, sources)
    assert re.fullmatch(rf"kserve_llm-{VERSION}-py3-none-\w*linux\w*_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(LIBRARY).startswith(b"\x7fELF")
        files = [file.relative_to(sources) for name in PACKAGES for file in (sources / name).rglob("*.*")]
        needed = {str(file) for file in files if file.suffix not in (".c", ".h", ".so")}
        assert needed <= set(archive.namelist())
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert b"kserve-llm = kserve_llm.cli:main" in archive.read(entry_points)
        unwanted = (".c", ".h", ".o", "Dockerfile", "requirements.txt")
        assert not [name for name in archive.namelist() if name.endswith(unwanted)]


@on_amd64
def test_wheel_without_a_compiler_is_pure_python(
    builder: Environment, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nonexistent")
    wheel = build_wheel(builder, sources)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".c", ".h", ".o", ".so"))]


def test_wheel_of_the_initializer_builds_without_the_predictor(builder: Environment, sources: Path) -> None:
    for name in ("kserve_llm", "predictor", "preflight"):
        shutil.rmtree(sources / name)
    wheel = build_wheel(builder, sources)
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
