"""What fits into memory, and whether the KV cache keeps to it, in real memory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from devtools import processes
from devtools.processes import ROOT
from predictor.engine import kv_cache
from predictor.models import loader
from predictor.resources import memory

DEMO_MODEL = ROOT / "demo" / "model"
MIB = 2**20


# What fits


def test_this_machine_grants_something() -> None:
    assert 0 < memory.available_bytes(torch.device("cpu")) < 1 << 60


@pytest.fixture(scope="module")
def model() -> Any:
    return loader.load(DEMO_MODEL, device="cpu", dtype="float32", trust_remote_code=False).model


def tokens(model: Any, budget_bytes: int, max_num_batched_tokens: int = 512, max_num_seqs: int = 32) -> int:
    return kv_cache.tokens_within(
        model, budget_bytes=budget_bytes, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs
    )


def test_a_larger_budget_holds_more_tokens(model: Any) -> None:
    fitting = [tokens(model, budget) for budget in range(16 * MIB, 512 * MIB, 16 * MIB)]
    assert fitting == sorted(set(fitting))
    assert fitting[0] > 0


def test_what_the_steps_need_is_left_out(model: Any) -> None:
    assert tokens(model, 0) < 0
    assert tokens(model, 256 * MIB, max_num_batched_tokens=2048) < tokens(model, 256 * MIB)
    assert tokens(model, 256 * MIB, max_num_seqs=2000) < tokens(model, 256 * MIB)


def test_masks_of_one_sequence_at_a_time_leave_room_for_more(model: Any) -> None:
    def fitting(context_tokens: int | None) -> int:
        return kv_cache.tokens_within(
            model, budget_bytes=64 * MIB, max_num_batched_tokens=512, max_num_seqs=32, context_tokens=context_tokens
        )

    dense, short, long = fitting(None), fitting(1024), fitting(4096)
    assert dense < long < short
    assert fitting(1 << 20) == fitting(1 << 21), "where not one context fits, its length does not matter"


HONEST = """
import asyncio, json, pathlib, random, sys
import psutil
from predictor.models import loader
from predictor.resources import memory
from predictor.engine.engine import Engine
from predictor.types import SamplingParams

directory, budget = pathlib.Path(sys.argv[1]), int(sys.argv[2])
sampling = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, logprobs=5)

def used(budget):
    loaded = loader.load(directory, device="cpu", dtype="float32", trust_remote_code=False)
    memory.available_bytes = lambda _: budget
    engine = Engine.from_model(loaded.model, eos_token_ids=loaded.eos_token_ids, context_tokens=1024, max_num_seqs=64,
        max_queued_requests=64, max_num_batched_tokens=512, kv_cache_memory_fraction=1.0)
    engine.start()

    async def fill():
        rng = random.Random(0)
        prompts = [(rng.choices(range(5, 500), k=600), sampling) for _ in range(12)]
        async def read(stream):
            async for _ in stream:
                pass
        await asyncio.gather(*map(read, engine.submit(prompts)))

    asyncio.run(fill())
    processor = engine._executor._manager.batch_processor
    masks = processor.inputs_and_outputs.attention_mask
    allocated = processor.cache.cache_tensor.nbytes + sum(mask.nbytes for mask in (masks or {}).values())
    engine.stop()
    return engine, allocated

used(16 * 2**20)  # what torch itself takes at its first steps is not the cache's
before = psutil.Process().memory_info().rss
engine, allocated = used(budget)
# Not ru_maxrss: that begins with the peak of the process that started this one.
status = pathlib.Path("/proc/self/status").read_text()
peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
print(json.dumps({"allocated": allocated, "growth": peak - before}))
"""


def test_the_estimate_is_honest() -> None:
    budget = 48 * MIB
    command = [sys.executable, "-c", HONEST, str(DEMO_MODEL), str(budget)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    used = json.loads(ended.stdout)
    assert budget / 2 < used["allocated"] <= budget, "neither more than allowed, nor much less"
    assert used["growth"] <= budget + 32 * MIB, "weights that are loaded again, and what torch keeps, included"


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
