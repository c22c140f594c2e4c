"""Check the API server's rules on names, labels and pods, which are in no schema.

KServe's objects contain parts of pods. A mistake there passes `kubectl apply`, and the API server or Knative's webhook
rejects the pod that KServe creates.
"""

import re
from collections import Counter
from collections.abc import Iterator

from preflight.deployment import KSERVE_CONTAINER, Deployment, Manifest, Pod, name_of
from preflight.findings import Finding

CONTAINER_VALUES = {
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
}
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_ANY_NAME = ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
"""Kinds whose names have no such rule. checks/kserve.py checks that of the InferenceService."""
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")

Problem = tuple[str, str]
"""A problem and its remedy."""


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield names, labels, pods, Jobs and strategies that the API server rejects."""
    for manifest in deployment.objects:
        for problem, remedy in _metadata(manifest):
            yield Finding(name_of(manifest), problem, remedy, "API server")
    for job in deployment.all("Job"):
        for problem, remedy in _job(job["spec"]):
            yield Finding(name_of(job), problem, remedy, "API server")
    parts = deployment.serving_pods if deployment.is_ray else _parts(deployment)
    for pod in [*parts, *deployment.pods[len(deployment.serving_pods) :]]:
        for problem, remedy in _pod(pod):
            yield Finding(pod.where, problem, remedy, "API server")
        for container in pod.containers:
            for problem, remedy in _container(container):
                yield Finding(pod.where, f"container {container['name']} {problem}", remedy, "API server")
    for problem, remedy in _strategy(deployment.predictor.get("deploymentStrategy") or {}):
        yield Finding(deployment.where, problem, remedy, "API server")


def _parts(deployment: Deployment) -> list[Pod]:
    """Return the parts of the predictor's pod as they are written: the merged one has no duplicates."""
    runtime, predictor = deployment.runtime, deployment.predictor
    model = [{"name": KSERVE_CONTAINER, **deployment.model}] if deployment.model else []
    own = {**predictor, "containers": [*predictor.get("containers", []), *model]}
    return [*([Pod(name_of(runtime), runtime["spec"])] if runtime else []), Pod(deployment.where, own)]


def _metadata(manifest: Manifest) -> Iterator[Problem]:
    kind, name = str(manifest.get("kind")), str(manifest["metadata"].get("name", ""))
    longest = 63 if kind in ("Namespace", "Service") else 253
    if kind not in (*_ANY_NAME, "InferenceService") and (not _NAME.fullmatch(name) or len(name) > longest):
        yield f"its name is {name!r}", f"use lower-case letters, digits and dashes, at maximum {longest}"
    template = manifest.get("spec", {}).get("template", {}) if isinstance(manifest.get("spec"), dict) else {}
    for metadata in (manifest["metadata"], template.get("metadata", {})):
        for key, value in (metadata.get("labels") or {}).items():
            if not _LABEL_KEY.fullmatch(key):
                yield f"{key!r} is not the key of a label", "use letters, digits, dashes, dots; a domain before a slash"
            if isinstance(value, str) and not _LABEL_VALUE.fullmatch(value):
                yield (
                    f"label {key} is {value!r}",
                    "use at maximum 63 letters, digits, dashes, underscores and dots, or make it an annotation",
                )


def _job(spec: Manifest) -> Iterator[Problem]:
    pod = spec["template"]["spec"]
    restart, rules = pod.get("restartPolicy", "Always"), (spec.get("podFailurePolicy") or {}).get("rules", [])
    if restart not in ("Never", "OnFailure"):
        yield f"the restartPolicy of its pod is {restart}, which a Job cannot have", "use Never"
    elif rules and restart != "Never":
        yield "it has a podFailurePolicy, which requires restartPolicy Never", "set restartPolicy: Never"
    names = [container["name"] for container in Pod("", pod).containers]
    for rule in rules:
        name = (rule.get("onExitCodes") or {}).get("containerName")
        if name is not None and name not in names:
            yield f"its podFailurePolicy names container {name!r}", f"use {' or '.join(names)}"


def _pod(pod: Pod) -> Iterator[Problem]:
    for kind, names in (
        ("volumes", [volume["name"] for volume in pod.spec.get("volumes", [])]),
        ("containers", [container["name"] for container in pod.containers]),
    ):
        for name in _repeated(names):
            yield f"two {kind} have the name {name!r}", "rename or remove one"
    for toleration in pod.spec.get("tolerations") or []:
        yield from _toleration(toleration)


def _toleration(toleration: Manifest) -> Iterator[Problem]:
    key, operator = toleration.get("key"), toleration.get("operator", "Equal")
    subject = f"the toleration of {key!r}" if key else "a toleration without a key"
    if operator not in ("Exists", "Equal"):
        yield f"{subject} has operator {operator!r}", "use Exists or Equal"
    elif operator == "Exists" and toleration.get("value"):
        yield f"{subject} has operator Exists and a value", "remove the value, or use Equal"
    elif operator == "Equal" and not key:
        yield f"{subject} has operator Equal", "set key, or use Exists to tolerate all taints"
    if toleration.get("effect") not in (None, "", *EFFECTS):
        yield f"{subject} has effect {toleration['effect']!r}", f"use {', '.join(EFFECTS)}, or none for all"
    if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
        yield f"{subject} has tolerationSeconds, which only effect NoExecute has", "remove it"


def _container(container: Manifest) -> Iterator[Problem]:
    for path in _repeated([mount["mountPath"] for mount in container.get("volumeMounts", [])]):
        yield f"mounts two volumes at {path}", "use different paths"
    for field, values in CONTAINER_VALUES.items():
        if container.get(field) not in (None, *values):
            yield f"has {field} {container[field]!r}", f"use {', '.join(values)}"
    for kind in PROBES:
        probe = container.get(kind)
        if probe is None:
            continue
        handlers = sorted({"httpGet", "exec", "grpc", "tcpSocket"} & set(probe))
        if len(handlers) != 1:
            yield f"has a {kind} with {' and '.join(handlers) or 'no request'}", "use httpGet"
        if kind != "readinessProbe" and probe.get("successThreshold", 1) != 1:
            yield f"has a {kind} with successThreshold {probe['successThreshold']}", "remove it"
        if probe.get("httpGet", {}).get("scheme", "HTTP") not in ("HTTP", "HTTPS"):
            yield f"has a {kind} with scheme {probe['httpGet']['scheme']!r}", "use HTTP"


def _strategy(strategy: Manifest) -> Iterator[Problem]:
    """Check the strategy of Standard mode's Deployment."""
    kind, rolling = strategy.get("type", "RollingUpdate"), strategy.get("rollingUpdate")
    if kind not in ("RollingUpdate", "Recreate"):
        yield f"deploymentStrategy.type is {kind!r}", "use RollingUpdate or Recreate"
    elif kind == "Recreate" and rolling:
        yield "deploymentStrategy is Recreate and has rollingUpdate", "remove rollingUpdate"
    zero = [str((rolling or {}).get(field)) in ("0", "0%") for field in ("maxSurge", "maxUnavailable")]
    if all(zero):
        yield "maxSurge and maxUnavailable are both 0, so no pod can be replaced", "set one of them to 1"


def _repeated(values: list[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]
