"""Check Pod Security `restricted`, read-only roots, network policies and the use of Secrets."""

import re
from collections.abc import Iterator

from preflight import quantities
from preflight.checks.references import pods_label
from preflight.deployment import KSERVE_CONTAINER, Deployment, Manifest, Pod, name_of
from preflight.findings import Finding, Problems

HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
VOLUMES = {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "projected", "downwardAPI", "csi", "ephemeral"}
"""Volume types that `restricted` allows."""
QUEUE_PROXY_PORT = 8012
"""Port of Knative's queue-proxy, in front of the predictor."""
HOST = ("hostNetwork", "hostPID", "hostIPC")


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield findings on pods, containers, the namespace, network policies and Secrets."""
    granted = {subject["name"] for binding in deployment.all("RoleBinding") for subject in binding.get("subjects", [])}
    if deployment.is_ray:
        # KubeRay grants it what the autoscaler needs.
        granted |= {str(deployment.ray_pods[0].spec.get("serviceAccountName"))}
    programs = {pod.where for pod in [*deployment.serving_pods, *deployment.jobs]}
    for pod in deployment.pods:
        for problem, remedy, source in _pod(pod, granted):
            yield Finding(pod.where, problem, remedy, source)
        for container in pod.containers:
            scratch = _scratch(container) if pod.where in programs else ()
            for problem, remedy, source in [*_container(pod, container), *scratch]:
                yield Finding(pod.where, f"container {container['name']} {problem}", remedy, source)
    for problem, remedy, source in [*_secrets(deployment), *_weights(deployment)]:
        yield Finding(deployment.where, problem, remedy, source)
    yield from _namespace(deployment)
    yield from _policies(deployment)


def _pod(pod: Pod, granted: set[str]) -> Problems:
    """Check a pod; only accounts in a RoleBinding need a token."""
    if pod.spec.get("automountServiceAccountToken") is not False and pod.spec.get("serviceAccountName") not in granted:
        yield "its pod mounts a service-account token", "set automountServiceAccountToken: false", "kserve-llm"
    for field in HOST:
        if pod.spec.get(field):
            yield f"{field} is set, which Pod Security restricted forbids", "remove it", "API server"
    for volume in pod.spec.get("volumes", []):
        for kind in set(volume) - {"name"} - VOLUMES:
            yield (
                f"volume {volume['name']} is a {kind}, which Pod Security restricted forbids",
                "use an emptyDir or the claim",
                "API server",
            )


def _container(pod: Pod, container: Manifest) -> Problems:
    """Check a container, whose security context overrides the pod's."""
    own = container.get("securityContext", {})
    context = pod.spec.get("securityContext", {}) | own
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
        yield "may run as root", "set runAsNonRoot: true and a runAsUser that is not 0", "API server"
    elif "runAsUser" not in context:
        yield "runs as the user of its image", "set runAsUser to the owner of the claim's files", "kserve-llm"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges", "set allowPrivilegeEscalation: false", "API server"
    if own.get("privileged"):
        yield "is privileged", "remove it", "API server"
    if "ALL" not in own.get("capabilities", {}).get("drop", []):
        yield "keeps capabilities", "drop ALL of them", "API server"
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "has no seccomp profile", "set seccompProfile: {type: RuntimeDefault}", "API server"
    if "readOnlyRootFilesystem" not in own:
        yield (
            "has a writable root",
            "set readOnlyRootFilesystem: true, or false with component pod-security",
            "kserve-llm",
        )


def _scratch(container: Manifest) -> Problems:
    """Check that home directories are on a volume if the root is read-only."""
    if not container.get("securityContext", {}).get("readOnlyRootFilesystem"):
        return
    mounts = [mount["mountPath"] for mount in container.get("volumeMounts", []) if not mount.get("readOnly")]
    variables = {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}
    for name in ("HOME", "HF_HOME"):
        path = variables.get(name, "")
        if not any(path == mount or path.startswith(f"{mount}/") for mount in mounts):
            yield (
                f"has a read-only root and {name} is {path or 'not set'!r}, which is not writable",
                "mount an emptyDir there, or add component pod-security",
                "kserve-llm",
            )


def _weights(deployment: Deployment) -> Problems:
    if deployment.annotations.get("storage.kserve.io/readonly") == "false":
        yield (
            "storage.kserve.io/readonly is false, so the predictor can change the weights",
            "remove the annotation, so that KServe mounts them read-only",
            "kserve-llm",
        )


