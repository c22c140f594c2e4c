"""Free memory, and a predictor under a memory limit."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from devtools import processes
from devtools.processes import ROOT
from predictor.resources import memory

DEMO_MODEL = ROOT / "demo" / "model"
MIB = 2**20


def test_this_machine_grants_something() -> None:
    assert 0 < memory.available_bytes(torch.device("cpu")) < 1 << 60


# A limit that kills


@pytest.fixture
def limited() -> Iterator[Path]:
    """A memory cgroup of 1.2 GiB, version 2 or 1."""
    limit_bytes = 1200 * MIB
    mount = Path("/sys/fs/cgroup")
    for parent, limit in ((mount, "memory.max"), (mount / "memory", "memory.limit_in_bytes")):
        group = parent / f"kserve-llm-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(str(limit_bytes))
                yield group
                return
        finally:
            for _ in range(50):
                with suppress(OSError):
                    group.rmdir()
                    break
                time.sleep(0.1)
    pytest.skip("memory cgroups cannot be made here: that takes root and a writable /sys/fs/cgroup")


@pytest.mark.slow
def test_a_predictor_stays_within_a_limit_that_kills(limited: Path, tmp_path: Path) -> None:
    port = processes.free_port()
    flags = ["--served_model_name", "demo", "--model_dir", str(DEMO_MODEL), "--http_port", str(port)]
    # So many sequences that the limit decides on the cache, and not what is of use.
    flags += ["--dtype", "float32", "--max_num_seqs", "2000", "--max_queued_requests", "2000"]
    command = [
        "bash",
        "-c",
        'echo $$ > "$0/cgroup.procs" && exec "$@"',
        str(limited),
        sys.executable,
        "-m",
        "predictor",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *flags], cwd=ROOT, stderr=log, text=True)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
                deadline = time.monotonic() + 120
                while time.monotonic() < deadline:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    with suppress(httpx.TransportError):
                        if client.get("/v2/health/ready").is_success:
                            break
                    time.sleep(0.1)
                properties = client.get("/v2/models/demo").json()["properties"]
                assert 256 <= int(properties["kv_cache_tokens"]) < 2000 * int(properties["context_tokens"])

                def ask(index: int) -> int:
                    body = {"model": "demo", "prompt": f"{index}" + "1+1=" * 180, "max_tokens": 40, "ignore_eos": True}
                    return client.post("/v1/completions", json=body).status_code

                with ThreadPoolExecutor(48) as threads:
                    assert set(threads.map(ask, range(48))) == {200}
            assert process.poll() is None
        finally:
            assert processes.stop(process) == 0, (tmp_path / "log").read_text()
