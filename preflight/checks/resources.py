"""Check resources: requests and limits, GPUs, the volume's access mode, memory of weights and KV cache."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preflight import quantities
from preflight.deployment import Deployment, name_of
from preflight.findings import CheckError, Finding

GPU = "nvidia.com/gpu"
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
            for name in ("cpu", "memory"):
                request, limit = (resources.get(kind, {}).get(name) for kind in ("requests", "limits"))
                if request is None or limit is None:
                    yield Finding(
                        pod.where,
                        f"container {container['name']} has no request or no limit of {name}",
                        f"set {name} in requests and limits",
                    )
                elif quantities.number(request) > quantities.number(limit):
                    yield Finding(
                        pod.where,
                        f"container {container['name']} requests {name} {request}, more than its limit {limit}",
                        "raise the limit or lower the request",
                    )


def _gpu(deployment: Deployment) -> Iterator[Finding]:
    resources = deployment.server.get("resources", {})
    requests, limits = (
        {k: v for k, v in resources.get(kind, {}).items() if k.startswith("nvidia.com/")}
        for kind in ("requests", "limits")
    )
    if requests != limits:
        yield Finding(
            deployment.where,
            f"GPU requests {requests} differ from limits {limits}, which Kubernetes rejects",
            "make them equal",
        )
    tolerations = deployment.predictor_pod.spec.get("tolerations", [])
    if limits and not any(toleration.get("key") in (GPU, None) for toleration in tolerations):
        yield Finding(
            deployment.where,
            f"a GPU is requested and the taint {GPU} is not tolerated, so GPU nodes with it reject the pod",
            "add component gpu",
        )


def _claim(deployment: Deployment) -> Iterator[Finding]:
    replicas = deployment.predictor.get("maxReplicas", 0)
    for name in {deployment.claim, *deployment.predictor_pod.claims}:
        claim = deployment.find("PersistentVolumeClaim", name)
        if claim is None:
            continue
        modes = claim["spec"].get("accessModes", [])
        if not {"ReadWriteMany", "ReadOnlyMany"} & set(modes) and replicas != 1:
            yield Finding(
                name_of(claim),
                f"it is {' and '.join(modes)}, which one node can mount, and maxReplicas is {replicas or 'unlimited'}",
                "use ReadWriteMany, or component local-storage with one replica",
            )


def _memory(deployment: Deployment, model: Model) -> Iterator[Finding]:
    settings, limits = deployment.settings, deployment.server.get("resources", {}).get("limits", {})
    quantization, dtype = settings.get("PREDICTOR_QUANTIZATION", "none"), settings.get("PREDICTOR_DTYPE", "auto")
    weights = model.weight_bytes(quantization, dtype)
    stored = model.weight_bytes("none", "auto")
    memory = quantities.number(limits.get("memory", 0))
    slices = [int(match[1]) * 1e9 for name in limits if (match := _MIG.fullmatch(name))]
    if any(name.startswith("nvidia.com/") for name in limits):
        if slices and weights + PROCESS_BYTES > slices[0]:
            yield Finding(
                deployment.where,
                f"the weights need {quantities.gib(weights)}, and the GPU slice has {quantities.gib(slices[0])}",
                "request a larger slice, or quantize",
            )
        if stored > memory:
            yield Finding(
                deployment.where,
                f"the checkpoint's {quantities.gib(stored)} are loaded through {quantities.gib(memory)} of host memory",
                "raise the memory limit above the checkpoint's size to read each page once",
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
        )
