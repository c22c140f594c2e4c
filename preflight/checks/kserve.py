"""What KServe's webhooks deny, and what its controller fails at after apply has succeeded.

From KServe v0.20's inference_service_validation.go, component.go and predictor_model.go; rules on components that no
overlay here has (transformers and explainers of their own, `spec.canary`) are left to the webhook.
"""

import os.path
import re
from collections.abc import Iterator

from preflight.deployment import KSERVE_CONTAINER, Deployment, Manifest
from preflight.findings import Clauses, Finding

IMPLEMENTATIONS = {
    *("model", "sklearn", "xgboost", "tensorflow", "pytorch", "triton", "onnx", "huggingface", "pmml", "lightgbm"),
    *("paddle", "tabular"),
}
"""Fields of `spec.predictor` that say how to serve, besides a container named kserve-container."""
MODES = ("Knative", "Standard", "ModelMesh", "Serverless", "RawDeployment")
"""The last two are old names, which KServe rewrites."""
AUTOSCALERS = ("hpa", "keda", "external", "none")
SCHEMES = re.compile(r"(gs|s3|pvc|file|https?|hdfs|webhdfs|oci|oci\+native|oci\+fetch|hf)://|/")
LONGEST_NAME = 39
"""So that `<name>-predictor-00001-private` fits into the 63 characters of a label."""


def check(deployment: Deployment) -> Iterator[Finding]:
    """The InferenceService by itself, and against the runtime that it names."""
    for check_ in (_name, _implementation, _storage, _logger, _worker, _scaling, _mode, _runtime):
        for problem, remedy in check_(deployment):
            yield Finding(deployment.where, problem, remedy)


def _name(deployment: Deployment) -> Clauses:
    name = deployment.name
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield (
            f"its name is {name!r}, which KServe denies",
            "use lower-case letters, digits and dashes, a letter first and no dash last",
        )
    if len(name) > LONGEST_NAME:
        yield (
            f"its name has {len(name)} characters, and names that derive from it do not fit into 63",
            f"use {LONGEST_NAME} at most",
        )
    for part in ("-default", "-predictor"):
        if part in name:
            yield f"its name holds {part!r}, which KServe cuts out of URLs", "choose another name"


def _implementation(deployment: Deployment) -> Clauses:
    predictor = deployment.predictor
    named = [container["name"] for container in predictor.get("containers", [])]
    said = sorted(IMPLEMENTATIONS & set(predictor)) + [name for name in named if name == KSERVE_CONTAINER]
    if len(said) != 1:
        yield (
            f"spec.predictor has {len(said)} implementations ({', '.join(said) or 'none'}), and KServe wants one",
            f"keep `model`, or one container named {KSERVE_CONTAINER}",
        )
    if "name" in deployment.model:
        yield "spec.predictor.model.name is set, which KServe denies", "remove it; the container's name is KServe's"
    for container in [*deployment.predictor_pod.containers, *(predictor.get("workerSpec") or {}).get("containers", [])]:
        variables = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
        if "PYTHONPATH" in variables:
            yield f"container {container['name']} sets PYTHONPATH, which KServe denies", "set it in the image"
        if container["name"] == "transformer-container" and "STORAGE_URI" in variables:
            yield "container transformer-container sets STORAGE_URI, which KServe denies", "give it to the predictor"
        if container["name"] == KSERVE_CONTAINER and not deployment.model:
            protocol = variables.get("PROTOCOL", "v1")
            if protocol not in ("v1", "v2"):
                yield f"container {KSERVE_CONTAINER} sets PROTOCOL to {protocol!r}, which KServe denies", "use v1 or v2"


