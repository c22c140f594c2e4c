"""What a cluster has, against what an overlay needs."""

import re
from collections.abc import Iterator
from typing import Any

from preflight import quantities
from preflight.checks import knative, references
from preflight.checks.schema import is_core
from preflight.cluster.client import Connection, MayNotRead
from preflight.deployment import Deployment, Manifest, name_of
from preflight.findings import Finding

OLDEST = {"Kubernetes": (1, 32), "KServe": (0, 20), "Knative": (1, 19)}
"""What the manifests were written against: KServe v0.20, and the oldest of the others that its documents name."""
ONE_NODE_PROVISIONERS = {
    *("ebs.csi.aws.com", "kubernetes.io/aws-ebs", "pd.csi.storage.gke.io", "kubernetes.io/gce-pd"),
    *("disk.csi.azure.com", "kubernetes.io/azure-disk", "rancher.io/local-path", "k8s.io/minikube-hostpath"),
    *("kubernetes.io/no-provisioner", "topolvm.io", "openebs.io/local"),
}
"""Provisioners whose volumes one node can mount. A StorageClass does not say which access modes it can do."""
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def max_timeout_seconds(cluster: Connection) -> float:
    """The cluster's cap on `timeout`."""
    settings = cluster.knative_config("config-defaults")
    return float(settings.get("max-revision-timeout-seconds", knative.MAX_TIMEOUT_SECONDS))


def check(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    """What the cluster lacks; what may not be read is a warning.

    Raises:
        CannotLook: the cluster does not answer, or does not know who asks.
    """
    for what, check_ in {
        "versions": _versions,
        "custom kinds": _kinds,
        "Knative's feature flags": _flags,
        "the storage class": _storage,
        "the nodes' GPUs": _gpus,
        "Secrets": _secrets,
        "the mode of the InferenceService": _mode,
    }.items():
        try:
            yield from check_(deployment, cluster)
        except MayNotRead as error:
            yield Finding(deployment.where, f"{what} could not be checked", str(error).rstrip("."), "warning")


def _versions(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    for name, version in cluster.versions().items():
        numbers = re.match(r"v?(\d+)\.(\d+)", version)
        skipped = name == "Knative" and not deployment.is_knative
        if numbers and not skipped and (int(numbers[1]), int(numbers[2])) < OLDEST[name]:
            yield Finding(
                deployment.where,
                f"the cluster has {name} {version}, and this wants {'.'.join(map(str, OLDEST[name]))} or newer",
                "upgrade it, or try this first in a namespace of its own",
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
                f"the cluster has no {version} {kind}",
                "install what it belongs to, or remove its component",
            )
    if deployment.is_knative and ("serving.knative.dev/v1", "Service") not in served:
        yield Finding(
            deployment.where, "the cluster has no Knative Serving", "install it, or add component standard-mode"
        )


def _flags(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    needed = sorted(knative.flags(deployment))
    features = cluster.knative_config("config-features") if needed else {}
    for flag in needed:
        if features.get(flag, "disabled").lower() != "enabled":
            yield Finding(
                deployment.where,
                f"Knative's flag {flag} is not enabled, so the InferenceService is accepted and then fails",
                "have an administrator apply manifests/cluster, or add component standard-mode",
            )


def _storage(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    provisioners, default = {}, None
    for each in cluster.storage_classes():
        name = each["metadata"]["name"]
        provisioners[name] = each["provisioner"]
        if (each["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true":
            default = name
    for claim in deployment.all("PersistentVolumeClaim"):
        name = claim["spec"].get("storageClassName", default)
        if name not in provisioners:
            yield Finding(
                name_of(claim),
                f"the cluster has no {f'storage class {name!r}' if name else 'default storage class'}",
                f"set storageClassName to one of {', '.join(sorted(provisioners)) or 'those you install'}",
            )
        elif "ReadWriteMany" in claim["spec"]["accessModes"] and provisioners[name] in ONE_NODE_PROVISIONERS:
            yield Finding(
                name_of(claim),
                f"it is ReadWriteMany, and volumes of storage class {name} can be mounted by one node",
                "set storageClassName to one for shared files, or add component local-storage",
            )


def _gpus(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    limits = deployment.server.get("resources", {}).get("limits", {})
    wanted = {name: quantities.number(count) for name, count in limits.items() if name.startswith("nvidia.com/")}
    nodes = cluster.nodes() if wanted else []
    for name, count in wanted.items():
        if clauses := _no_node(deployment.predictor_pod.spec, name, count, nodes):
            problem, remedy = clauses
            yield Finding(deployment.where, problem, f"{remedy}, unless a pool grows from zero", "warning")


def _no_node(pod: Manifest, name: str, count: float, nodes: list[Any]) -> tuple[str, str] | None:
    """Why no node takes the pod, and what to do; None where one does."""
    selector, tolerations = pod.get("nodeSelector") or {}, pod.get("tolerations") or []
    offered = {each for node in nodes for each in node.status.allocatable or {} if each.startswith("nvidia.com/")}
    have = [node for node in nodes if quantities.number((node.status.allocatable or {}).get(name, 0)) >= count]
    if not have:
        return f"no node has {count:g} of {name}", f"nodes offer {', '.join(sorted(offered)) or 'no NVIDIA GPU'}"
    chosen = [node for node in have if selector.items() <= (node.metadata.labels or {}).items()]
    if not chosen:
        return f"no node with {name} has the labels of nodeSelector", "patch it, or install GPU feature discovery"
    repelling = [[taint for taint in node.spec.taints or [] if _repels(taint, tolerations)] for node in chosen]
    if all(repelling):
        keys = sorted({taint.key for taints in repelling for taint in taints})
        return f"every node with {name} has a taint that is not tolerated", f"tolerate {', '.join(keys)}"
    return None


def _repels(taint: Any, tolerations: list[Manifest]) -> bool:
    """Whether a taint (the client's V1Taint) keeps away a pod with these tolerations."""
    for toleration in tolerations:
        same_effect = toleration.get("effect") in (None, "", taint.effect)
        same_key = toleration.get("key") in (None, "", taint.key)
        same_value = toleration.get("operator") == "Exists" or toleration.get("value", "") == (taint.value or "")
        if same_effect and same_key and same_value:
            return False
    return bool(taint.effect != "PreferNoSchedule")


def _secrets(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    for secret in references.secrets(deployment):
        if secret.optional:
            continue
        keys = cluster.secret_keys(secret.name, deployment.namespace)
        if keys is None:
            yield Finding(
                deployment.where,
                f"Secret {secret.name} is not in namespace {deployment.namespace}",
                f"create it with key {secret.key}" if secret.key else "create it, as its component's README shows",
            )
        elif secret.key and secret.key not in keys:
            yield Finding(
                deployment.where,
                f"Secret {secret.name} has {', '.join(sorted(keys)) or 'no key'} and not {secret.key}",
                "add that key",
            )


def _mode(deployment: Deployment, cluster: Connection) -> Iterator[Finding]:
    there = cluster.service(deployment.name, deployment.namespace) or {}
    mode = there.get("status", {}).get("deploymentMode")
    said = deployment.annotations.get("serving.kserve.io/deploymentMode")
    if mode and said and mode != said:
        yield Finding(
            deployment.where,
            f"it runs in {mode} mode, and that cannot be changed to {said}",
            "delete it first, or use a new name",
        )
