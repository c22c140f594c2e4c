"""The GPUs of the predictor's pod: their number, their memory and the ranks that share the model."""

import re
from collections.abc import Iterable

from preflight import quantities
from preflight.deployment import Deployment, Manifest

GPU = "nvidia.com/gpu"
TENSOR_PARALLEL_SIZE = "PREDICTOR_TENSOR_PARALLEL_SIZE"
PRODUCT = "nvidia.com/gpu.product"
MEMORY = "nvidia.com/gpu.memory"
"""Labels that NVIDIA's GPU feature discovery sets on nodes: the product's name, and the MiB of one GPU."""
GIGABYTES = {
    "T4": 16,
    "A10": 24,
    "A10G": 24,
    "A30": 24,
    "L4": 24,
    "A40": 48,
    "L40": 48,
    "L40S": 48,
    "H200": 141,
    "B200": 180,
}
"""Gigabytes of products whose name does not have them."""
_SLICE = re.compile(r"nvidia\.com/mig-\d+g\.(\d+)gb")
_NAMED_SIZE = re.compile(r"(\d+)GB")


def counts(deployment: Deployment) -> dict[str, float]:
    """Return resource names and counts of the predictor's NVIDIA GPUs, whole or MIG slices."""
    limits = deployment.server.get("resources", {}).get("limits", {})
    numbers = {name: quantities.number(count) for name, count in limits.items() if name.startswith("nvidia.com/")}
    return {name: count for name, count in numbers.items() if count}


def slices(deployment: Deployment) -> list[str]:
    """Return the resource names of MIG slices."""
    return [name for name in counts(deployment) if _SLICE.fullmatch(name)]


def ranks(deployment: Deployment) -> int:
    """Return the number of processes that share the model; 1 for a value that checks/settings.py reports."""
    size = deployment.settings.get(TENSOR_PARALLEL_SIZE, "1")
    if size == "auto":
        return int(sum(counts(deployment).values())) or 1
    return int(size) if size.isdigit() and int(size) else 1


def memory_bytes(deployment: Deployment) -> float | None:
    """Return the least memory of one GPU that the pod may get; None if neither resource nor node labels have it."""
    for name in counts(deployment):
        if size := _SLICE.fullmatch(name):
            return int(size[1]) * 1e9
    pod = deployment.predictor_pod.spec
    selected = _most(_label_bytes(key, [value]) for key, value in (pod.get("nodeSelector") or {}).items())
    terms = [map(_expression_bytes, term.get("matchExpressions", [])) for term in required_node_terms(pod)]
    # A node that matches one of the terms is enough.
    return _most([selected, _least(map(_most, terms))])


def required_node_terms(pod: Manifest) -> list[Manifest]:
    """Return the alternatives of a pod's required node affinity."""
    affinity = (pod.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    terms: list[Manifest] = required.get("nodeSelectorTerms", [])
    return terms


def _expression_bytes(expression: Manifest) -> float | None:
    values = expression.get("values", [])
    if expression["operator"] == "Gt" and expression["key"] == MEMORY:
        return min(map(float, values)) * 2**20
    return _label_bytes(expression["key"], values) if expression["operator"] == "In" else None


def _label_bytes(key: str, values: Iterable[str]) -> float | None:
    """Return the least memory of a GPU whose node has one of these values of a label."""
    if key == MEMORY:
        return _least(float(value) * 2**20 for value in values)
    return _least(map(_product_bytes, values)) if key == PRODUCT else None


def _product_bytes(product: str) -> float | None:
    """Return the memory of a product as in NVIDIA-A100-SXM4-80GB or Tesla-T4."""
    if size := _NAMED_SIZE.search(product):
        return int(size[1]) * 1e9
    known = [GIGABYTES[word] * 1e9 for word in product.split("-") if word in GIGABYTES]
    return known[0] if known else None


def _most(sizes: Iterable[float | None]) -> float | None:
    """Return the largest of the known sizes, which all apply."""
    return max((size for size in sizes if size is not None), default=None)


def _least(sizes: Iterable[float | None]) -> float | None:
    """Return the smallest of alternatives; None if one of them is unknown."""
    known = list(sizes)
    return min((size for size in known if size is not None), default=None) if None not in known else None