def _storage(deployment: Deployment) -> Clauses:
    predictor, model = deployment.predictor, deployment.model
    uri = model.get("storageUri")
    if uri is None and model and not model.get("storage") and not predictor.get("storageUris"):
        yield (
            "spec.predictor.model has no storageUri, so KServe takes it for a multi-model server and adds an agent",
            "set storageUri: pvc://<claim>",
        )
    if uri is not None and predictor.get("storageUris"):
        yield "storageUri and storageUris are both set, which KServe denies", "keep one of them"
    if uri is None and model.get("confidential"):
        yield "model.confidential is set without a storageUri, which KServe denies", "set storageUri"
    if uri is not None and not SCHEMES.match(uri) and not predictor.get("storageContainerName"):
        yield (
            f"no storage initializer of KServe knows storageUri {uri!r}, which shows only after apply",
            "use pvc://<claim>, or name a ClusterStorageContainer in storageContainerName",
        )
    if uri and uri.startswith("pvc://") and "/" in uri.removeprefix("pvc://").rstrip("/"):
        yield (
            f"storageUri {uri!r} mounts a sub-path, which never follows a rename and is silently empty if missing",
            "mount the claim's root, pvc://<claim>; the snapshot's directory follows from MODEL_REFERENCE",
        )
    yield from _storage_uris(predictor.get("storageUris") or [])


def _storage_uris(entries: list[Manifest]) -> Clauses:
    paths: dict[bool, list[str]] = {True: [], False: []}
    for entry in entries:
        path = entry.get("mountPath", "/mnt/models")
        if not entry.get("uri"):
            yield "storageUris has an entry without a uri, which KServe denies", "set uri"
        if path == "/" or not path.startswith("/") or ".." in path:
            yield f"storageUris has mountPath {path!r}, which KServe denies", "use an absolute path below the root"
        else:
            paths[entry.get("uri", "").startswith("pvc://")].append(path)
    claims, others = paths[True], paths[False]
    if len(claims) != len(set(claims)):
        yield "storageUris mounts two claims at one path, which KServe denies", "give each a mountPath of its own"
    if len(others) > 1 and os.path.commonpath(others) == "/":
        yield (
            f"storageUris has mountPaths without a common parent ({', '.join(others)}), which KServe denies",
            "put them below one directory",
        )


def _logger(deployment: Deployment) -> Clauses:
    logger = deployment.predictor.get("logger")
    if logger is None:
        return
    if logger.get("mode") not in ("all", "request", "response"):
        yield f"logger.mode is {logger.get('mode')!r}, which KServe denies", "use all, request or response"
    storage = logger.get("storage")
    lacking = [field for field in ("path", "parameters", "key") if storage is not None and not storage.get(field)]
    if lacking:
        yield f"logger.storage lacks {' and '.join(lacking)}, which KServe denies", "set path, parameters and key"


def _worker(deployment: Deployment) -> Clauses:
    """Several nodes for one replica."""
    worker = deployment.predictor.get("workerSpec")
    if worker is None:
        return
    if len(worker.get("containers", [])) > 1:
        yield "workerSpec has several containers, which KServe denies", "keep one"
    for field, variable in (
        ("pipelineParallelSize", "PIPELINE_PARALLEL_SIZE"),
        ("tensorParallelSize", "TENSOR_PARALLEL_SIZE"),
    ):
        if worker.get(field, 1) < 1:
            yield f"workerSpec.{field} is {worker[field]}, which KServe denies", "use 1 or more"
        if any(each["name"] == variable for each in deployment.model.get("env", [])):
            yield f"model sets {variable} beside workerSpec, which KServe denies", f"set workerSpec.{field}"
    if deployment.model and not re.match("(pvc|oci)://", deployment.model.get("storageUri", "")):
        yield "workerSpec wants a storageUri of pvc:// or oci://, and KServe denies others", "use pvc://<claim>"
    if deployment.model and deployment.annotations.get("serving.kserve.io/autoscalerClass") != "none":
        yield (
            "workerSpec cannot be scaled, and KServe denies it so",
            "annotate it with serving.kserve.io/autoscalerClass: none",
        )


