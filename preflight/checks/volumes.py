"""Check volumes: access modes and size of the claim, permissions on it, and scratch volumes in memory."""

from collections.abc import Iterator

from preflight import quantities
from preflight.checks.resources import Model
from preflight.deployment import KSERVE_CONTAINER, MODELS, Deployment, Manifest, Pod, name_of
from preflight.findings import Finding, Problems

ACCESS_MODES = ("ReadWriteMany", "ReadWriteOnce", "ReadOnlyMany", "ReadWriteOncePod")
MEBIBYTE = 2**20


def check(deployment: Deployment, model: Model | None) -> Iterator[Finding]:
    """Yield claims that cannot be mounted or written as the pods require, and scratch volumes larger than their limit.

    Args:
        deployment: the rendered overlay.
        model: the model's dimensions; without them, the claim's size is only checked for a missing unit.
    """
    for claim in deployment.all("PersistentVolumeClaim"):
        filled = any(claim["metadata"]["name"] in pod.claims for pod in deployment.jobs)
        for problem, remedy, source in _claim(claim["spec"], filled):
            yield Finding(name_of(claim), problem, remedy, source)
    yield from _nodes(deployment)
    if model is not None:
        yield from _size(deployment, model)
    yield from _owner(deployment)
    for pod in deployment.pods:
        yield from _writable_claims(deployment, pod)
        yield from _scratch(pod)
    if not deployment.is_ray:
        yield from _hidden(deployment)


def _claim(spec: Manifest, filled: bool) -> Problems:
    """Check a claim; `filled` is whether a Job writes to it."""
    for mode in spec.get("accessModes") or []:
        if mode not in ACCESS_MODES:
            yield f"it has access mode {mode!r}", f"use {', '.join(ACCESS_MODES[:3])}", "API server"
    if filled and "ReadWriteOncePod" in (spec.get("accessModes") or []):
        yield (
            "it is ReadWriteOncePod, so the Job and the predictor that waits for it cannot both mount it",
            "use ReadWriteMany, or component local-storage",
            "scheduler",
        )
    if spec.get("volumeMode", "Filesystem") != "Filesystem":
        yield f"its volumeMode is {spec['volumeMode']}, and snapshots are files", "remove volumeMode", "kubelet"
    storage = spec.get("resources", {}).get("requests", {}).get("storage")
    if storage is None:
        yield "it requests no storage", "set resources.requests.storage", "API server"
    elif quantities.number(storage) < MEBIBYTE:
        yield f"it requests {storage} bytes of storage", f"add the unit, as in {storage}Gi", "kserve-llm"


def _nodes(deployment: Deployment) -> Iterator[Finding]:
    replicas = deployment.predictor.get("maxReplicas", 0)
    for name in sorted(filter(None, {deployment.claim, *deployment.predictor_pod.claims})):
        modes = access_modes(deployment, name)
        if modes and not {"ReadWriteMany", "ReadOnlyMany"} & modes and modes <= set(ACCESS_MODES) and replicas != 1:
            yield Finding(
                f"PersistentVolumeClaim/{name}",
                f"it is {' and '.join(sorted(modes))}, which one node can mount, and maxReplicas is "
                f"{replicas or 'unlimited'}",
                "use ReadWriteMany, or component local-storage with one replica",
                "kubelet",
            )


def _size(deployment: Deployment, model: Model) -> Iterator[Finding]:
    claim = deployment.find("PersistentVolumeClaim", deployment.claim) or {}
    storage = quantities.number(claim.get("spec", {}).get("resources", {}).get("requests", {}).get("storage", 0))
    needed = model.weight_bytes("none", "auto")
    if MEBIBYTE <= storage < needed:
        yield Finding(
            f"PersistentVolumeClaim/{deployment.claim}",
            f"it requests {quantities.gib(storage)}, and the checkpoint has {quantities.gib(needed)}",
            "request twice the checkpoint's size, so that the next one can be downloaded too",
            "kserve-llm",
        )


