"""Check settings: variables and flags, one pinned model reference, and a device that matches the resources."""

import fnmatch
import re
from collections.abc import Iterator

from preflight import gpus, quantities
from preflight.checks.resources import Model
from preflight.checks.security import HUB_TOKENS
from preflight.deployment import MODELS, Deployment, Manifest, Pod
from preflight.findings import Finding
from preflight.programs import PREDICTOR, PREDICTOR_ON_RAY, STORAGE_INITIALIZER, Program
from snapshot_format.recipe import INT4_CPU, INT8_CPU
from snapshot_format.reference import HubReference, MalformedReference, ModelReference, parse

_PATTERN = re.compile(r"[^\s,\[\]\"]+")
"""One entry of a comma-separated or JSON list."""
_MODES = {INT8_CPU: ("8bit", "auto"), INT4_CPU: ("4bit",)}
"""Values of PREDICTOR_QUANTIZATION that use a prepared variant."""
_ENTRYPOINTS = ("predictor", "storage_initializer")
"""Last word of a `command` that starts one of the programs."""


def check(deployment: Deployment, model: Model | None = None) -> Iterator[Finding]:
    """Yield invalid variables and flags, missing, unpinned or differing references, and settings without their effect.

    Args:
        deployment: the rendered overlay.
        model: the model's dimensions; without them, the context length is not checked.
    """
    program = PREDICTOR_ON_RAY if deployment.is_ray else PREDICTOR
    yield from _program(deployment, deployment.predictor_pod, deployment.server, program)
    for pod, container in deployment.downloads:
        yield from _program(deployment, pod, container, STORAGE_INITIALIZER)
    directory = deployment.settings.get("PREDICTOR_MODEL_DIR", MODELS)
    if deployment.claim and directory != MODELS:
        mounter = "the pod" if deployment.is_ray else "KServe"
        yield Finding(
            deployment.where,
            f"PREDICTOR_MODEL_DIR is {directory}, and {mounter} mounts the claim at {MODELS}",
            f"set {MODELS}, since MODEL_REFERENCE selects the directory below it",
            "kserve-llm",
        )
    yield from _reference(deployment)
    yield from _adapter(deployment)
    yield from _device(deployment)
    yield from _quantization(deployment)
    yield from _kv_cache_dtype(deployment)
    yield from _hold(deployment)
    for problem, remedy in _tokens(deployment.settings, model):
        yield Finding(deployment.where, problem, remedy, "kserve-llm")
    environments = [deployment.environment(container) for _, container in deployment.downloads]
    downloads = (found for environment in environments for found in _download(deployment.settings, environment))
    for problem, remedy in [*_without_effect(deployment), *downloads]:
        yield Finding(deployment.where, problem, remedy, "kserve-llm", "warning")


def _program(deployment: Deployment, pod: Pod, container: Manifest, program: Program) -> Iterator[Finding]:
    """Check the variables and arguments with which a container starts a program."""
    other = PREDICTOR if program is STORAGE_INITIALIZER else STORAGE_INITIALIZER
    effective = {name: (value, config) for name, value, config in deployment.variables(container)}
    for name, (value, config) in sorted(effective.items()):
        where = f"ConfigMap/{config}" if config else pod.where
        if name.upper().startswith(other.prefix):
            yield Finding(
                where,
                f"{name} is a setting of the {other.name}, and the {program.name} ignores it",
                "move it",
                "kserve-llm",
            )
        elif name not in HUB_TOKENS and "$(" not in value and (found := program.variable_problem(name, value)):
            yield Finding(where, *found, "kserve-llm")
    arguments = deployment.arguments(container)
    command = container.get("command", _ENTRYPOINTS)
    if command[-1:] and command[-1] in _ENTRYPOINTS and not any("$(" in argument for argument in arguments):
        for problem, remedy, source in program.argument_problems(arguments):
            yield Finding(pod.where, problem, remedy, source)


def _reference(deployment: Deployment) -> Iterator[Finding]:
    reference = deployment.settings.get("MODEL_REFERENCE")
    if not reference:
        yield Finding(
            deployment.where,
            "MODEL_REFERENCE of the predictor is not set",
            "add it to the ConfigMap model-download with a configMapGenerator of `behavior: merge`",
            "kserve-llm",
        )
        return
    try:
        parsed = parse(reference)
    except MalformedReference:
        parsed = None
        yield Finding(
            deployment.where, f"MODEL_REFERENCE is {reference!r}", "use hf://owner/model:<commit>", "kserve-llm"
        )
    yield from _unpinned(deployment, "MODEL_REFERENCE", parsed)
    downloaded = {deployment.environment(container).get("MODEL_REFERENCE") for _, container in deployment.downloads}
    if downloaded != {reference}:
        others = ", ".join(sorted(str(other) for other in downloaded - {reference})) or "nothing"
        yield Finding(
            deployment.where,
            f"the predictor serves {reference} and the Job downloads {others}",
            "set MODEL_REFERENCE once, in the ConfigMap model-download",
            "kserve-llm",
        )


