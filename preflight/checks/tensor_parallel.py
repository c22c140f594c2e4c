"""Check tensor parallelism: as many ranks as GPUs, heads that they can share, and what does not run on several GPUs."""

import math
from collections.abc import Iterator

from preflight import gpus, quantities
from preflight.checks.resources import Model
from preflight.deployment import Deployment
from preflight.findings import Finding, Problems

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a mount path of the pod
MIN_SHARED_BYTES = 2**30
"""NCCL's buffers for some ranks; a container has 64 MiB without a volume."""


def check(deployment: Deployment, model: Model | None) -> Iterator[Finding]:
    """Yield findings on the number of ranks.

    Args:
        deployment: the rendered overlay.
        model: the model's dimensions; without them, its heads are not checked.
    """
    ranks, count = gpus.ranks(deployment), int(sum(gpus.counts(deployment).values()))
    written = f"{gpus.TENSOR_PARALLEL_SIZE} is {deployment.settings.get(gpus.TENSOR_PARALLEL_SIZE, '1')}"
    if count and ranks < count:
        yield Finding(
            deployment.where,
            f"{count} GPUs are reserved and {written}, so {count - ranks} of them are idle",
            "set it to auto, or request fewer GPUs",
            "kserve-llm",
            "warning",
        )
    if ranks == 1:
        return
    for check_ in (_number(deployment, ranks, count, written), _heads(ranks, model), _unsupported(deployment, ranks)):
        for problem, remedy, source in check_:
            yield Finding(deployment.where, problem, remedy, source)
    for problem, remedy, source in _shared_memory(deployment, ranks):
        yield Finding(deployment.where, problem, remedy, source, "warning")


def _number(deployment: Deployment, ranks: int, count: int, written: str) -> Problems:
    if gpus.slices(deployment):
        yield (
            f"{written}, and the pod has slices of GPUs, of which a process can use one and which have no connection",
            "use one slice, or whole GPUs with component gpu",
            "kserve-llm",
        )
    elif ranks > count > 0:
        yield (
            f"{written}, and the pod has {count} GPU{'s' if count > 1 else ''}, so the predictor does not start",
            f"set it to auto, or request {gpus.GPU}: {ranks}",
            "kserve-llm",
        )
    limit = deployment.server.get("resources", {}).get("limits", {}).get("cpu")
    if not count and limit is not None and ranks > quantities.number(limit):
        yield (
            f"{written} on a CPU, and the limit is {limit} CPUs, so the processes wait for each other",
            "set it to 1: only several NUMA nodes need more",
            "kserve-llm",
        )


def _heads(ranks: int, model: Model | None) -> Problems:
    if model and (model.heads % ranks or model.key_value_heads % ranks):
        most = math.gcd(model.heads, model.key_value_heads)
        divisors = [str(size) for size in range(1, most + 1) if most % size == 0]
        yield (
            f"the model has {model.heads} attention heads and {model.key_value_heads} key-value heads, which {ranks} "
            "ranks cannot share equally, so the predictor does not start",
            f"use {', '.join(divisors)} ranks",
            "kserve-llm",
        )


def _unsupported(deployment: Deployment, ranks: int) -> Problems:
    settings = deployment.settings
    quantization, task = (settings.get(f"PREDICTOR_{name}", "") for name in ("QUANTIZATION", "TASK"))
    device, divided, others = ("a GPU", "fp8", "8bit 4bit") if gpus.counts(deployment) else ("a CPU", "8bit", "4bit")
    falls_back = settings.get("PREDICTOR_QUANTIZATION_FALLBACK", "").lower() in quantities.TRUE_WORDS
    if quantization in others.split() and not falls_back:
        yield (
            f"PREDICTOR_QUANTIZATION is {quantization}, which on {device} is not divided among {ranks} ranks, so the "
            "predictor does not start",
            f"set it to {divided} or none",
            "kserve-llm",
        )
    if task in ("embed", "classify"):
        yield (
            f"PREDICTOR_TASK is {task}, and only models that generate are divided among {ranks} ranks",
            "use one GPU, and more replicas",
            "kserve-llm",
        )


def _shared_memory(deployment: Deployment, ranks: int) -> Problems:
    """Check the volume through which ranks of one node exchange tensors where GPUs have no direct connection."""
    mounts = {mount["mountPath"]: mount["name"] for mount in deployment.server.get("volumeMounts", [])}
    volumes = {volume["name"]: volume for volume in deployment.predictor_pod.spec.get("volumes", [])}
    volume = (volumes.get(mounts.get(SHARED_MEMORY, "")) or {}).get("emptyDir")
    if volume is None or volume.get("medium") != "Memory":
        size = "64 MiB" if volume is None else "on a disk"
    elif quantities.number(volume.get("sizeLimit", MIN_SHARED_BYTES)) < MIN_SHARED_BYTES:
        size = str(volume["sizeLimit"])
    else:
        return
    yield (
        f"{ranks} ranks exchange tensors through {SHARED_MEMORY}, which is {size}",
        "mount an emptyDir with medium Memory and a sizeLimit of 1Gi or more there",
        "kserve-llm",
    )
