"""One predictor process on the demo model for the whole run, and free directories to break."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from devtools import processes
from devtools.processes import ROOT, Predictor

DEMO_MODEL = ROOT / "demo" / "model"


@pytest.fixture(params=["fbgemm", "avx512_vnni", "amx"])
def int8_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select each int8 kernel that this machine supports."""
    from predictor.kernels.cpu import gemm, ops

    name = str(request.param)
    supported = ops.CPU_ISAS[1 : ops.CPU_ISAS.index(ops.cpu_isa) + 1]
    if name != "fbgemm" and name not in supported:
        pytest.skip(f"{name}: not supported here" if ops.LIBRARY.is_file() else f"{ops.LIBRARY} is not compiled")
    monkeypatch.setattr(ops, "cpu_isa", None if name == "fbgemm" else name)
    if not gemm.has_int8():
        pytest.skip("fbgemm: not supported by torch on this CPU")
    return name


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Predictor]:
    log = tmp_path_factory.mktemp("predictor") / "log"
    with log.open("w") as stderr:
        arguments = ["--model_dir", str(DEMO_MODEL), "--dtype", "float32"]
        try:
            with processes.predictor(
                arguments, model_name="demo", port=processes.free_port(), stderr=stderr
            ) as running:
                yield running
        finally:
            print(log.read_text())  # noqa: T201, shown by pytest where a test failed


@pytest.fixture
def client(server: Predictor) -> Iterator[httpx.Client]:
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
