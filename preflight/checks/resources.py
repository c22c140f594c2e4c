"""Check resources: requests and limits, GPUs, the volume's access mode, memory of weights and KV cache."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preflight import quantities
from preflight.deployment import Deployment, Manifest, Pod
from preflight.findings import CheckError, Finding, Problems

GPU = "nvidia.com/gpu"
NODE_CONDITIONS = "node.kubernetes.io/"
"""Prefix of the taints that Kubernetes sets on nodes that are not ready, and that it lets pods tolerate for minutes."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5}
PROCESS_BYTES = 1.0 * 2**30
"""Python, PyTorch and their buffers."""
TOKENS_PER_SEQUENCE = 2048
"""KV cache tokens per sequence if its size is not set; the predictor sizes its cache by the same number."""
_MIG = re.compile(r"nvidia\.com/mig-\d+g\.(\d+)gb")


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

    def cache_bytes(self, tokens: int) -> float:
        """Return the bytes of the KV cache: keys and values in two bytes each."""
        return 2.0 * 2 * self.layers * self.key_value_heads * self.head * tokens


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
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckError(f"{path} is not a config.json of a decoder: {error!r}. Use that of the model.") from None


def gpus(deployment: Deployment) -> dict[str, float]:
    """Return resource names and counts of the predictor's NVIDIA GPUs, whole or MIG slices."""
    limits = deployment.server.get("resources", {}).get("limits", {})
    counts = {name: quantities.number(count) for name, count in limits.items() if name.startswith("nvidia.com/")}
    return {name: count for name, count in counts.items() if count}


def check(deployment: Deployment, model: Model | None) -> Iterator[Finding]:
    """Yield findings on requests and limits, GPUs, access modes and, with a model, memory."""
    yield from _resources(deployment)
    yield from _gpu(deployment)
    yield from _claim(deployment)
    if model is not None:
        yield from _memory(deployment, model)


def _resources(deployment: Deployment) -> Iterator[Finding]:
    for pod in deployment.pods:
        for container in pod.containers:
            resources = container.get("resources", {})
            for problem, remedy, source in _container(resources.get("requests") or {}, resources.get("limits") or {}):
                yield Finding(pod.where, f"container {container['name']} {problem}", remedy, source)


def _container(requests: Manifest, limits: Manifest) -> Problems:
    for name in ("cpu", "memory"):
        if name not in requests or name not in limits:
            yield f"has no request or no limit of {name}", f"set {name} in requests and limits", "kserve-llm"
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
                f"use a whole number{', or a MIG slice with component gpu-mig' if name == GPU else ''}",
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
    if gpus(deployment) and all(key.startswith(NODE_CONDITIONS) for key in keys):
        yield Finding(
            deployment.where,
            f"a GPU is requested and no taint is tolerated, so GPU nodes with the usual taint {GPU} reject the pod",
            "add component gpu, or tolerate the taint of your GPU nodes",
            "scheduler",
            "warning",
        )


def _claim(deployment: Deployment) -> Iterator[Finding]:
    replicas = deployment.predictor.get("maxReplicas", 0)
    for name in sorted(filter(None, {deployment.claim, *deployment.predictor_pod.claims})):
        modes = _access_modes(deployment, name)
        if modes and not {"ReadWriteMany", "ReadOnlyMany"} & modes and replicas != 1:
            yield Finding(
                f"PersistentVolumeClaim/{name}",
                f"it is {' and '.join(sorted(modes))}, which one node can mount, and maxReplicas is "
                f"{replicas or 'unlimited'}",
                "use ReadWriteMany, or component local-storage with one replica",
                "kubelet",
            )
    for pod in deployment.pods:
        yield from _writable_claims(deployment, pod)


def _writable_claims(deployment: Deployment, pod: Pod) -> Iterator[Finding]:
    """Check that a claim can be written by the containers that mount it writable, and by the download in any case."""
    downloads = [container["name"] for _, container in deployment.downloads]
    sources = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod.spec.get("volumes", [])}
    for container in pod.containers:
        for mount in container.get("volumeMounts", []):
            claim = sources.get(mount["name"])
            if claim is None:
                continue
            read_only = mount.get("readOnly") or claim.get("readOnly")
            if read_only and container["name"] in downloads:
                yield Finding(
                    pod.where,
                    f"container {container['name']} mounts claim {claim['claimName']} read-only and downloads to it",
                    "remove readOnly",
                    "kserve-llm",
                )
            if not read_only and _access_modes(deployment, claim["claimName"]) == {"ReadOnlyMany"}:
                yield Finding(
                    f"PersistentVolumeClaim/{claim['claimName']}",
                    f"it is ReadOnlyMany, and {pod.where} writes to it",
                    "use ReadWriteMany",
                    "kubelet",
                )


def _access_modes(deployment: Deployment, claim: str) -> set[str]:
    """Return the access modes of a claim; none if the overlay does not have it."""
    manifest = deployment.find("PersistentVolumeClaim", claim) or {}
    return set(manifest.get("spec", {}).get("accessModes", []))


def _memory(deployment: Deployment, model: Model) -> Iterator[Finding]:
    settings, limits = deployment.settings, deployment.server.get("resources", {}).get("limits", {})
    quantization, dtype = settings.get("PREDICTOR_QUANTIZATION", "none"), settings.get("PREDICTOR_DTYPE", "auto")
    weights = model.weight_bytes(quantization, dtype)
    stored = model.weight_bytes("none", "auto")
    memory = quantities.number(limits.get("memory", 0))
    slices = [int(match[1]) * 1e9 for name in gpus(deployment) if (match := _MIG.fullmatch(name))]
    if gpus(deployment):
        if slices and weights + PROCESS_BYTES > slices[0]:
            yield Finding(
                deployment.where,
                f"the weights need {quantities.gib(weights)}, and the GPU slice has {quantities.gib(slices[0])}",
                "request a larger slice, or quantize",
                "kserve-llm",
            )
        if stored > memory:
            yield Finding(
                deployment.where,
                f"the checkpoint's {quantities.gib(stored)} are loaded through {quantities.gib(memory)} of host memory",
                "raise the memory limit above the checkpoint's size to read each page once",
                "kserve-llm",
                "warning",
            )
        return
    per_sequence = min(TOKENS_PER_SEQUENCE, int(settings.get("PREDICTOR_MAX_MODEL_LEN", TOKENS_PER_SEQUENCE)))
    useful = int(settings.get("PREDICTOR_MAX_NUM_SEQS", 1)) * per_sequence
    cache = model.cache_bytes(int(settings.get("PREDICTOR_KV_CACHE_TOKENS", useful)))
    needed = weights + cache + PROCESS_BYTES
    if needed > memory:
        yield Finding(
            deployment.where,
            f"the model needs {quantities.gib(needed)} (weights {quantities.gib(weights)}, KV cache "
            f"{quantities.gib(cache)}), and the memory limit is {quantities.gib(memory)}",
            "raise the limit, quantize, or lower PREDICTOR_MAX_NUM_SEQS",
            "kserve-llm",
        )
