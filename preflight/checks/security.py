"""Pod Security `restricted`, a read-only root, and secrets only where they are needed."""

import re
from collections.abc import Iterator

from preflight.deployment import KSERVE_CONTAINER, Deployment, Manifest, Pod, name_of
from preflight.findings import Clauses, Finding

HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
VOLUMES = {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "projected", "downwardAPI", "csi", "ephemeral"}
"""The volume types that `restricted` allows."""
TRUE = {"1", "on", "t", "true", "y", "yes"}
"""What the predictor takes for true."""
HOST = ("hostNetwork", "hostPID", "hostIPC")


def check(deployment: Deployment) -> Iterator[Finding]:
    """Every pod and its containers, the namespace, and where secrets go."""
    granted = {each["name"] for binding in deployment.all("RoleBinding") for each in binding.get("subjects", [])}
    programs = {deployment.where, *(pod.where for pod in deployment.jobs)}
    for pod in deployment.pods:
        for problem, remedy in _pod(pod, granted):
            yield Finding(pod.where, problem, remedy)
        for container in pod.containers:
            scratch = _scratch(container) if pod.where in programs else ()
            for problem, remedy in [*_container(pod, container), *scratch]:
                yield Finding(pod.where, f"container {container['name']} {problem}", remedy)
    for problem, remedy in [*_secrets(deployment), *_weights(deployment)]:
        yield Finding(deployment.where, problem, remedy)
    yield from _namespace(deployment)
    yield from _policies(deployment)


def _pod(pod: Pod, granted: set[str]) -> Clauses:
    """A token is for accounts that a RoleBinding grants something."""
    if pod.spec.get("automountServiceAccountToken") is not False and pod.spec.get("serviceAccountName") not in granted:
        yield "its pod gets a service-account token", "set automountServiceAccountToken: false"
    for field in HOST:
        if pod.spec.get(field):
            yield f"{field} is set, which Pod Security restricted forbids", "remove it"
    for volume in pod.spec.get("volumes", []):
        for kind in set(volume) - {"name"} - VOLUMES:
            yield (
                f"volume {volume['name']} is a {kind}, which Pod Security restricted forbids",
                "use an emptyDir or the claim",
            )


def _container(pod: Pod, container: Manifest) -> Clauses:
    """A container's own security context beats the pod's."""
    own = container.get("securityContext", {})
    context = pod.spec.get("securityContext", {}) | own
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
        yield "may run as root", "set runAsNonRoot: true and a runAsUser that is not 0"
    elif "runAsUser" not in context:
        yield "runs as whatever user its image names", "set runAsUser, which must own what is on the claim"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges", "set allowPrivilegeEscalation: false"
    if own.get("privileged"):
        yield "is privileged", "remove it"
    if "ALL" not in own.get("capabilities", {}).get("drop", []):
        yield "keeps capabilities", "drop ALL of them"
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "has no seccomp profile", "set seccompProfile: {type: RuntimeDefault}"
    if "readOnlyRootFilesystem" not in own:
        yield "has a writable root", "set readOnlyRootFilesystem: true; component pod-security says false on purpose"


def _scratch(container: Manifest) -> Clauses:
    """With a read-only root, what a library writes to its home must land on a volume."""
    if not container.get("securityContext", {}).get("readOnlyRootFilesystem"):
        return
    mounts = [mount["mountPath"] for mount in container.get("volumeMounts", []) if not mount.get("readOnly")]
    variables = {each["name"]: each.get("value", "") for each in container.get("env", [])}
    for name in ("HOME", "HF_HOME"):
        path = variables.get(name, "")
        if not any(path == mount or path.startswith(f"{mount}/") for mount in mounts):
            yield (
                f"has a read-only root and {name} is {path or 'not set'!r}, which it cannot write to",
                "mount an emptyDir there, or add component pod-security",
            )


def _weights(deployment: Deployment) -> Clauses:
    if deployment.annotations.get("storage.kserve.io/readonly") == "false":
        yield (
            "storage.kserve.io/readonly is false, so whoever serves the weights may change them",
            "remove the annotation: KServe then mounts them read-only",
        )


def _secrets(deployment: Deployment) -> Clauses:
    fetchers = [container["name"] for _, container in deployment.downloads]
    for container in deployment.predictor_pod.containers:
        if container["name"] in fetchers and container["name"] != KSERVE_CONTAINER:
            continue
        settings = deployment.environment(container)
        named = {variable["name"] for variable in container.get("env", [])} | set(settings)
        for token in sorted(named & set(HUB_TOKENS)):
            yield (
                f"the predictor is given the Hub's token ({token})",
                "leave it to component hf-token, which gives it to the Job",
            )
        if container["name"] == KSERVE_CONTAINER and settings.get("HF_HUB_OFFLINE") != "1":
            yield "the predictor may ask the Hub", "set HF_HUB_OFFLINE=1: what is not on the volume must fail at once"
    for config in deployment.all("ConfigMap"):
        for key, value in (config.get("data") or {}).items():
            if re.search(r"TOKEN$|PASSWORD|SECRET|API_KEY$", key) or value.startswith("hf_"):
                yield (
                    f"ConfigMap {config['metadata']['name']} holds {key}, which looks like a secret",
                    "put it into a Secret",
                )
    for secret in deployment.all("Secret"):
        yield (
            f"Secret {secret['metadata']['name']} is part of the overlay",
            "create it apart, so that its value is in no file",
        )


def _namespace(deployment: Deployment) -> Iterator[Finding]:
    for namespace in deployment.all("Namespace"):
        labels = namespace["metadata"].get("labels", {})
        where = f"Namespace/{namespace['metadata']['name']}"
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield Finding(
                where,
                "it does not enforce Pod Security restricted",
                "label it pod-security.kubernetes.io/enforce: restricted",
            )
        if "control-plane" in labels:
            yield Finding(
                where,
                "it has the label control-plane, so KServe's webhook passes it over and mounts no weights",
                "remove the label",
            )


def _policies(deployment: Deployment) -> Iterator[Finding]:
    """A default deny leaves the predictor's pod no way out, which is right unless it downloads or tells of requests."""
    policies = deployment.all("NetworkPolicy")
    for policy in policies:
        if _selects(policy, deployment) and {} in policy["spec"].get("egress", []):
            yield Finding(name_of(policy), "it lets the predictor out to everybody", "name whom it may ask, or nobody")
    downloads = any(pod is deployment.predictor_pod for pod, _ in deployment.downloads)
    traces = deployment.settings.get("PREDICTOR_TRACING", "").lower() in TRUE
    let_out = any(each["spec"].get("egress") and _selects(each, deployment) for each in policies)
    for policy in policies:
        spec = policy["spec"]
        if spec.get("podSelector") or "Egress" not in spec.get("policyTypes", []) or spec.get("egress"):
            continue
        if downloads:
            yield Finding(
                name_of(policy),
                "it lets the predictor's pod out to nobody, and an init container of it downloads the model",
                "leave the download to the Job, or remove component network-policy",
            )
        if traces and not let_out:
            yield Finding(
                name_of(policy),
                "it lets the predictor's pod out to nobody, and PREDICTOR_TRACING has spans for a collector",
                "list component tracing after network-policy",
            )


def _selects(policy: Manifest, deployment: Deployment) -> bool:
    """Whether a policy is about the predictor's pods by KServe's label."""
    labels = policy["spec"].get("podSelector", {}).get("matchLabels", {})
    return bool(labels.get("serving.kserve.io/inferenceservice") == deployment.name)