def _owner(deployment: Deployment) -> Iterator[Finding]:
    """Check `fsGroup`: the kubelet applies that of the first pod that mounts a volume on a node."""
    groups = {_fs_group(pod) for pod in deployment.jobs if deployment.claim in pod.claims} - {None}
    own = _fs_group(deployment.predictor_pod)
    local = any({"local", "hostPath"} & set(volume["spec"]) for volume in deployment.all("PersistentVolume"))
    if not groups or own in groups or (deployment.is_knative and own is None and not local):
        return
    [group, *_] = sorted(groups, key=str)
    yield Finding(
        deployment.where,
        f"the predictor's pod has {'no fsGroup' if own is None else f'fsGroup {own}'} and the Job's has {group}; on a "
        "volume that the predictor mounts first, the Job's is not applied and its download has no permission",
        "chown the volume's directory as component local-storage shows"
        if deployment.is_knative
        else f"set spec.predictor.securityContext.fsGroup: {group}, as component standard-mode does",
        "kubelet",
        "warning",
    )


def _fs_group(pod: Pod) -> int | None:
    group: int | None = (pod.spec.get("securityContext") or {}).get("fsGroup")
    return group


def _writable_claims(deployment: Deployment, pod: Pod) -> Iterator[Finding]:
    """Check that a claim can be written by the containers that mount it writable, and by the download in any case."""
    downloads = [container["name"] for _, container in deployment.downloads]
    sources = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod.spec.get("volumes", [])}
    for container in pod.containers:
        for mount in container.get("volumeMounts", []):
            claim = sources.get(mount["name"])
            if claim is None:
                continue
            read_only = mount.get("readOnly") or claim.get("readOnly")
            if read_only and container["name"] in downloads:
                yield Finding(
                    pod.where,
                    f"container {container['name']} mounts claim {claim['claimName']} read-only and downloads to it",
                    "remove readOnly",
                    "kserve-llm",
                )
            if not read_only and access_modes(deployment, claim["claimName"]) == {"ReadOnlyMany"}:
                yield Finding(
                    f"PersistentVolumeClaim/{claim['claimName']}",
                    f"it is ReadOnlyMany, and {pod.where} writes to it",
                    "use ReadWriteMany",
                    "kubelet",
                )


def _scratch(pod: Pod) -> Iterator[Finding]:
    """Check emptyDirs against the limits of the containers that mount them."""
    volumes = {
        volume["name"]: volume["emptyDir"] or {} for volume in pod.spec.get("volumes", []) if "emptyDir" in volume
    }
    for container in pod.containers:
        limits = container.get("resources", {}).get("limits") or {}
        for mount in container.get("volumeMounts", []):
            volume = volumes.get(mount["name"], {})
            resource = "memory" if volume.get("medium") == "Memory" else "ephemeral-storage"
            if "sizeLimit" not in volume or resource not in limits:
                continue
            if quantities.number(volume["sizeLimit"]) > quantities.number(limits[resource]):
                yield Finding(
                    pod.where,
                    f"volume {mount['name']} may hold {volume['sizeLimit']}, more than the {resource} limit "
                    f"{limits[resource]} of container {container['name']}, to which it counts",
                    f"lower sizeLimit, or raise the limit of {resource}",
                    "kubelet",
                )


def _hidden(deployment: Deployment) -> Iterator[Finding]:
    """Check that no other volume is mounted where KServe mounts the claim."""
    for mount in deployment.server.get("volumeMounts", []) if deployment.claim else []:
        if mount["mountPath"].rstrip("/") == MODELS:
            yield Finding(
                deployment.where,
                f"container {KSERVE_CONTAINER} mounts volume {mount['name']} at {MODELS}, the path of storageUri",
                "use another path",
                "API server",
            )


def access_modes(deployment: Deployment, claim: str) -> set[str]:
    """Return the access modes of a claim; none if the overlay does not have it."""
    manifest = deployment.find("PersistentVolumeClaim", claim) or {}
    return set(manifest.get("spec", {}).get("accessModes", []))
