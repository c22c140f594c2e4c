"""Check resources: requests and limits, GPUs, memory of weights and KV cache."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preflight import gpus, quantities, ray
from preflight.deployment import Deployment, Manifest
from preflight.findings import CheckError, Finding, Problems

NODE_CONDITIONS = "node.kubernetes.io/"
"""Prefix of the taints that Kubernetes sets on nodes that are not ready, and that it lets pods tolerate for minutes."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "fp8": 1.0, "4bit": 0.5625}
"""Of a weight. In 4 bits with a scale of 16 bits for 32 weights, or of 32 bits for 64."""
MAX_CORES = 500
MIN_BYTES = 2**20
"""Limits of plausible quantities: beyond them, a unit is missing."""
PROCESS_BYTES = 1.0 * 2**30
"""Python, PyTorch and their buffers."""
AUTOSCALER: Manifest = {"resources": {"limits": {"cpu": "500m", "memory": "512Mi"}}}
"""The container that KubeRay adds to the head for its autoscaler, by default."""
SCALE_GROUP = 32
"""Numbers of an int8 KV cache that share a scale of two bytes; the predictor has the same constant."""
TOKENS_PER_SEQUENCE = 2048
"""KV cache tokens per sequence if its size is not set; the predictor sizes its cache by the same number."""


@dataclass(frozen=True, slots=True)
class Model:
    """Dimensions of a decoder with gated MLPs, such as Llama or Qwen, from its config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    vocabulary: int
    tied: bool
    dtype: str
    positions: int | None = None
    """The longest context; None if the configuration has no such number."""

    @property
    def linear_parameters(self) -> int:
        """Number of parameters that are quantized."""
        attention = self.hidden * self.head * 2 * (self.heads + self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def other_parameters(self) -> int:
        """Number of parameters of embeddings, which are not quantized."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def weight_bytes(self, quantization: str, dtype: str) -> float:
        """Return the bytes of the weights."""
        full = BYTES.get(self.dtype if dtype == "auto" else dtype, 2.0)
        return self.linear_parameters * BYTES.get(quantization, full) + self.other_parameters * full

    def cache_bytes(self, tokens: int, kv_cache_dtype: str = "auto") -> float:
        """Return the bytes of the KV cache: keys and values in two bytes each, or in int8 with scales of groups."""
        head = self.head + 2 * math.ceil(self.head / SCALE_GROUP) if kv_cache_dtype == "int8" else 2 * self.head
        return 2.0 * self.layers * self.key_value_heads * head * tokens


