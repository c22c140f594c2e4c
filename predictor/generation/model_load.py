"""The steps of loading a model: snapshots, weights, engine and warm-up, and the properties of the result."""

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial

import psutil

from predictor.engine import kv_cache
from predictor.engine.engine import Engine
from predictor.engine.pooling_engine import PoolingEngine
from predictor.errors import RequestError, StartupError
from predictor.generation import pipelines
from predictor.generation.pipelines import GenerationPipeline, PoolingPipeline
from predictor.kernels import tensor_parallel
from predictor.kernels.tensor_parallel import Rank
from predictor.models import loader, placement, snapshot
from predictor.models.loader import LoadedModel, ReportWeights, TimePhase
from predictor.models.snapshot import Snapshot
from predictor.resources import numa, threads
from predictor.settings import Settings

WARM_UP_SECONDS = 600.0

CreatePipeline = Callable[[], tuple[GenerationPipeline | PoolingPipeline, dict[str, str]]]
"""Returns the parts that answer requests, and their properties for the model's metadata."""


def find_snapshots(settings: Settings, report: Callable[[str], None]) -> tuple[Snapshot, Snapshot | None]:
    """Return the model and, if there is one, its adapter; both are waited for within one limit.

    Args:
        settings: references, directory and limit.
        report: called with the state of the wait whenever it is logged.

    Raises:
        StartupError: a snapshot is missing, or a reference is malformed.
    """
    started = time.monotonic()
    adapter = None
    if settings.adapter_reference is not None:
        # First, as in the storage initializer, whose error would otherwise not be seen.
        adapter = snapshot.wait(
            settings.model_dir,
            settings.adapter_reference,
            settings.snapshot_wait_seconds,
            report,
            setting=snapshot.ADAPTER,
        )
    remaining = max(0.0, settings.snapshot_wait_seconds - (time.monotonic() - started))
    model_snapshot = snapshot.wait(settings.model_dir, settings.model_reference, remaining, report)
    return model_snapshot, adapter


def join_ranks(settings: Settings, rank: Rank | None) -> None:
    """Join the group of a tensor-parallel model, if this is one, and set torch's threads and their cores.

    Raises:
        StartupError: the device is not available.
    """
    threads.configure_threads(settings.num_threads, rank.size if rank else 1)
    if rank:
        device = placement.choose_device(settings.device)
        if device.type == "cpu":
            numa.bind(rank.number, rank.size)
        tensor_parallel.join(rank.number, rank.size, rank.address, device=device, listen_fd=rank.listen_fd)


def load_weights(
    settings: Settings,
    model_snapshot: Snapshot,
    adapter: Snapshot | None,
    *,
    time_phase: TimePhase,
    report_weights: ReportWeights,
) -> LoadedModel:
    """Load the weights, with the adapter merged into them, as the settings say; arguments as of `loader.load`.

    Raises:
        StartupError: the weights, the device or a setting with this device cannot be used.
    """
    kv_cache.check_dtype(settings.kv_cache_dtype, placement.choose_device(settings.device))
    return loader.load(
        model_snapshot.directory,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        quantization=settings.quantization,
        skip_modules=settings.skip_modules,
        fallback=settings.quantization_fallback,
        max_model_len=settings.max_model_len,
        adapter_dir=adapter.directory if adapter else None,
        task=settings.task,
        time_phase=time_phase,
        report_weights=report_weights,
    )


def create_engine(loaded: LoadedModel, settings: Settings) -> tuple[Engine | PoolingEngine, CreatePipeline]:
    """Return the engine, not started yet, and what makes the pipeline once it is warmed up."""
    if loaded.pooling is not None:
        pools = PoolingEngine.from_model(loaded.model, loaded.pooling, settings, loaded.context_tokens)
        return pools, partial(pipelines.create_pooling, loaded, loaded.pooling, pools, settings)
    engine = Engine.from_model(
        loaded.model,
        settings,
        eos_token_ids=loaded.eos_token_ids,
        context_tokens=loaded.context_tokens,
    )
    return engine, partial(pipelines.create_generation, loaded, engine, settings)


def warm_up(loaded: LoadedModel, engine: Engine | PoolingEngine) -> None:
    """Compute for the first time, and compare the result with a plain forward pass.

    Raises:
        StartupError: it failed.
    """
    try:
        asyncio.run(engine.warm_up(loaded.vocabulary_tokens, WARM_UP_SECONDS))
    except RequestError as error:
        first = "generation" if loaded.pooling is None else "forward pass"
        raise StartupError(
            f"The first {first} of this {type(loaded.model).__name__} failed: {error}. The log has more. "
            "If memory and device are sound, serve an architecture of docs/architectures.md."
        ) from error


def metadata(model_snapshot: Snapshot, loaded: LoadedModel, context_tokens: int) -> dict[str, str]:
    """Return the properties of a loaded model."""
    return {
        "commit": model_snapshot.commit or "",
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "quantization": loaded.quantization,
        **({"int8_kernels": loaded.int8_kernels} if loaded.int8_kernels else {}),
        "prepared": str(loaded.prequantized).lower(),
        **({"device_map": json.dumps(loaded.device_map)} if loaded.device_map else {}),
        **({"unembedded_tokens": str(len(loaded.unembedded_tokens))} if loaded.unembedded_tokens else {}),
        "context_tokens": str(context_tokens),
        "tensor_parallel_size": str(tensor_parallel.size()),
    }


def adapter_metadata(reference: str | None, adapter: Snapshot | None) -> dict[str, str]:
    """Return the properties of the adapter, if there is one."""
    return {"adapter": reference, "adapter_commit": adapter.commit or ""} if reference and adapter else {}


def process_age_seconds() -> float:
    """Return the time since the start of this process."""
    began = psutil.Process().create_time()
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return time.time() - began
    # Linux reports a process's start in clock ticks after the boot, and the boot time in whole seconds.
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (began - psutil.boot_time())
