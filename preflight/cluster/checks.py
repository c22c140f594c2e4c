"""Compare the needs of an overlay with a cluster."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from preflight import gpus, quantities, ray
from preflight.checks import api_keys, knative, references, resources
from preflight.checks.schema import is_core
from preflight.cluster.client import Connection, PermissionDenied
from preflight.deployment import Deployment, Manifest, name_of
from preflight.findings import Finding, Source

OLDEST = {"Kubernetes": (1, 32), "KServe": (0, 20), "Knative": (1, 19)}
"""KServe v0.20, for which the manifests are written, and the oldest versions that its documentation supports."""
LOCAL = "kubernetes.io/no-provisioner"
"""Provisioner of storage classes with volumes of the `local` type."""
ONE_NODE_PROVISIONERS = {
    *("ebs.csi.aws.com", "kubernetes.io/aws-ebs", "pd.csi.storage.gke.io", "kubernetes.io/gce-pd"),
    *("disk.csi.azure.com", "kubernetes.io/azure-disk", "rancher.io/local-path", "k8s.io/minikube-hostpath"),
    *(LOCAL, "topolvm.io", "openebs.io/local"),
}
"""Provisioners without ReadWriteMany. A StorageClass does not list its access modes."""
OPERATORS: dict[str, Callable[[str | None, list[str]], bool]] = {
    "In": lambda value, values: value in values,
    "NotIn": lambda value, values: value not in values,
    "Exists": lambda value, _: value is not None,
    "DoesNotExist": lambda value, _: value is None,
    "Gt": lambda value, values: value is not None and int(value) > min(map(int, values)),
    "Lt": lambda value, values: value is not None and int(value) < max(map(int, values)),
}
"""Operators of a node affinity, on the value of a label (None without it) and the values of the expression."""
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def max_timeout_seconds(cluster: Connection) -> float:
    """Return the cluster's maximum of `timeout`."""
    settings = cluster.knative_config("config-defaults")
    return float(settings.get("max-revision-timeout-seconds", knative.MAX_TIMEOUT_SECONDS))


