"""Check Knative's admission rules: feature flags of pod fields, and fields that no flag allows.

Source: Knative Serving 1.21, fieldmask.go, k8s_validation.go, revision_validation.go and annotation_validation.go.
The rules apply to the Knative service that KServe creates, not to fields that its pod webhook adds afterwards, such as
the claim of a `storageUri: pvc://…`.
"""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from preflight import quantities
from preflight.deployment import KSERVE_CONTAINER, Deployment, Manifest, Pod
from preflight.findings import Finding, Problems

FLAGS = {
    "nodeSelector": "kubernetes.podspec-nodeselector",
    "tolerations": "kubernetes.podspec-tolerations",
    "affinity": "kubernetes.podspec-affinity",
    "topologySpreadConstraints": "kubernetes.podspec-topologyspreadconstraints",
    "securityContext": "kubernetes.podspec-securitycontext",
    "initContainers": "kubernetes.podspec-init-containers",
    "runtimeClassName": "kubernetes.podspec-runtimeclassname",
    "priorityClassName": "kubernetes.podspec-priorityclassname",
    "schedulerName": "kubernetes.podspec-schedulername",
    "dnsPolicy": "kubernetes.podspec-dnspolicy",
    "dnsConfig": "kubernetes.podspec-dnsconfig",
    "hostAliases": "kubernetes.podspec-hostaliases",
}
"""Pod fields and the flags that allow them, all disabled by default."""
CLAIM = "kubernetes.podspec-persistent-volume-claim"
CLAIM_WRITE = "kubernetes.podspec-persistent-volume-write"
FIELD_REFERENCE = "kubernetes.podspec-fieldref"
VOLUME_FLAGS = {
    "hostPath": "kubernetes.podspec-volumes-hostpath",
    "csi": "kubernetes.podspec-volumes-csi",
    "ephemeral": "kubernetes.podspec-volumes-ephemeral",
    "image": "kubernetes.podspec-volumes-image",
}
FORBIDDEN_POD = ("terminationGracePeriodSeconds", "restartPolicy", "nodeName", "resourceClaims")
FORBIDDEN_CONTAINER = ("lifecycle", "stdin", "stdinOnce", "tty")
RESERVED = ("PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION")
MAX_TIMEOUT_SECONDS = 600
"""Default of max-revision-timeout-seconds in config-defaults."""
FULL_DUPLEX = "features.knative.dev/http-full-duplex"
_KEYS = {
    "serving.kserve.io": (
        "deploymentMode autoscalerClass stop storageSecretName storage-initializer-uid enable-prometheus-scraping "
        "enable-metric-aggregation enable-tag-routing"
    ),
    "storage.kserve.io": "readonly",
    "serving.knative.dev": "progress-deadline rollout-duration",
    "networking.knative.dev": "visibility",
    "features.knative.dev": "http-full-duplex",
    "autoscaling.knative.dev": (
        "class metric target min-scale max-scale window initial-scale activation-scale scale-down-delay "
        "scale-to-zero-pod-retention-period target-utilization-percentage target-burst-capacity "
        "panic-window-percentage panic-threshold-percentage"
    ),
}
ANNOTATIONS = tuple(f"{group}/{name}" for group, names in _KEYS.items() for name in names.split())
"""Annotations of KServe and Knative, to find misspelled ones."""
SIMILAR = 0.9
"""Minimum similarity of a key that is taken for a misspelled one."""
AUTOSCALING = "autoscaling.knative.dev/"
DURATIONS = {
    "window": (6, 3600),
    "scale-down-delay": (0, 3600),
    "scale-to-zero-pod-retention-period": (0, 3600),
}
"""Duration annotations with their bounds in seconds."""
INTEGERS = {"initial-scale": (0, None), "target-utilization-percentage": (1, 100), "activation-scale": (2, None)}