def _secrets(deployment: Deployment) -> Problems:
    fetchers = [container["name"] for _, container in deployment.downloads]
    for container in [container for pod in deployment.serving_pods for container in pod.containers]:
        if container["name"] in fetchers and container["name"] != KSERVE_CONTAINER:
            continue
        settings = deployment.environment(container)
        names = {variable["name"] for variable in container.get("env", [])} | set(settings)
        for token in sorted(names & set(HUB_TOKENS)):
            yield (
                f"the predictor has the Hub's token ({token})",
                "remove it, and add component hf-token, which sets it on the Job only",
                "kserve-llm",
            )
        serves = deployment.is_ray or container["name"] == KSERVE_CONTAINER
        if serves and settings.get("HF_HUB_OFFLINE") != "1":
            yield (
                "the predictor can access the Hub",
                "set HF_HUB_OFFLINE=1, so that a missing file fails at once",
                "kserve-llm",
            )
    for config in deployment.all("ConfigMap"):
        for key, value in (config.get("data") or {}).items():
            if re.search(r"TOKEN$|PASSWORD|SECRET|API_KEY$", key) or value.startswith("hf_"):
                yield (
                    f"ConfigMap {config['metadata']['name']} contains {key}, which looks like a secret",
                    "move it to a Secret",
                    "kserve-llm",
                )
    for secret in deployment.all("Secret"):
        yield (
            f"Secret {secret['metadata']['name']} is part of the overlay",
            "create it separately, so that no file contains its value",
            "kserve-llm",
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
                "kserve-llm",
            )
        if "control-plane" in labels:
            yield Finding(
                where,
                "it has the label control-plane, so KServe's webhook ignores it and mounts no weights",
                "remove the label",
                "KServe's webhook",
            )


def _policies(deployment: Deployment) -> Iterator[Finding]:
    """Check that egress of the predictor's pod is limited, and allowed if it downloads or exports traces."""
    policies = deployment.all("NetworkPolicy")
    for policy in policies:
        if _selects(policy, deployment) and {} in policy["spec"].get("egress", []):
            yield Finding(
                name_of(policy),
                "it allows all egress of the predictor",
                "list the destinations, or remove egress",
                "kserve-llm",
            )
    yield from _ingress_ports(deployment)
    downloads = any(pod is deployment.predictor_pod for pod, _ in deployment.downloads)
    traces = deployment.settings.get("PREDICTOR_TRACING", "").lower() in quantities.TRUE_WORDS
    has_egress = any(policy["spec"].get("egress") and _selects(policy, deployment) for policy in policies)
    for policy in policies:
        spec = policy["spec"]
        if spec.get("podSelector") or "Egress" not in spec.get("policyTypes", []) or spec.get("egress"):
            continue
        if downloads:
            yield Finding(
                name_of(policy),
                "it denies egress of the predictor's pod, and an init container downloads the model",
                "download with the Job, or remove component network-policy",
                "kserve-llm",
            )
        if traces and not has_egress:
            yield Finding(
                name_of(policy),
                "it denies egress of the predictor's pod, and PREDICTOR_TRACING exports spans",
                "list component tracing after network-policy",
                "kserve-llm",
            )


def _ingress_ports(deployment: Deployment) -> Iterator[Finding]:
    """Check that the gateway reaches the predictor: through Knative's queue-proxy, Serve's proxy, or directly."""
    own = [port["containerPort"] for port in deployment.server.get("ports", [])]
    needed = QUEUE_PROXY_PORT if deployment.is_knative else (own or [None])[0]
    policies = [policy for policy in deployment.all("NetworkPolicy") if _selects(policy, deployment)]
    rules = [rule for policy in policies for rule in policy["spec"].get("ingress", [])]
    ports = [port.get("port") for rule in rules for port in rule.get("ports", [])]
    if rules and needed and needed not in ports and all(rule.get("ports") for rule in rules):
        yield Finding(
            name_of(policies[0]),
            f"it does not allow port {needed}, to which the gateway sends requests",
            f"add port {needed} to ingress, as manifests/network/predictor.yaml does",
            "kserve-llm",
        )


def _selects(policy: Manifest, deployment: Deployment) -> bool:
    """Return whether a policy selects the predictor's pods by the label with the service's name."""
    labels = policy["spec"].get("podSelector", {}).get("matchLabels", {})
    return bool(labels.get(pods_label(deployment)) == deployment.name)