def _adapter(deployment: Deployment) -> Iterator[Finding]:
    reference = deployment.settings.get("ADAPTER_REFERENCE") or None
    downloads = [deployment.environment(container) for _, container in deployment.downloads]
    if reference:
        try:
            yield from _unpinned(deployment, "ADAPTER_REFERENCE", parse(reference))
        except MalformedReference:
            problem = f"ADAPTER_REFERENCE is {reference!r}"
            yield Finding(deployment.where, problem, "use hf://owner/adapter:<commit>", "kserve-llm")
        if any(environment.get("STORAGE_INITIALIZER_PREPARE") for environment in downloads):
            yield Finding(
                deployment.where,
                "the Job prepares quantized weights without the adapter, so they are not used",
                "replace component prepared-8bit by quantization-8bit, or prepared-4bit by PREDICTOR_QUANTIZATION=4bit",
                "kserve-llm",
                "warning",
            )
    downloaded = {environment.get("ADAPTER_REFERENCE") or None for environment in downloads}
    if downloaded - {reference}:
        others = ", ".join(sorted(str(other or "none") for other in downloaded - {reference}))
        yield Finding(
            deployment.where,
            f"the predictor merges adapter {reference or 'none'} and the Job downloads {others}",
            "set ADAPTER_REFERENCE with component adapter, which gives it to both",
            "kserve-llm",
        )


def _unpinned(deployment: Deployment, variable: str, reference: ModelReference | None) -> Iterator[Finding]:
    """Check that a reference cannot resolve to other weights at the next start."""
    if isinstance(reference, HubReference) and not reference.is_commit:
        several = deployment.predictor.get("maxReplicas", 0) != 1
        effect = "two replicas may serve different weights" if several else "a restart may serve different weights"
        yield Finding(
            deployment.where,
            f"{variable} {deployment.settings[variable]} is not pinned, so {effect}",
            "pin a commit, hf://owner/model:<40 hex digits>",
            "kserve-llm",
            "error" if several else "warning",
        )


def _device(deployment: Deployment) -> Iterator[Finding]:
    device = deployment.settings.get("PREDICTOR_DEVICE", "auto")
    if gpus.counts(deployment) and not device.startswith("cuda"):
        yield Finding(
            deployment.where,
            f"a GPU is requested and PREDICTOR_DEVICE is {device}, so a pod without a usable GPU serves from its CPU",
            "set PREDICTOR_DEVICE=cuda",
            "kserve-llm",
        )
    if device.startswith("cuda") and not gpus.counts(deployment):
        yield Finding(
            deployment.where, f"PREDICTOR_DEVICE is {device} and no GPU is requested", "add component gpu", "kserve-llm"
        )


def _quantization(deployment: Deployment) -> Iterator[Finding]:
    settings = deployment.settings
    falls_back = _is_true(settings.get("PREDICTOR_QUANTIZATION_FALLBACK"))
    if settings.get("PREDICTOR_QUANTIZATION") == "fp8" and not gpus.counts(deployment) and not falls_back:
        yield Finding(
            deployment.where,
            "PREDICTOR_QUANTIZATION is fp8 and no GPU is requested, so the predictor does not start",
            "set PREDICTOR_QUANTIZATION=8bit, or add component gpu",
            "kserve-llm",
        )


def _kv_cache_dtype(deployment: Deployment) -> Iterator[Finding]:
    settings = deployment.settings
    uses_gpu = gpus.counts(deployment) and settings.get("PREDICTOR_DEVICE") != "cpu"
    if settings.get("PREDICTOR_KV_CACHE_DTYPE") == "int8" and uses_gpu:
        yield Finding(
            deployment.where,
            "PREDICTOR_KV_CACHE_DTYPE is int8 and a GPU is requested, so the predictor does not start",
            "set it to auto",
            "kserve-llm",
        )