def read(path: Path) -> Model:
    """Read the dimensions of a config.json.

    Raises:
        CheckError: the file does not exist or has no such dimension.
    """
    try:
        config = json.loads(path.read_text())
        return Model(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            key_value_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
            head=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", True),
            dtype=config.get("torch_dtype") or config.get("dtype") or "bfloat16",
            positions=config.get("max_position_embeddings"),
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckError(f"{path} is not a config.json of a decoder: {error!r}. Use that of the model.") from None


def requests(container: Manifest) -> dict[str, float]:
    """Return what a container requests, in cores, bytes and devices; a limit without a request is the request."""
    resources = container.get("resources", {})
    quantities_ = (resources.get("limits") or {}) | (resources.get("requests") or {})
    return {name: quantities.number(quantity) for name, quantity in quantities_.items()}


def rollout_replicas(deployment: Deployment) -> tuple[int, int | None]:
    """Return the replicas during a rollout: with one old replica, and with `maxReplicas`; None without a maximum.

    Knative runs the old and the new revision together, each with up to `maxReplicas`.
    """
    replicas = deployment.predictor.get("maxReplicas", 0)
    if deployment.is_knative:
        return 2, 2 * replicas or None
    replicas = max(1, replicas, deployment.predictor.get("minReplicas", 1))
    return 1 + _surge(deployment, 1), replicas + _surge(deployment, replicas)


def _surge(deployment: Deployment, replicas: int) -> int:
    """Return the additional pods of a Deployment during a rollout, by default a quarter, rounded up."""
    strategy = deployment.predictor.get("deploymentStrategy") or {}
    if strategy.get("type") == "Recreate":
        return 0
    surge = str((strategy.get("rollingUpdate") or {}).get("maxSurge", "25%"))
    return math.ceil(replicas * int(surge[:-1]) / 100) if surge.endswith("%") else int(surge)


def rollout_sum(deployment: Deployment) -> list[str]:
    """Return what the service's pods request together during a rollout with `maxReplicas`; empty without a limit."""
    if deployment.is_ray:
        # KubeRay runs the old and the new cluster together.
        pods = [(deployment.ray_pods[0], 1), *((group.pod, group.max_replicas) for group in ray.groups(deployment))]
        counts = [(container, 2 * count) for pod, count in pods for container in pod.containers]
        config = deployment.service["spec"]["rayClusterConfig"]
        if config.get("enableInTreeAutoscaling"):
            counts.append((AUTOSCALER | (config.get("autoscalerOptions") or {}), 2))
    else:
        _, replicas = rollout_replicas(deployment)
        if replicas is None:
            return []
        counts = [(deployment.server, replicas)]
    needed: defaultdict[str, float] = defaultdict(float)
    for container, count in counts:
        for name, amount in requests(container).items():
            needed[name] += amount * count
    devices = [f"{count:g} {name}" for name, count in sorted(needed.items()) if _is_extended(name)]
    return [*devices, f"{needed['cpu']:g} cpu", f"{quantities.gib(needed['memory'])} of memory"]


def check(deployment: Deployment, model: Model | None) -> Iterator[Finding]:
    """Yield findings on requests and limits, GPUs and, with a model, memory."""
    yield from _resources(deployment)
    yield from _gpu(deployment)
    if model is not None:
        yield from _memory(deployment, model)


def _resources(deployment: Deployment) -> Iterator[Finding]:
    for pod in deployment.pods:
        for container in pod.containers:
            resources = container.get("resources", {})
            for problem, remedy, source in _container(resources.get("requests") or {}, resources.get("limits") or {}):
                yield Finding(pod.where, f"container {container['name']} {problem}", remedy, source)
    for pod, container in deployment.downloads:
        for name in sorted(name for name in requests(container) if name.startswith("nvidia.com/")):
            yield Finding(
                pod.where,
                f"container {container['name']} requests {name}, which the storage initializer does not use",
                "remove it",
                "kserve-llm",
                "warning",
            )


def _container(requests: Manifest, limits: Manifest) -> Problems:
    for name in ("cpu", "memory"):
        if name not in limits:
            yield f"has no request or no limit of {name}", f"set {name} in requests and limits", "kserve-llm"
    yield from _units(requests, limits)
    for name in sorted({*requests, *limits}):
        # A limit without a request is valid: Kubernetes copies it to the request.
        limit = limits.get(name)
        request = requests.get(name, limit)
        if _is_extended(name):
            yield from _extended(name, request, limit)
        elif limit is not None and quantities.number(request) > quantities.number(limit):
            yield (
                f"requests {name} {request}, more than its limit {limit}",
                "raise the limit or lower the request",
                "API server",
            )


def _units(requests: Manifest, limits: Manifest) -> Problems:
    """Check quantities whose unit is missing or wrong, which Kubernetes accepts."""
    for kind, given in (("requests", requests), ("limits", limits)):
        cpu, memory = given.get("cpu", 0), given.get("memory")
        if quantities.number(cpu) >= MAX_CORES:
            yield f"{kind} {quantities.number(cpu):g} cores", f"add the unit, as in cpu: {cpu}m", "kserve-llm"
        if memory is not None and quantities.number(memory) < MIN_BYTES:
            yield (
                f"{kind} {quantities.number(memory):g} bytes of memory",
                f"correct the unit, as in memory: {str(memory).rstrip('m')}Gi",
                "kserve-llm",
            )


def _is_extended(name: str) -> bool:
    """Return whether a resource is a device plugin's, such as a GPU, and not Kubernetes' own."""
    domain, slash, _ = name.partition("/")
    return bool(slash) and domain != "kubernetes.io" and not domain.endswith(".kubernetes.io")


def _extended(name: str, request: object, limit: object) -> Problems:
    """Check a resource that pods cannot share: its count is whole, and its request is its limit."""
    for count in dict.fromkeys((request, limit)):
        if count is not None and quantities.number(count) % 1:
            yield (
                f"has {name} {count}, and Kubernetes allocates whole devices only",
                f"use a whole number{', or a MIG slice with component gpu-mig' if name == gpus.GPU else ''}",
                "API server",
            )
    if limit is None:
        yield (
            f"requests {name} {request} without a limit, which Kubernetes rejects",
            "set the limit; remove the request",
            "API server",
        )
    elif quantities.number(request) != quantities.number(limit):
        yield (
            f"requests {name} {request}, which differs from its limit {limit} and which Kubernetes rejects",
            "make them equal, or remove the request",
            "API server",
        )


def _gpu(deployment: Deployment) -> Iterator[Finding]:
    """Check that a pod with GPUs tolerates a taint. Only the cluster has the keys of taints: see cluster/checks.py."""
    keys = [toleration.get("key") or "" for toleration in deployment.predictor_pod.spec.get("tolerations") or []]
    if gpus.counts(deployment) and all(key.startswith(NODE_CONDITIONS) for key in keys):
        yield Finding(
            deployment.where,
            f"a GPU is requested and no taint is tolerated, so GPU nodes with their usual taint {gpus.GPU} reject it",
            "add component gpu, or tolerate the taint of your GPU nodes",
            "scheduler",
            "warning",
        )


def _memory(deployment: Deployment, model: Model) -> Iterator[Finding]:
    settings, ranks = deployment.settings, gpus.ranks(deployment)
    quantization, dtype = settings.get("PREDICTOR_QUANTIZATION", "none"), settings.get("PREDICTOR_DTYPE", "auto")
    weights, processes = model.weight_bytes(quantization, dtype), ranks * PROCESS_BYTES
    memory = quantities.number(deployment.server.get("resources", {}).get("limits", {}).get("memory", 0))
    length = int(settings.get("PREDICTOR_MAX_MODEL_LEN", TOKENS_PER_SEQUENCE))
    if gpus.counts(deployment):
        cache = model.cache_bytes(int(settings.get("PREDICTOR_KV_CACHE_TOKENS", length)))
        yield from _gpu_memory(deployment, weights / ranks, cache / ranks)
        yield from _host_memory(deployment, model.weight_bytes("none", "auto"), processes, memory)
        return
    useful = int(settings.get("PREDICTOR_MAX_NUM_SEQS", 1)) * min(TOKENS_PER_SEQUENCE, length)
    tokens = int(settings.get("PREDICTOR_KV_CACHE_TOKENS", useful))
    cache = model.cache_bytes(tokens, settings.get("PREDICTOR_KV_CACHE_DTYPE", "auto"))
    needed = weights + cache + processes
    if needed > memory:
        yield Finding(
            deployment.where,
            f"the model needs {quantities.gib(needed)} (weights {quantities.gib(weights)}, KV cache "
            f"{quantities.gib(cache)}), and the memory limit is {quantities.gib(memory)}",
            "raise the limit, quantize (also by PREDICTOR_KV_CACHE_DTYPE=int8), or lower PREDICTOR_MAX_NUM_SEQS",
            "kserve-llm",
        )


def _gpu_memory(deployment: Deployment, weights: float, cache: float) -> Iterator[Finding]:
    """Check one rank's part of the weights and of one sequence against a GPU, whose memory may be unknown."""
    needed, memory = weights + cache + PROCESS_BYTES, gpus.memory_bytes(deployment)
    if memory is not None and needed > memory:
        yield Finding(
            deployment.where,
            f"each GPU needs {quantities.gib(needed)} (weights {quantities.gib(weights)}, KV cache of one sequence "
            f"{quantities.gib(cache)}), and has {quantities.gib(memory)}",
            "use larger GPUs, more of them with PREDICTOR_TENSOR_PARALLEL_SIZE=auto, or quantize",
            "kserve-llm",
        )


def _host_memory(deployment: Deployment, stored: float, processes: float, memory: float) -> Iterator[Finding]:
    """Check that the page cache can hold the checkpoint while it is loaded, next to what counts as memory too."""
    volumes = [volume.get("emptyDir") or {} for volume in deployment.predictor_pod.spec.get("volumes", [])]
    shared = sum(
        quantities.number(volume.get("sizeLimit", 0)) for volume in volumes if volume.get("medium") == "Memory"
    )
    if stored + processes + shared > memory:
        yield Finding(
            deployment.where,
            f"loading needs {quantities.gib(stored + processes + shared)} of host memory (checkpoint "
            f"{quantities.gib(stored)}, processes {quantities.gib(processes)}, volumes in memory "
            f"{quantities.gib(shared)}), and the memory limit is {quantities.gib(memory)}",
            "raise the limit, so that each page of the checkpoint is read once",
            "kserve-llm",
            "warning",
        )
