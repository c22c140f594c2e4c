"""The wheel, built from a copy of the sources by what the images build it with."""

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.images.conftest import ROOT, Environment

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
    """What a wheel is made of, with a library that lies about and, as in an image, no .gitignore to keep it out."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("predictor", "preflight", "storage_initializer"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (folder / LIBRARY).write_bytes(STALE)
    return folder


def _wheel(builder: Environment, sources: Path) -> Path:
    target = sources.parent / "wheels"
    words = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", target]
    builder.pip("wheel", *words, sources)
    (wheel,) = target.iterdir()
    return wheel


@on_amd64
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_a_wheel_has_what_was_compiled_for_this_platform(
    builder: Environment, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    wheel = _wheel(builder, sources)
    assert re.fullmatch(r"kserve_llm-[\d.]+-py3-none-\w*linux\w*_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(LIBRARY).startswith(b"\x7fELF")
        unwanted = (".c", ".h", ".o", "Dockerfile", "requirements.txt")
        assert not [name for name in archive.namelist() if name.endswith(unwanted)]


@on_amd64
def test_a_wheel_without_a_compiler_is_for_every_platform_and_has_nothing_stale(
    builder: Environment, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nonexistent")
    wheel = _wheel(builder, sources)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".c", ".h", ".o", ".so"))]


def test_the_initializers_sources_are_a_wheel_by_themselves(builder: Environment, sources: Path) -> None:
    for name in ("predictor", "preflight"):
        shutil.rmtree(sources / name)
    wheel = _wheel(builder, sources)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "storage_initializer/__main__.py" in archive.namelist()
    assert not (sources / "predictor").exists()


def test_a_source_distribution_has_what_is_compiled_and_nothing_that_was(builder: Environment, sources: Path) -> None:
    shutil.copy(ROOT / ".gitignore", sources)
    command = [builder.python, "-m", "hatchling", "build", "--target", "sdist", "--directory", sources.parent]
    subprocess.run(command, cwd=sources, check=True)
    (archive,) = sources.parent.glob("*.tar.gz")
    shutil.unpack_archive(archive, sources.parent, filter="data")
    (unpacked,) = (path.parent for path in sources.parent.glob("*/PKG-INFO"))
    assert {path.name for path in (unpacked / "predictor").glob("*.[ch]")} == {"avx512.h", "int8.c", "paged.c"}
    assert (unpacked / "hatch_build.py").is_file()
    assert not list(unpacked.rglob("*.so"))
    # Building one leaves what an editable installation has in its place.
    assert (sources / LIBRARY).read_bytes() == STALE
