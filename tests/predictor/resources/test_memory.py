import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from devtools import processes
from devtools.paths import DEMO_MODEL
from predictor.resources import cgroup, memory

LIMIT_BYTES = 1200 * 2**20
HANG_SECONDS = 300


def test_available_bytes_on_cpu_is_limited() -> None:
    assert 0 < memory.available_bytes(torch.device("cpu")) < cgroup.UNLIMITED_BYTES


def test_is_out_of_memory_on_the_host_and_on_a_device() -> None:
    with pytest.raises(RuntimeError) as host:
        torch.empty(2**60, dtype=torch.int8)
    kernels = RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'")
    libraries = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (host.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), kernels, libraries):
        assert memory.is_out_of_memory(error)
    for error in (RuntimeError("CUDA error: device-side assert triggered"), ValueError()):
        assert not memory.is_out_of_memory(error)


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A memory cgroup of 1.2 GiB, version 2 or 1."""
    mount = Path("/sys/fs/cgroup")
    for parent, limit in ((mount, "memory.max"), (mount / "memory", "memory.limit_in_bytes")):
        group = parent / f"kserve-llm-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(str(LIMIT_BYTES))
                yield group
                return
        finally:
            _remove(group)
    pytest.skip("cannot create memory cgroups: requires root and a writable /sys/fs/cgroup")


def _remove(group: Path) -> None:
    """Remove a cgroup; the kernel needs a moment after its last process ends."""
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.serial
def test_predictor_under_load_stays_within_a_memory_limit(limited_group: Path, tmp_path: Path) -> None:
    port = processes.free_port()
    flags = ["--served_model_name", "demo", "--model_dir", str(DEMO_MODEL), "--http_port", str(port)]
    # Enough sequences for memory to limit the cache.
    flags += ["--dtype", "float32", "--max_num_seqs", "2000", "--max_queued_requests", "2000"]
    log_file = tmp_path / "log"
    with log_file.open("w") as log, httpx.Client(timeout=HANG_SECONDS, trust_env=False) as client:
        process = processes.start(["predictor", *flags], stderr=log)
        (limited_group / "cgroup.procs").write_text(str(process.pid))
        client.base_url = httpx.URL(f"http://127.0.0.1:{port}")

        def complete(index: int) -> int:
            body = {"model": "demo", "prompt": f"{index}" + "1+1=" * 180, "max_tokens": 40, "ignore_eos": True}
            return client.post("/v1/completions", json=body).status_code

        try:
            deadline = time.monotonic() + HANG_SECONDS
            while not _is_ready(client):
                assert process.poll() is None, log_file.read_text()
                assert time.monotonic() < deadline, log_file.read_text()
                time.sleep(0.1)
            properties = client.get("/v2/models/demo").json()["properties"]
            assert 256 <= int(properties["kv_cache_tokens"]) < 2000 * int(properties["context_tokens"])
            with ThreadPoolExecutor(48) as threads:
                assert set(threads.map(complete, range(48))) == {200}
            assert process.poll() is None
        finally:
            assert processes.stop(process) == 0, log_file.read_text()


def _is_ready(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/v2/health/ready").is_success
    return False