def _hold(deployment: Deployment) -> Iterator[Finding]:
    hold, ready = (deployment.settings.get(f"PREDICTOR_{name}_WHILE_LOADING", "") for name in ("HOLD", "READY"))
    holds, is_ready = hold.strip("0.") != "", _is_true(ready)
    if is_ready and not holds:
        yield Finding(
            deployment.where,
            "PREDICTOR_READY_WHILE_LOADING is on without PREDICTOR_HOLD_WHILE_LOADING, so the predictor does not start",
            "add component hold-while-loading, which sets both",
            "kserve-llm",
        )
    elif holds and not is_ready:
        yield Finding(
            deployment.where,
            "PREDICTOR_HOLD_WHILE_LOADING has no effect, since requests reach only pods that are ready",
            "add component hold-while-loading, which sets PREDICTOR_READY_WHILE_LOADING too",
            "kserve-llm",
            "warning",
        )
    elif is_ready and not deployment.is_knative:
        yield Finding(
            deployment.where,
            "PREDICTOR_READY_WHILE_LOADING is on, and a rollout stops the old replica while the new one loads",
            "remove component hold-while-loading in Standard mode",
            "kserve-llm",
            "warning",
        )


def _tokens(settings: dict[str, str], model: Model | None) -> Iterator[tuple[str, str]]:
    """Check numbers of tokens. Values that are not numbers are reported with their variables."""
    length, cache = (settings.get(f"PREDICTOR_{name}", "") for name in ("MAX_MODEL_LEN", "KV_CACHE_TOKENS"))
    if not length.isdigit():
        return
    if cache.isdigit() and int(cache) < int(length):
        yield (
            f"PREDICTOR_KV_CACHE_TOKENS is {cache}, less than one sequence of PREDICTOR_MAX_MODEL_LEN ({length})",
            "raise the first, or unset it",
        )
    if model and model.positions and int(length) > model.positions:
        yield (
            f"PREDICTOR_MAX_MODEL_LEN is {length}, and the model has {model.positions} positions",
            "lower it, or unset it for the model's context",
        )


def _without_effect(deployment: Deployment) -> Iterator[tuple[str, str]]:
    """Check settings that need something else in the pod or the cluster."""
    settings = deployment.settings
    if _is_true(settings.get("PREDICTOR_ENABLE_GRPC")) and deployment.is_knative:
        yield (
            "PREDICTOR_ENABLE_GRPC is true, and Knative routes to one port, which is HTTP",
            "set it to false, or use Standard mode",
        )
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if _is_true(settings.get("PREDICTOR_TRACING")) and not any(settings.get(name) for name in endpoints):
        yield "PREDICTOR_TRACING is true without an endpoint of a collector", f"set {endpoints[0]}"
    threads = settings.get("PREDICTOR_NUM_THREADS", "")
    limit = deployment.server.get("resources", {}).get("limits", {}).get("cpu")
    if threads.isdigit() and limit is not None and int(threads) > quantities.number(limit):
        yield (
            f"PREDICTOR_NUM_THREADS is {threads}, more than the limit of {limit} CPUs, so the threads are throttled",
            "unset it for the container's limit",
        )


def _download(settings: dict[str, str], environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Check what the Job publishes against what the predictor loads."""
    if any(_is_true(environment.get(name)) for name in ("STORAGE_INITIALIZER_OFFLINE", "HF_HUB_OFFLINE")):
        yield "the Job is offline, so it can publish nothing that is not on the volume yet", "set it to false"
    if variant := environment.get("STORAGE_INITIALIZER_PREPARE"):
        quantization = settings.get("PREDICTOR_QUANTIZATION", "none")
        modes = _MODES.get(variant, (quantization,))
        if quantization not in modes:
            yield (
                f"the Job prepares {variant}, and PREDICTOR_QUANTIZATION is {quantization}, which does not use it",
                f"set PREDICTOR_QUANTIZATION={modes[0]}, or remove STORAGE_INITIALIZER_PREPARE",
            )
        job = sorted(_PATTERN.findall(environment.get("STORAGE_INITIALIZER_PREPARE_SKIP_MODULES", "")))
        own = sorted(_PATTERN.findall(settings.get("PREDICTOR_QUANTIZATION_SKIP_MODULES", "")))
        if job != own:
            yield (
                f"the Job skips layers {', '.join(job) or 'none'} and the predictor {', '.join(own) or 'none'}, so the "
                "prepared weights are not used",
                "make STORAGE_INITIALIZER_PREPARE_SKIP_MODULES equal to PREDICTOR_QUANTIZATION_SKIP_MODULES",
            )
    allowed = _PATTERN.findall(environment.get("STORAGE_ALLOW_PATTERNS", ""))
    has_code = any(fnmatch.fnmatchcase("modeling.py", pattern) for pattern in allowed)
    if _is_true(settings.get("PREDICTOR_TRUST_REMOTE_CODE")) and not has_code:
        yield (
            "PREDICTOR_TRUST_REMOTE_CODE is true, and the Job does not publish code",
            "set STORAGE_ALLOW_PATTERNS=* if you have read the code",
        )


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in quantities.TRUE_WORDS