def _scaling(deployment: Deployment) -> Clauses:
    predictor, knative = deployment.predictor, deployment.is_knative
    least, most = predictor.get("minReplicas", 1), predictor.get("maxReplicas", 0)
    for field in ("minReplicas", "maxReplicas", "containerConcurrency"):
        if predictor.get(field, 0) < 0:
            yield f"{field} is negative, which KServe denies", "use 0 or more"
    if most and least > most:
        yield (
            f"minReplicas is {least} and maxReplicas {most}, which KServe denies",
            "raise maxReplicas or lower minReplicas",
        )
    percent = predictor.get("canaryTrafficPercent")
    if percent is not None and not 0 <= percent <= 100:
        yield f"canaryTrafficPercent is {percent}, which KServe accepts and cannot do", "use 0 to 100"
    if percent is not None and not knative:
        yield "canaryTrafficPercent is set, which only Knative mode can do", "remove it, or use Knative mode"
    metric = predictor.get("scaleMetric")
    if knative:
        if metric not in (None, "concurrency", "rps"):
            yield f"scaleMetric is {metric}, which Knative mode denies", "use concurrency or rps, or Standard mode"
        if metric == "rps" and predictor.get("scaleTarget", 1) < 1:
            yield "scaleTarget for rps is below 1, which KServe denies", "use 1 or more"
        if "deploymentStrategy" in predictor:
            yield "deploymentStrategy is set, which Knative mode denies", "remove it, or use Standard mode"
        if "autoScaling" in predictor:
            yield "autoScaling is set, which Knative mode does not read", "use scaleTarget, or Standard mode"
    else:
        if least == 0:
            yield "minReplicas is 0, which Standard mode cannot do on requests", "use 1, or Knative mode"
        yield from _standard_autoscaler(
            predictor, deployment.annotations.get("serving.kserve.io/autoscalerClass", "hpa")
        )


def _standard_autoscaler(predictor: Manifest, autoscaler: str) -> Clauses:
    metric = predictor.get("scaleMetric")
    metrics = (predictor.get("autoScaling") or {}).get("metrics") or []
    if autoscaler == "hpa":
        if metric not in (None, "cpu", "memory"):
            yield (
                f"scaleMetric is {metric}, which Standard mode denies",
                "use cpu or memory, or component autoscaling-keda",
            )
        if not 1 <= predictor.get("scaleTarget", 80) <= 100:
            yield "scaleTarget is not a percentage, which KServe denies", "use 1 to 100"
        if any(each.get("type") != "Resource" for each in metrics):
            yield "autoScaling has a metric that is no Resource, which class hpa denies", "use class keda"
    if autoscaler == "keda":
        if metric is not None:
            yield "scaleMetric is set, which class keda denies", "remove it"
        for each in metrics:
            external = each.get("external") or {}
            if each.get("type") == "External" and (
                not external.get("metric", {}).get("query") or external.get("target", {}).get("value") is None
            ):
                yield "an External metric has no query or no target.value, which class keda denies", "set both"


def _mode(deployment: Deployment) -> Clauses:
    mode = deployment.annotations.get("serving.kserve.io/deploymentMode")
    if mode is None:
        yield (
            "no deployment mode is said, and clusters differ in their default",
            "annotate it with serving.kserve.io/deploymentMode: Knative, or Standard",
        )
    elif mode not in MODES:
        yield f"deployment mode {mode!r} is none of KServe's", "use Knative or Standard"
    autoscaler = deployment.annotations.get("serving.kserve.io/autoscalerClass")
    if autoscaler not in (None, *AUTOSCALERS):
        yield f"autoscalerClass {autoscaler!r} is denied by KServe", f"use one of {', '.join(AUTOSCALERS)}"
    if "canary" in deployment.service["spec"] and deployment.is_knative:
        yield "spec.canary is set, which only Standard mode can do", "use spec.predictor.canaryTrafficPercent"


def _runtime(deployment: Deployment) -> Clauses:
    runtime, model = deployment.runtime, deployment.model
    if runtime is None:
        return  # Whether it exists is a question of references.
    formats = {entry["name"] for entry in runtime["spec"].get("supportedModelFormats", [])}
    wanted = (model.get("modelFormat") or {}).get("name")
    if wanted not in formats:
        yield (
            f"the runtime supports {', '.join(sorted(formats)) or 'no format'} and not {wanted!r}, which shows only "
            "after apply, as NoSupportingRuntime",
            "correct modelFormat.name",
        )
    protocols = runtime["spec"].get("protocolVersions", [])
    if model.get("protocolVersion", "v1") not in protocols:
        yield (
            f"the runtime does not speak {model.get('protocolVersion', 'v1')}",
            f"set model.protocolVersion to {' or '.join(protocols)}",
        )
    if not any(container["name"] == KSERVE_CONTAINER for container in runtime["spec"].get("containers", [])):
        yield f"the runtime has no container named {KSERVE_CONTAINER}", "name the one that serves so"
