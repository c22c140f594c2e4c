"""Check the rules of KServe's webhooks, and errors that its controller reports only after apply.

Source: KServe v0.20, inference_service_validation.go, component.go and predictor_model.go. Rules on transformers,
explainers and `spec.canary`, which no overlay uses, are left to the webhook.
"""

import os.path
import re
from collections.abc import Iterator

from preflight.deployment import KSERVE_CONTAINER, Deployment, Manifest
from preflight.findings import Finding, Problems

IMPLEMENTATIONS = {
    *("model", "sklearn", "xgboost", "tensorflow", "pytorch", "triton", "onnx", "huggingface", "pmml", "lightgbm"),
    *("paddle", "tabular"),
}
"""Fields of `spec.predictor` that select an implementation; a container named kserve-container does too."""
MODES = ("Knative", "Standard", "ModelMesh", "Serverless", "RawDeployment")
"""The last two are old names that KServe replaces."""
AUTOSCALERS = ("hpa", "keda", "external", "none")
SCHEMES = re.compile(r"(gs|s3|pvc|file|https?|hdfs|webhdfs|oci|oci\+native|oci\+fetch|hf)://|/")
LONGEST_NAME = 39
"""The longest name with which `<name>-predictor-00001-private` has at maximum 63 characters, the limit of a label."""


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield findings on the InferenceService and on its match with the runtime."""
    for check_ in (_name, _implementation, _storage, _logger, _worker, _scaling, _mode, _runtime):
        for problem, remedy, source in check_(deployment):
            yield Finding(deployment.where, problem, remedy, source)
    if deployment.is_knative and not deployment.predictor.get("maxReplicas", 0):
        yield Finding(
            deployment.where,
            "maxReplicas is not set, so Knative starts replicas without a limit",
            "set maxReplicas",
            "kserve-llm",
            "warning",
        )


def _name(deployment: Deployment) -> Problems:
    name = deployment.name
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield (
            f"its name is {name!r}, which KServe denies",
            "use lower-case letters, digits and dashes; start with a letter and do not end with a dash",
            "KServe's webhook",
        )
    if len(name) > LONGEST_NAME:
        yield (
            f"its name has {len(name)} characters, so derived names exceed 63",
            f"use at maximum {LONGEST_NAME}",
            "KServe's controller",
        )
    for part in ("-default", "-predictor"):
        if part in name:
            yield f"its name contains {part!r}, which KServe removes from URLs", "use another name", "kserve-llm"


def _implementation(deployment: Deployment) -> Problems:
    predictor = deployment.predictor
    named = [container["name"] for container in predictor.get("containers", [])]
    implementations = [*sorted(IMPLEMENTATIONS & set(predictor)), *(name for name in named if name == KSERVE_CONTAINER)]
    if len(implementations) != 1:
        yield (
            f"spec.predictor has {len(implementations)} implementations, not one: {', '.join(implementations)}",
            f"keep `model`, or one container named {KSERVE_CONTAINER}",
            "KServe's webhook",
        )
    if "name" in deployment.model:
        yield (
            "spec.predictor.model.name is set, which KServe denies",
            "remove it, since KServe names the container",
            "KServe's webhook",
        )
    for container in [*deployment.predictor_pod.containers, *(predictor.get("workerSpec") or {}).get("containers", [])]:
        variables = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
        if "PYTHONPATH" in variables:
            yield (
                f"container {container['name']} sets PYTHONPATH, which KServe denies",
                "set it in the image",
                "KServe's webhook",
            )
        if container["name"] == "transformer-container" and "STORAGE_URI" in variables:
            yield (
                "container transformer-container sets STORAGE_URI, which KServe denies",
                "set it on the predictor",
                "KServe's webhook",
            )
        if container["name"] == KSERVE_CONTAINER and not deployment.model:
            protocol = variables.get("PROTOCOL", "v1")
            if protocol not in ("v1", "v2"):
                yield (
                    f"container {KSERVE_CONTAINER} sets PROTOCOL to {protocol!r}, which KServe denies",
                    "use v1 or v2",
                    "KServe's webhook",
                )


def _storage(deployment: Deployment) -> Problems:
    predictor, model = deployment.predictor, deployment.model
    uri = model.get("storageUri")
    if uri is None and model and not model.get("storage") and not predictor.get("storageUris"):
        yield (
            "spec.predictor.model has no storageUri, so KServe adds the agent of a multi-model server",
            "set storageUri: pvc://<claim>",
            "KServe's controller",
        )
    if uri is not None and predictor.get("storageUris"):
        yield "storageUri and storageUris are both set, which KServe denies", "keep one", "KServe's webhook"
    if uri is None and model.get("confidential"):
        yield (
            "model.confidential is set without a storageUri, which KServe denies",
            "set storageUri",
            "KServe's webhook",
        )
    if uri is not None and not SCHEMES.match(uri) and not predictor.get("storageContainerName"):
        yield (
            f"no storage initializer of KServe supports storageUri {uri!r}, an error reported only after apply",
            "use pvc://<claim>, or set storageContainerName",
            "KServe's controller",
        )
    if uri and uri.startswith("pvc://") and "/" in uri.removeprefix("pvc://").rstrip("/"):
        yield (
            f"storageUri {uri!r} mounts a sub-path, which does not follow a rename and is silently empty if missing",
            "mount the claim's root, pvc://<claim>, since MODEL_REFERENCE selects the snapshot's directory",
            "kserve-llm",
        )
    yield from _storage_uris(predictor.get("storageUris") or [])


def _storage_uris(entries: list[Manifest]) -> Problems:
    paths: dict[bool, list[str]] = {True: [], False: []}
    for entry in entries:
        path = entry.get("mountPath", "/mnt/models")
        if not entry.get("uri"):
            yield "storageUris has an entry without a uri, which KServe denies", "set uri", "KServe's webhook"
        if path == "/" or not path.startswith("/") or ".." in path:
            yield (
                f"storageUris has mountPath {path!r}, which KServe denies",
                "use an absolute path below the root",
                "KServe's webhook",
            )
        else:
            paths[entry.get("uri", "").startswith("pvc://")].append(path)
    claims, others = paths[True], paths[False]
    if len(claims) != len(set(claims)):
        yield (
            "storageUris mounts two claims at one path, which KServe denies",
            "set a different mountPath for each",
            "KServe's webhook",
        )
    if len(others) > 1 and os.path.commonpath(others) == "/":
        yield (
            f"storageUris has mountPaths without a common parent ({', '.join(others)}), which KServe denies",
            "put them below one directory",
            "KServe's webhook",
        )


def _logger(deployment: Deployment) -> Problems:
    logger = deployment.predictor.get("logger")
    if logger is None:
        return
    if logger.get("mode") not in ("all", "request", "response"):
        yield (
            f"logger.mode is {logger.get('mode')!r}, which KServe denies",
            "use all, request or response",
            "KServe's webhook",
        )
    storage = logger.get("storage")
    missing = [field for field in ("path", "parameters", "key") if storage is not None and not storage.get(field)]
    if missing:
        yield (
            f"logger.storage has no {' and '.join(missing)}, which KServe denies",
            "set path, parameters and key",
            "KServe's webhook",
        )


def _worker(deployment: Deployment) -> Problems:
    """Check a replica on several nodes."""
    worker = deployment.predictor.get("workerSpec")
    if worker is None:
        return
    if len(worker.get("containers", [])) > 1:
        yield "workerSpec has several containers, which KServe denies", "keep one", "KServe's webhook"
    for field, variable in (
        ("pipelineParallelSize", "PIPELINE_PARALLEL_SIZE"),
        ("tensorParallelSize", "TENSOR_PARALLEL_SIZE"),
    ):
        if worker.get(field, 1) < 1:
            yield f"workerSpec.{field} is {worker[field]}, which KServe denies", "use 1 or more", "KServe's webhook"
        if any(entry["name"] == variable for entry in deployment.model.get("env", [])):
            yield (
                f"model sets {variable} together with workerSpec, which KServe denies",
                f"set workerSpec.{field}",
                "KServe's webhook",
            )
    if deployment.model and not re.match("(pvc|oci)://", deployment.model.get("storageUri", "")):
        yield (
            "workerSpec is set and storageUri is not pvc:// or oci://, which KServe denies",
            "use pvc://<claim>",
            "KServe's webhook",
        )
    if deployment.model and deployment.annotations.get("serving.kserve.io/autoscalerClass") != "none":
        yield (
            "workerSpec is set with an autoscaler, which KServe denies",
            "annotate it with serving.kserve.io/autoscalerClass: none",
            "KServe's webhook",
        )


def _scaling(deployment: Deployment) -> Problems:
    predictor, knative = deployment.predictor, deployment.is_knative
    minimum, maximum = predictor.get("minReplicas", 1), predictor.get("maxReplicas", 0)
    for field in ("minReplicas", "maxReplicas", "containerConcurrency"):
        if predictor.get(field, 0) < 0:
            yield f"{field} is negative, which KServe denies", "use 0 or more", "KServe's webhook"
    if predictor.get("timeout", 1) <= 0:
        yield f"timeout is {predictor['timeout']}", "use a positive number of seconds", "Knative's webhook"
    if maximum and minimum > maximum:
        yield (
            f"minReplicas is {minimum} and maxReplicas is {maximum}, which KServe denies",
            "raise maxReplicas or lower minReplicas",
            "KServe's webhook",
        )
    percent = predictor.get("canaryTrafficPercent")
    if percent is not None and not 0 <= percent <= 100:
        yield (
            f"canaryTrafficPercent is {percent}, which KServe accepts but cannot apply",
            "use 0 to 100",
            "KServe's controller",
        )
    if percent is not None and not knative:
        yield (
            "canaryTrafficPercent is set, which only Knative mode supports",
            "remove it, or use Knative mode",
            "KServe's controller",
        )
    metric = predictor.get("scaleMetric")
    if knative:
        if metric not in (None, "concurrency", "rps"):
            yield (
                f"scaleMetric is {metric}, which Knative mode denies",
                "use concurrency or rps, or Standard mode",
                "KServe's webhook",
            )
        if metric == "rps" and predictor.get("scaleTarget", 1) < 1:
            yield "scaleTarget for rps is below 1, which KServe denies", "use 1 or more", "KServe's webhook"
        if "deploymentStrategy" in predictor:
            yield (
                "deploymentStrategy is set, which Knative mode denies",
                "remove it, or use Standard mode",
                "KServe's webhook",
            )
        if "autoScaling" in predictor:
            yield (
                "autoScaling is set, which Knative mode ignores",
                "use scaleTarget, or Standard mode",
                "KServe's controller",
            )
    else:
        if minimum == 0:
            yield (
                "minReplicas is 0, and Standard mode does not start replicas on requests",
                "use 1, or Knative mode",
                "kserve-llm",
            )
        yield from _standard_autoscaler(
            predictor, deployment.annotations.get("serving.kserve.io/autoscalerClass", "hpa")
        )


def _standard_autoscaler(predictor: Manifest, autoscaler: str) -> Problems:
    metric = predictor.get("scaleMetric")
    metrics = (predictor.get("autoScaling") or {}).get("metrics") or []
    if autoscaler == "hpa":
        if metric not in (None, "cpu", "memory"):
            yield (
                f"scaleMetric is {metric}, which Standard mode denies",
                "use cpu or memory, or component autoscaling-keda",
                "KServe's webhook",
            )
        if not 1 <= predictor.get("scaleTarget", 80) <= 100:
            yield "scaleTarget is not a percentage, which KServe denies", "use 1 to 100", "KServe's webhook"
        if any(entry.get("type") != "Resource" for entry in metrics):
            yield (
                "autoScaling has a metric that is not a Resource, which class hpa denies",
                "use class keda",
                "KServe's webhook",
            )
    if autoscaler == "keda":
        if metric is not None:
            yield "scaleMetric is set, which class keda denies", "remove it", "KServe's webhook"
        for entry in metrics:
            external = entry.get("external") or {}
            if entry.get("type") == "External" and (
                not external.get("metric", {}).get("query") or external.get("target", {}).get("value") is None
            ):
                yield (
                    "an External metric has no query or no target.value, which class keda denies",
                    "set both",
                    "KServe's webhook",
                )


def _mode(deployment: Deployment) -> Problems:
    mode = deployment.annotations.get("serving.kserve.io/deploymentMode")
    if mode is None:
        yield (
            "no deployment mode is set, and the default depends on the cluster",
            "annotate it with serving.kserve.io/deploymentMode: Knative or Standard",
            "kserve-llm",
        )
    elif mode not in MODES:
        yield f"deployment mode {mode!r} is unknown", "use Knative or Standard", "KServe's controller"
    autoscaler = deployment.annotations.get("serving.kserve.io/autoscalerClass")
    if autoscaler not in (None, *AUTOSCALERS):
        yield (
            f"autoscalerClass {autoscaler!r} is denied by KServe",
            f"use one of {', '.join(AUTOSCALERS)}",
            "KServe's webhook",
        )
    if "canary" in deployment.service["spec"] and deployment.is_knative:
        yield (
            "spec.canary is set, which only Standard mode supports",
            "use spec.predictor.canaryTrafficPercent",
            "KServe's webhook",
        )


def _runtime(deployment: Deployment) -> Problems:
    runtime, model = deployment.runtime, deployment.model
    if runtime is None:
        return  # checks/references.py reports it.
    for field in ("disabled", "multiModel"):
        if runtime["spec"].get(field):
            yield (
                f"the runtime has {field}: true, so KServe does not select it",
                f"remove {field}",
                "KServe's controller",
            )
    formats = {entry["name"] for entry in runtime["spec"].get("supportedModelFormats", [])}
    model_format = (model.get("modelFormat") or {}).get("name")
    if model_format not in formats:
        yield (
            f"the runtime supports {', '.join(sorted(formats)) or 'no format'} and not {model_format!r}, an error "
            "reported only after apply, as NoSupportingRuntime",
            "correct modelFormat.name",
            "KServe's controller",
        )
    protocols = runtime["spec"].get("protocolVersions", [])
    if model.get("protocolVersion", "v1") not in protocols:
        yield (
            f"the runtime does not support protocol {model.get('protocolVersion', 'v1')}",
            f"set model.protocolVersion to {' or '.join(protocols)}",
            "KServe's controller",
        )
    if not any(container["name"] == KSERVE_CONTAINER for container in runtime["spec"].get("containers", [])):
        yield (
            f"the runtime has no container named {KSERVE_CONTAINER}",
            "rename the container of the predictor",
            "KServe's controller",
        )
