"""Fill the KV cache of an engine and print, as JSON, how many bytes it allocated and the process grew by.

Usage: python -m tests.programs.kv_cache_memory MODEL_DIR BUDGET_BYTES
"""

import asyncio
import json
import random
import sys
from pathlib import Path

import psutil
import torch

from predictor.engine.engine import Engine
from predictor.engine.stream import Stream
from predictor.models import loader
from predictor.resources import memory
from predictor.types import SamplingParams

SAMPLING = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, logprobs=5)
WARM_UP_BYTES = 16 * 2**20


def fill_cache(directory: Path, budget_bytes: int) -> tuple[Engine, int]:
    """Run an engine whose free memory is `budget_bytes`; return it and the bytes of its cache and masks."""

    def available_bytes(device: torch.device) -> int:
        del device
        return budget_bytes

    loaded = loader.load(directory, device="cpu", dtype="float32")
    memory.available_bytes = available_bytes
    engine = Engine.from_model(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=1024,
        max_num_seqs=64,
        max_queued_requests=64,
        max_num_batched_tokens=512,
        kv_cache_memory_fraction=1.0,
    )
    engine.start()
    asyncio.run(_generate(engine))
    processor = engine._executor._manager.batch_processor  # type: ignore[attr-defined]
    masks = processor.inputs_and_outputs.attention_mask or {}
    allocated = processor.cache.cache_tensor.nbytes + sum(mask.nbytes for mask in masks.values())
    engine.stop()
    return engine, allocated


async def _generate(engine: Engine) -> None:
    async def read(stream: Stream) -> None:
        async for _ in stream:
            pass

    rng = random.Random(0)
    prompts = [(rng.choices(range(5, 500), k=600), SAMPLING) for _ in range(12)]
    await asyncio.gather(*map(read, engine.submit(prompts)))


def peak_bytes() -> int:
    """Return the peak of resident memory. Not `ru_maxrss`: that starts with the peak of the parent process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024


def main() -> None:
    """Measure after a warm-up, whose allocations are not those of the cache."""
    directory, budget_bytes = Path(sys.argv[1]), int(sys.argv[2])
    fill_cache(directory, WARM_UP_BYTES)
    before = psutil.Process().memory_info().rss
    engine, allocated = fill_cache(directory, budget_bytes)
    print(json.dumps({"allocated": allocated, "growth": peak_bytes() - before}))  # noqa: T201
    del engine


if __name__ == "__main__":
    main()
