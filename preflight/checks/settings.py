"""Check settings: variables and flags, one pinned model reference, and a device that matches the resources."""

from collections.abc import Iterator

from preflight.checks import resources
from preflight.checks.security import HUB_TOKENS
from preflight.deployment import Deployment, Manifest, Pod
from preflight.findings import Finding
from preflight.programs import PREDICTOR, STORAGE_INITIALIZER, Program
from snapshot_format.reference import HubReference, MalformedReference, parse

_MOUNT = "/mnt/models"
"""Mount path of `storageUri`, which is fixed in KServe."""
_ENTRYPOINTS = ("predictor", "storage_initializer")
"""Last word of a `command` that starts one of the programs."""
_TRUE = {"1", "on", "t", "true", "y", "yes"}
"""What the programs read as true, in lower case."""


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield invalid variables and flags, missing, unpinned or differing references, wrong devices, contradictions."""
    yield from _program(deployment, deployment.predictor_pod, deployment.server, PREDICTOR)
    for pod, container in deployment.downloads:
        yield from _program(deployment, pod, container, STORAGE_INITIALIZER)
    directory = deployment.settings.get("PREDICTOR_MODEL_DIR", _MOUNT)
    if deployment.claim and directory != _MOUNT:
        yield Finding(
            deployment.where,
            f"PREDICTOR_MODEL_DIR is {directory}, and KServe mounts the claim at {_MOUNT}",
            f"set {_MOUNT}, since MODEL_REFERENCE selects the directory below it",
            "kserve-llm",
        )
    yield from _reference(deployment)
    yield from _device(deployment)
    yield from _hold(deployment)


def _program(deployment: Deployment, pod: Pod, container: Manifest, program: Program) -> Iterator[Finding]:
    """Check the variables and arguments with which a container starts a program."""
    [other] = {PREDICTOR, STORAGE_INITIALIZER} - {program}
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
    if isinstance(parsed, HubReference) and not parsed.is_commit:
        several = deployment.predictor.get("maxReplicas", 0) != 1
        effect = "two replicas may serve different weights" if several else "a restart may serve different weights"
        yield Finding(
            deployment.where,
            f"MODEL_REFERENCE {reference} is not pinned, so {effect}",
            "pin a commit, hf://owner/model:<40 hex digits>",
            "kserve-llm",
            "error" if several else "warning",
        )
    downloaded = {deployment.environment(container).get("MODEL_REFERENCE") for _, container in deployment.downloads}
    if downloaded != {reference}:
        others = ", ".join(sorted(str(other) for other in downloaded - {reference})) or "nothing"
        yield Finding(
            deployment.where,
            f"the predictor serves {reference} and the Job downloads {others}",
            "set MODEL_REFERENCE once, in the ConfigMap model-download",
            "kserve-llm",
        )


def _device(deployment: Deployment) -> Iterator[Finding]:
    device = deployment.settings.get("PREDICTOR_DEVICE", "auto")
    if resources.gpus(deployment) and not device.startswith("cuda"):
        yield Finding(
            deployment.where,
            f"a GPU is requested and PREDICTOR_DEVICE is {device}, so a pod without a usable GPU serves from its CPU",
            "set PREDICTOR_DEVICE=cuda",
            "kserve-llm",
        )
    if device.startswith("cuda") and not resources.gpus(deployment):
        yield Finding(
            deployment.where, f"PREDICTOR_DEVICE is {device} and no GPU is requested", "add component gpu", "kserve-llm"
        )


def _hold(deployment: Deployment) -> Iterator[Finding]:
    hold, ready = (deployment.settings.get(f"PREDICTOR_{name}_WHILE_LOADING", "") for name in ("HOLD", "READY"))
    holds, is_ready = hold.strip("0.") != "", ready.lower() in _TRUE
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