def check(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    """Yield missing prerequisites; objects that may not be read are warnings.

    Raises:
        CheckError: the cluster does not respond or rejects the credentials.
    """
    for subject, check_ in {
        "versions": _versions,
        "custom kinds": _kinds,
        "Knative feature flags": _flags,
        "the namespace": _namespace,
        "the storage class": _storage,
        "the type of the volume": _local_volume,
        "nodes": _nodes,
        "Secrets": _secrets,
        "the mode of the InferenceService": _mode,
    }.items():
        try:
            yield from check_(deployment, cluster)
        except PermissionDenied as error:
            remedy = str(error).rstrip(".")
            yield Finding(deployment.where, f"{subject} could not be checked", remedy, "kserve-llm", "warning")


def _versions(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    for name, version in cluster.versions().items():
        numbers = re.match(r"v?(\d+)\.(\d+)", version)
        skipped = name == "Knative" and not deployment.is_knative
        if numbers and not skipped and (int(numbers[1]), int(numbers[2])) < OLDEST[name]:
            yield Finding(
                deployment.where,
                f"the cluster has {name} {version}, and {'.'.join(map(str, OLDEST[name]))} or newer is required",
                "upgrade it, or test in a separate namespace first",
                "kserve-llm",
                "warning",
            )


def _kinds(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    served = {
        (f"{definition['spec']['group']}/{version['name']}", definition["spec"]["names"]["kind"])
        for definition in cluster.definitions
        for version in definition["spec"]["versions"]
        if version["served"]
    }
    for manifest in deployment.objects:
        version, kind = manifest["apiVersion"], manifest["kind"]
        if not is_core(version) and (version, kind) not in served:
            yield Finding(
                name_of(manifest),
                f"the cluster does not serve {version} {kind}",
                "install its operator, or remove the component",
                "API server",
            )
    if deployment.is_knative and ("serving.knative.dev/v1", "Service") not in served:
        yield Finding(
            deployment.where,
            "Knative Serving is not installed",
            "install it, or add component standard-mode",
            "KServe's controller",
        )


def _flags(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    flags = sorted(knative.flags(deployment))
    features = cluster.knative_config("config-features") if flags else {}
    for flag in flags:
        if features.get(flag, "disabled").lower() != "enabled":
            yield Finding(
                deployment.where,
                f"Knative's flag {flag} is not enabled, so the InferenceService is accepted and then fails",
                "apply manifests/cluster as an administrator, or add component standard-mode",
                "Knative's webhook",
            )


def _storage(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    provisioners, default = {}, None
    for storage_class in cluster.storage_classes():
        name = storage_class["metadata"]["name"]
        provisioners[name] = storage_class["provisioner"]
        if (storage_class["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true":
            default = name
    for claim in deployment.all("PersistentVolumeClaim"):
        name = claim["spec"].get("storageClassName", default)
        if name == "":
            continue  # A volume that an administrator has created.
        if name not in provisioners:
            yield Finding(
                name_of(claim),
                f"the cluster has no {f'storage class {name!r}' if name else 'default storage class'}",
                f"set storageClassName to one of {', '.join(sorted(provisioners)) or 'those that you install'}",
                "scheduler",
            )
        elif "ReadWriteMany" in claim["spec"]["accessModes"] and provisioners[name] in ONE_NODE_PROVISIONERS:
            yield Finding(
                name_of(claim),
                f"it is ReadWriteMany, and volumes of storage class {name} can be mounted by one node only",
                "set storageClassName to one for shared files, or add component local-storage",
                "kubelet",
            )


def _local_volume(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    """Check volumes of the `local` type, which have no provisioner, in Knative mode, which admits no `fsGroup`."""
    claim = (deployment.find("PersistentVolumeClaim", deployment.claim) or {}).get("spec", {})
    name = claim.get("storageClassName")
    classes = {item["metadata"]["name"]: item["provisioner"] for item in cluster.storage_classes()} if name else {}
    has_group = (deployment.predictor_pod.spec.get("securityContext") or {}).get("fsGroup") is not None
    if classes.get(name) == LOCAL and deployment.is_knative and not has_group:
        yield Finding(
            f"PersistentVolumeClaim/{deployment.claim}",
            f"its storage class {name} has local volumes; if the predictor mounts one first, the kubelet does not "
            "apply the Job's fsGroup, and the download has no permission",
            "chown the volume's directory as component local-storage shows",
            "kubelet",
            "warning",
        )


def _namespace(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    namespace = cluster.namespace(deployment.namespace)
    where = f"Namespace/{deployment.namespace}"
    if namespace is None:
        if not deployment.find("Namespace", deployment.namespace):
            yield Finding(where, "the cluster does not have it", "create it", "API server")
    elif namespace.metadata.deletion_timestamp is not None:
        yield Finding(
            where,
            "it is being deleted, and accepts no new objects until then",
            f"wait: kubectl wait --for=delete namespace/{deployment.namespace} --timeout=15m",
            "API server",
        )


def _nodes(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    """Check that a node accepts a replica, and that the nodes have room for those of a rollout."""
    for view in ray.applications(deployment) if deployment.is_ray else [deployment]:
        yield from _nodes_for(view, cluster.nodes())


def _nodes_for(deployment: Deployment, nodes: list[Any]) -> Iterator[Finding]:
    needed = {name: count for name, count in resources.requests(deployment.server).items() if count}
    for accepts, reason in _filters(deployment.predictor_pod.spec, needed):
        accepting = [node for node in nodes if accepts(node)]
        if not accepting:
            problem, remedy = reason(nodes)
            remedy += ", unless a node pool scales from zero"
            yield Finding(deployment.where, problem, remedy, "scheduler", "warning")
            return
        nodes = accepting
    if deployment.is_ray:
        return
    replicas, _ = resources.rollout_replicas(deployment)
    room = [min((int(_allocatable(node, name) / needed[name]) for name in needed), default=replicas) for node in nodes]
    if sum(room) < replicas:
        yield Finding(
            deployment.where,
            f"the old and the new replica run together during a rollout, and the nodes have room for {sum(room)}",
            "add a node, delete the InferenceService before a change, or in Standard mode set maxSurge: 0",
            "scheduler",
            "warning",
        )


Filter = tuple[Callable[[Any], bool], Callable[[list[Any]], tuple[str, str]]]
"""Whether a node accepts the pod; the problem and its remedy if none of the given nodes does."""


def _filters(pod: Manifest, needed: dict[str, float]) -> Iterator[Filter]:
    """Yield the scheduler's filters of nodes (the client's V1Node), in the order in which they are reported."""
    selector, tolerations = pod.get("nodeSelector") or {}, pod.get("tolerations") or []
    devices = [name for name in needed if name.startswith("nvidia.com/")]
    subject = f"node with {devices[0]}" if devices else "node"

    def offered(nodes: list[Any]) -> str:
        names = {key for node in nodes for key in node.status.allocatable or {} if key.startswith("nvidia.com/")}
        return f"nodes offer {', '.join(sorted(names)) or 'no NVIDIA GPU'}"

    def untolerated(nodes: list[Any]) -> str:
        return f"tolerate {', '.join(sorted({t.key for n in nodes for t in _untolerated_taints(n, tolerations)}))}"

    for name in devices:
        yield _room(name, needed[name], f"no node has {needed[name]:g} of {name}", offered)
    yield (
        lambda node: selector.items() <= (node.metadata.labels or {}).items(),
        lambda _: (f"no {subject} has the labels of nodeSelector", "patch it, or install GPU feature discovery"),
    )
    if terms := gpus.required_node_terms(pod):
        yield (
            lambda node: any(_matches(term, node.metadata.labels or {}) for term in terms),
            lambda _: (f"no {subject} matches the required nodeAffinity", "patch it to the labels of your nodes"),
        )
    yield (
        lambda node: not _untolerated_taints(node, tolerations),
        lambda nodes: (f"every {subject} has a taint that is not tolerated", untolerated(nodes)),
    )
    cpu, memory = needed.get("cpu", 0), needed.get("memory", 0)
    for name, count, text in (("cpu", cpu, f"{cpu:g} cpu"), ("memory", memory, f"{quantities.gib(memory)} of memory")):
        yield _room(name, count, f"no {subject} that accepts the pod has {text}", lambda _: "lower the request")


def _matches(term: Manifest, labels: dict[str, str]) -> bool:
    """Return whether a node's labels match all expressions of a term."""
    return all(
        OPERATORS[expression["operator"]](labels.get(expression["key"]), expression.get("values", []))
        for expression in term.get("matchExpressions", [])
    )


def _room(name: str, count: float, problem: str, remedy: Callable[[list[Any]], str]) -> Filter:
    return lambda node: _allocatable(node, name) >= count, lambda nodes: (problem, remedy(nodes))


def _allocatable(node: Any, name: str) -> float:
    return quantities.number((node.status.allocatable or {}).get(name, 0))


def _untolerated_taints(node: Any, tolerations: list[Manifest]) -> list[Any]:
    """Return the taints (the client's V1Taint) that keep a pod with these tolerations off a node."""
    return [
        taint
        for taint in node.spec.taints or []
        if taint.effect != "PreferNoSchedule" and not any(_tolerates(toleration, taint) for toleration in tolerations)
    ]


def _tolerates(toleration: Manifest, taint: Any) -> bool:
    return (
        toleration.get("effect") in (None, "", taint.effect)
        and toleration.get("key") in (None, "", taint.key)
        and (toleration.get("operator") == "Exists" or toleration.get("value", "") == (taint.value or ""))
    )


def _secrets(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    for secret in references.secrets(deployment):
        if secret.optional:
            continue
        keys = cluster.secret(secret.name, deployment.namespace)
        # An Ingress controller serves its own certificate instead, and reports nothing to the user.
        source: Source = "kserve-llm" if secret.where.startswith("Ingress/") else "kubelet"
        if keys is None:
            yield Finding(
                secret.where,
                f"it needs Secret {secret.name}, which is not in namespace {deployment.namespace}",
                f"create it with key {secret.key}" if secret.key else "create it as its component's README shows",
                source,
            )
        elif secret.key and secret.key not in keys:
            yield Finding(
                secret.where,
                f"it needs key {secret.key} of Secret {secret.name}, which has {', '.join(sorted(keys)) or 'no key'}",
                "add that key",
                source,
            )
    if (keys_file := api_keys.secret(deployment)) and (data := cluster.secret(keys_file[0], deployment.namespace)):
        yield from api_keys.check_lines(deployment, data)


def _mode(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    if deployment.is_ray:
        return
    service = cluster.service(deployment.name, deployment.namespace) or {}
    current = service.get("status", {}).get("deploymentMode")
    new = deployment.annotations.get("serving.kserve.io/deploymentMode")
    if current and new and current != new:
        yield Finding(
            deployment.where,
            f"it runs in {current} mode, which cannot be changed to {new}",
            "delete it first, or use a new name",
            "KServe's webhook",
        )
