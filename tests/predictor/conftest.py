"""One in-process predictor with the demo model for the whole run, and copies of the model's directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from devtools.paths import DEMO_MODEL

if TYPE_CHECKING:
    from tests.predictor.servers import InProcessServer


@pytest.fixture(params=["fbgemm", "avx512_vnni", "amx"])
def int8_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes int8: each that this machine has, and not only the one that the predictor would take."""
    from predictor.kernels.cpu import gemm, ops

    name = str(request.param)
    by_ours = {None: [], "avx512_vnni": ["avx512_vnni"], "amx": ["avx512_vnni", "amx"]}[ops.level]
    if name != "fbgemm" and name not in by_ours:
        pytest.skip(f"{name}: this CPU has none" if ops.LIBRARY.is_file() else f"{ops.LIBRARY} is not compiled")
    monkeypatch.setattr(ops, "level", None if name == "fbgemm" else name)
    if not gemm.has_int8():
        pytest.skip("fbgemm: torch has none on this CPU")
    return name


@pytest.fixture(scope="session")
def server() -> "Iterator[InProcessServer]":
    from tests.predictor import servers

    with servers.in_process() as running:
        yield running


@pytest.fixture
def client(server: "InProcessServer") -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        yield http


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A private directory with the demo model's files, linked, to take away from and to replace."""
    directory = tmp_path / "weights"
    directory.mkdir()
    for file in DEMO_MODEL.iterdir():
        (directory / file.name).symlink_to(file)
    return directory
