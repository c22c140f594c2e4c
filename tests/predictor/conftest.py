"""One in-process predictor and tokenizer of the demo model for the whole run, and copies of the model's directory."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from devtools.paths import DEMO_MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.predictor.servers import InProcessServer

BASE_URL = os.environ.get("BASE_URL")
"""A running predictor of the demo model in float32, named `demo`, for which to run the protocols' tests."""


@pytest.fixture(scope="session")
def emulated_amx_library(shared_folder: Path) -> Any:
    """The C kernels with AMX instructions emulated, as `ops` loads them."""
    from tests.predictor.kernels import native_library

    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    return native_library.load_with_emulated_amx(shared_folder)


@pytest.fixture(params=["fbgemm", "avx512_vnni", "amx"])
def int8_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select each int8 kernel: those that this machine supports, and AMX on any with AVX-512 VNNI."""
    from predictor.kernels.cpu import gemm, ops

    name = str(request.param)
    if name != "fbgemm" and ops.cpu_isa is None:
        pytest.skip(f"{name}: not supported here" if ops.LIBRARY.is_file() else f"{ops.LIBRARY} is not compiled")
    if name == "amx" and ops.cpu_isa != "amx":
        monkeypatch.setattr(ops, "library", request.getfixturevalue("emulated_amx_library"))
    monkeypatch.setattr(ops, "cpu_isa", None if name == "fbgemm" else name)
    if not gemm.has_int8():
        pytest.skip("fbgemm: not supported by torch on this CPU")
    return name


@pytest.fixture(params=["onednn", "avx512", "avx512_bf16", "amx"])
def bf16_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select each bfloat16 kernel: those that this machine supports, and AMX on any with AVX-512."""
    import torch

    from predictor.kernels.cpu import ops, torch_private

    name = str(request.param)
    if name == "onednn":
        if not torch_private.supports_onednn_bf16():
            pytest.skip("oneDNN has no bfloat16 kernels on this CPU")
    elif ops.bf16_isa is None or (name == "avx512_bf16" and not torch.cpu.get_capabilities()["avx512_bf16"]):
        pytest.skip(f"{name}: not supported here" if ops.LIBRARY.is_file() else f"{ops.LIBRARY} is not compiled")
    elif name == "amx" and ops.bf16_isa != "amx":
        monkeypatch.setattr(ops, "library", request.getfixturevalue("emulated_amx_library"))
    monkeypatch.setattr(ops, "bf16_isa", None if name == "onednn" else name)
    return name


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerBase":
    """The demo model's tokenizer; a test that changes one loads its own."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO_MODEL)
    return tokenizer


@pytest.fixture(scope="session")
def server() -> "Iterator[InProcessServer]":
    """The demo model; shared by several ranks where `test_ranks.py` runs other tests."""
    from tests.predictor import servers

    with servers.in_process("--tensor_parallel_size", os.environ.get("TEST_TENSOR_PARALLEL_SIZE", "1")) as running:
        yield running


@pytest.fixture
def server_url(request: pytest.FixtureRequest) -> str:
    """URL of the server, or of the running predictor at BASE_URL."""
    return BASE_URL or str(request.getfixturevalue("server").url)


@pytest.fixture
def client(server_url: str) -> Iterator[httpx.Client]:
    from tests.predictor.servers import HANG_SECONDS

    with httpx.Client(base_url=server_url, timeout=HANG_SECONDS, trust_env=False) as http:
        yield http


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With BASE_URL, keep the tests that need nothing but its URL."""
    if BASE_URL:
        needs = [(item, set(getattr(item, "fixturenames", ()))) for item in items]
        items[:] = [item for item, names in needs if "server_url" in names and not names & {"server", "caplog"}]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A private directory with the demo model's files, linked, to take away from and to replace."""
    directory = tmp_path / "weights"
    directory.mkdir()
    for file in DEMO_MODEL.iterdir():
        (directory / file.name).symlink_to(file)
    return directory
