"""Print how much memory an engine takes whose KV cache is sized for a budget: DIRECTORY BUDGET_BYTES KV_CACHE_DTYPE."""

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from predictor.engine.engine import Engine
from predictor.engine.stream import Stream
from predictor.models import loader
from predictor.resources import memory
from predictor.settings import Settings
from predictor.types import SamplingParams

SAMPLING = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, logprobs=5)


async def fill(engine: Engine) -> None:
    """Generate twelve sequences with long prompts in one batch."""

    async def read(stream: Stream) -> None:
        async for _ in stream:
            pass

    rng = random.Random(0)
    prompts = [(rng.choices(range(5, 500), k=600), SAMPLING) for _ in range(12)]
    await asyncio.gather(*map(read, engine.submit(prompts)))


def run(directory: Path, budget_bytes: int, kv_cache_dtype: Any) -> tuple[Engine, int]:
    """Return an engine after its work, and the bytes of its cache and masks."""
    loaded = loader.load(directory, device="cpu", dtype="float32", trust_remote_code=False)

    def available_bytes(device: torch.device) -> int:
        del device
        return budget_bytes

    memory.available_bytes = available_bytes
    engine = Engine.from_model(
        loaded.model,
        Settings(
            max_num_seqs=64,
            max_queued_requests=64,
            max_num_batched_tokens=512,
            kv_cache_memory_fraction=1.0,
            kv_cache_dtype=kv_cache_dtype,
        ),
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=1024,
    )
    engine.start()
    asyncio.run(fill(engine))
    processor = engine._executor._manager.batch_processor  # type: ignore[attr-defined]
    masks = processor.inputs_and_outputs.attention_mask or {}
    allocated = processor.cache.cache_tensor.nbytes + sum(mask.nbytes for mask in masks.values())
    engine.stop()
    return engine, allocated


def peak_bytes() -> int:
    """Return the peak resident memory; not ru_maxrss, which begins with the peak of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


if __name__ == "__main__":
    directory, budget_bytes, kv_cache_dtype = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    run(directory, 16 * 2**20, kv_cache_dtype)  # torch's own memory of the first steps does not belong to the cache
    before = psutil.Process().memory_info().rss
    engine, allocated = run(directory, budget_bytes, kv_cache_dtype)
    sys.stdout.write(json.dumps({"allocated": allocated, "growth": peak_bytes() - before}))