def flags(deployment: Deployment) -> set[str]:
    """Return the feature flags that the deployment requires."""
    if not deployment.is_knative:
        return set()
    pod = deployment.predictor_pod.spec
    needed = {flag for field, flag in FLAGS.items() if pod.get(field)}
    for volume in pod.get("volumes", []):
        needed |= {flag for source, flag in VOLUME_FLAGS.items() if source in volume}
        if claim := volume.get("persistentVolumeClaim"):
            needed |= {CLAIM} if claim.get("readOnly") else {CLAIM, CLAIM_WRITE}
    for uri in deployment.predictor.get("storageUris") or []:
        needed |= {CLAIM, CLAIM_WRITE} if uri.get("uri", "").startswith("pvc://") else {FLAGS["initContainers"]}
    sources = [
        variable.get("valueFrom", {}) for c in deployment.predictor_pod.containers for variable in c.get("env", [])
    ]
    if any({"fieldRef", "resourceFieldRef"} & set(source) for source in sources):
        needed.add(FIELD_REFERENCE)
    return needed


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield fields that Knative rejects with any flags, and annotations without their effect."""
    for problem, remedy in _misplaced(deployment):
        yield Finding(deployment.where, problem, remedy, "kserve-llm", "warning")
    if not deployment.is_knative:
        return
    pod = deployment.predictor_pod
    annotations = deployment.annotations | (deployment.predictor.get("annotations") or {})
    if annotations.get(FULL_DUPLEX) not in ("Enabled", "enabled"):
        yield Finding(
            deployment.where,
            f"annotation {FULL_DUPLEX} is not Enabled, so Knative's proxies may cut streams under load",
            f"annotate it with {FULL_DUPLEX}: Enabled",
            "kserve-llm",
            "warning",
        )
    for problem, remedy, source in [*_pod(pod), *_containers(pod), *_annotations(deployment.annotations)]:
        yield Finding(deployment.where, problem, remedy, source)


def _misplaced(deployment: Deployment) -> Iterator[tuple[str, str]]:
    """Check the keys of annotations: those that are not known are ignored, or rejected only after apply."""
    for key in sorted({*deployment.annotations, *(deployment.predictor.get("annotations") or {})}):
        if _kebab_case(key) in ANNOTATIONS:
            continue
        [*close] = difflib.get_close_matches(key.lower(), ANNOTATIONS, n=1, cutoff=SIMILAR)
        if close:
            yield f"annotation {key} is unknown to KServe and Knative", f"use {close[0]}"
    initial = f"{AUTOSCALING}initial-scale"
    if initial in (deployment.predictor.get("annotations") or {}):
        yield f"annotation {initial} is in spec.predictor, where KServe ignores it", "move it to metadata"
    if deployment.annotations.get(initial) == "0":
        yield (
            f"annotation {initial} is 0, which KServe ignores unless Knative's config-autoscaler has "
            "allow-zero-initial-scale",
            "remove it, or let an administrator allow it",
        )
    if not deployment.is_knative:
        for key in sorted(deployment.annotations):
            if key.partition("/")[0].endswith("knative.dev"):
                yield f"annotation {key} has no effect in Standard mode", "remove it"


def _kebab_case(key: str) -> str:
    """Return a key of Knative as in its documentation: it also accepts `minScale` for `min-scale`."""
    group, _, name = key.partition("/")
    return f"{group}/{re.sub('([A-Z])', lambda m: f'-{m[0].lower()}', name)}" if "knative" in group else key


def _pod(pod: Pod) -> Problems:
    for field in FORBIDDEN_POD:
        if field in pod.spec:
            yield f"{field} is set, which Knative rejects", "remove it, or use Standard mode", "Knative's webhook"
    if pod.spec.get("automountServiceAccountToken") is True:
        yield "automountServiceAccountToken is true, which Knative rejects", "set it to false", "Knative's webhook"
    mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])}
    for volume in pod.spec.get("volumes", []):
        if volume["name"] not in mounted:
            yield (
                f"volume {volume['name']} is not mounted, which Knative rejects",
                "mount it or remove it",
                "Knative's webhook",
            )


def _containers(pod: Pod) -> Problems:
    ports = [port for container in pod.spec["containers"] for port in container.get("ports", [])]
    if len(ports) > 1:
        yield (
            f"{len(ports)} container ports are open, and Knative allows one",
            "keep the HTTP port",
            "Knative's webhook",
        )
    for port in ports:
        if port.get("name", "") not in ("", "http1", "h2c"):
            yield f"the port is named {port['name']!r}, which Knative rejects", "remove the name", "Knative's webhook"
    for container in pod.containers:
        for field in FORBIDDEN_CONTAINER:
            if field in container:
                yield (
                    f"container {container['name']} has {field}, which Knative rejects",
                    "remove it, or use Standard mode",
                    "Knative's webhook",
                )
        reserved = RESERVED if container["name"] == KSERVE_CONTAINER else RESERVED[1:]
        for variable in container.get("env", []):
            if variable["name"] in reserved:
                yield (
                    f"container {container['name']} sets {variable['name']}, which Knative reserves",
                    "use another name",
                    "Knative's webhook",
                )
        for mount in container.get("volumeMounts", []):
            if "subPathExpr" in mount:
                yield (
                    f"mount {mount['mountPath']} has subPathExpr, which Knative rejects",
                    "use subPath",
                    "Knative's webhook",
                )
        if container.get("securityContext", {}).get("capabilities", {}).get("add"):
            yield (
                f"container {container['name']} adds capabilities, which Knative rejects",
                "remove them",
                "Knative's webhook",
            )


def _annotations(annotations: Manifest) -> Problems:
    for key in ("min-scale", "max-scale"):
        if AUTOSCALING + key in annotations:
            yield f"annotation {key} is ignored by KServe", "set minReplicas and maxReplicas", "KServe's controller"
    for key, bounds in DURATIONS.items():
        if (value := annotations.get(AUTOSCALING + key)) is not None:
            yield from _duration(key, value, *bounds)
    if (value := annotations.get("serving.knative.dev/progress-deadline")) is not None:
        yield from _duration("progress-deadline", value, 0, None)
    for key, (least, most) in INTEGERS.items():
        value = annotations.get(AUTOSCALING + key)
        if value is not None and not (value.isdigit() and least <= int(value) <= (most or int(value))):
            yield (
                f"annotation {key} is {value!r}",
                f"use a whole number from {least}" + (f" to {most}" if most else ""),
                "Knative's webhook",
            )
    kind = annotations.get(AUTOSCALING + "class", "kpa.autoscaling.knative.dev")
    if kind not in ("kpa.autoscaling.knative.dev", "hpa.autoscaling.knative.dev"):
        yield f"annotation class is {kind!r}, which is not an autoscaler of Knative", "remove it", "Knative's webhook"


def _duration(key: str, value: Any, least: float, most: float | None) -> Problems:
    try:
        seconds = quantities.seconds(value)
    except ValueError:
        yield (
            f"annotation {key} is {value!r}, which is not a duration",
            "write it as 90s, 13m or 1h",
            "Knative's webhook",
        )
        return
    if seconds % 1 or seconds < least or (most is not None and seconds > most):
        yield (
            f"annotation {key} is {value}, which Knative rejects",
            f"use whole seconds, {least} or more" + (f" and {most} at most" if most is not None else ""),
            "Knative's webhook",
        )
