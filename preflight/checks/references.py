"""Check references between objects, and list the Secrets that must exist."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from preflight.checks.containers import ports
from preflight.deployment import SERVICES, Deployment, Manifest, Pod, name_of
from preflight.findings import Finding, Source

PODS_OF = "serving.kserve.io/inferenceservice"
"""Label that KServe sets on the pods of an InferenceService."""
RAY_PODS_OF = "kserve-llm/rayservice"
"""Label that a RayService's templates set on its pods."""
_SOURCES: dict[str, Source] = {
    "PersistentVolumeClaim": "scheduler",
    "ConfigMap": "kubelet",
    "ServiceAccount": "API server",
}
"""What reports a missing object of a kind; nothing reports that of an Ingress or a RoleBinding."""
SYSTEM_NAMESPACES = ("kserve", "knative-serving", "istio-system", "kourier-system", "cert-manager")
SAME_NAMESPACE = ("PersistentVolumeClaim", "ServiceAccount", "ServingRuntime", "ConfigMap", "Secret", "Job")
"""Kinds that pods can use only in their own namespace."""
_MODEL_NAME = re.compile(r'model_name="([^"]*)"')


@dataclass(frozen=True, slots=True, order=True)
class SecretKey:
    """A referenced Secret, which overlays deliberately do not contain."""

    where: str
    """The object that refers to it."""
    name: str
    key: str | None
    """None if the whole Secret is used."""
    optional: bool = False


def secrets(deployment: Deployment) -> list[SecretKey]:
    """Return the required and optional Secrets of the namespace, once for each object that refers to them."""
    keys = {key for pod in deployment.pods for key in _of_containers(pod)}
    for pod in deployment.pods:
        keys |= _pull_secrets(pod.where, pod.spec)
        for volume in pod.spec.get("volumes", []):
            if source := volume.get("secret"):
                items = source.get("items") or [{"key": None}]
                optional = source.get("optional", False)
                keys |= {SecretKey(pod.where, source["secretName"], item["key"], optional) for item in items}
    for account in deployment.all("ServiceAccount"):
        keys |= _pull_secrets(name_of(account), account)
    for ingress in deployment.all("Ingress"):
        for tls in ingress["spec"].get("tls", []):
            if "secretName" in tls:
                keys.add(SecretKey(name_of(ingress), tls["secretName"], "tls.crt"))
    return sorted(keys, key=lambda key: (key.name, key.key or "", key.where))


def _of_containers(pod: Pod) -> Iterator[SecretKey]:
    for container in pod.containers:
        for variable in container.get("env", []):
            if source := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield SecretKey(pod.where, source["name"], source["key"], source.get("optional", False))
        for entry in container.get("envFrom", []):
            if source := entry.get("secretRef"):
                yield SecretKey(pod.where, source["name"], None, source.get("optional", False))


def _pull_secrets(where: str, manifest: Manifest) -> set[SecretKey]:
    """Return pull secrets. They are optional: without them, the kubelet logs a warning and pulls anonymously."""
    names = [entry["name"] for entry in manifest.get("imagePullSecrets", [])]
    return {SecretKey(where, name, ".dockerconfigjson", optional=True) for name in names}


def pods_label(deployment: Deployment) -> str:
    """Return the label of the predictor's pods whose value is the name of the service."""
    return RAY_PODS_OF if deployment.is_ray else PODS_OF


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield references without a target."""
    stale = list(_stale_names(deployment))
    if stale:
        yield _renamed(deployment, stale)
    yield from _claim(deployment, {old for _, old, _ in stale})
    for pod in deployment.pods:
        yield from _of_pod(deployment, pod)
    yield from _backends(deployment, {old for _, old, _ in stale})
    yield from _queries(deployment)
    yield from _selectors(deployment)
    yield from _pools(deployment)
    yield from _services(deployment)
    yield from _roles(deployment)
    yield from _namespaces(deployment)


def runtime(deployment: Deployment) -> Iterator[Finding]:
    """Yield a missing ServingRuntime, without which the predictor's pod is not known."""
    name = deployment.model.get("runtime")
    if deployment.model and deployment.runtime is None:
        yield Finding(
            deployment.where,
            f"ServingRuntime {name!r} is not in this overlay" if name else "spec.predictor.model has no runtime",
            "set model.runtime to the ServingRuntime of this overlay; further checks need it",
            "KServe's controller",
        )


def _stale_names(deployment: Deployment) -> Iterator[tuple[str, str, str]]:
    """Yield names that namePrefix or nameSuffix has changed and kustomize has not updated: object, old and new name."""
    claims = [manifest["metadata"]["name"] for manifest in deployment.all("PersistentVolumeClaim")]
    if deployment.claim and deployment.claim not in claims:
        for name in claims:
            if _is_renamed(deployment, deployment.claim, name):
                yield "storageUri", deployment.claim, name
    for ingress, backend, _ in _ingress_backends(deployment):
        name = str(backend).removesuffix("-predictor")
        if not deployment.find("Service", backend) and _is_renamed(deployment, name, deployment.name):
            yield name_of(ingress), str(backend), f"{deployment.name}-predictor"


def _is_renamed(deployment: Deployment, old: str, new: str) -> bool:
    """Return whether what differs is a prefix and a suffix that all objects share, and not a misspelled name."""
    prefix, found, suffix = new.partition(old)
    kinds = (*SERVICES, "PersistentVolumeClaim", "ServingRuntime")
    names = [str(manifest["metadata"]["name"]) for kind in kinds for manifest in deployment.all(kind)]
    return bool(found and prefix + suffix) and all(n.startswith(prefix) and n.endswith(suffix) for n in names)


def _renamed(deployment: Deployment, stale: list[tuple[str, str, str]]) -> Finding:
    names = ", ".join(f"{old} to {new}, but not in {where}" for where, old, new in stale)
    return Finding(
        deployment.where,
        f"namePrefix or nameSuffix renamed {names}",
        "add `transformers: [../../renaming]`, which is kustomize/renaming, to the kustomization that renames",
        "kserve-llm",
    )


def _claim(deployment: Deployment, stale: set[str]) -> Iterator[Finding]:
    uri = deployment.model.get("storageUri", "")
    if deployment.claim is not None and not deployment.find("PersistentVolumeClaim", deployment.claim):
        if deployment.claim not in stale:
            yield _missing(deployment.where, "PersistentVolumeClaim", deployment.claim)
    elif deployment.claim or (uri.startswith("hf://") and "storageContainerName" not in deployment.predictor):
        filled = [claim for pod, _ in deployment.downloads for claim in pod.claims]
        if filled and deployment.claim not in filled:
            yield Finding(
                deployment.where,
                f"storageUri is {uri!r}, and the model is downloaded to {' and '.join(filled)}",
                f"set storageUri: pvc://{filled[0]}",
                "kserve-llm",
            )


def _of_pod(deployment: Deployment, pod: Pod) -> Iterator[Finding]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for volume in volumes.values():
        source = volume.get("configMap", {})
        if source and not source.get("optional") and not deployment.find("ConfigMap", source["name"]):
            yield _missing(pod.where, "ConfigMap", source["name"])
    for claim in pod.claims:
        if not deployment.find("PersistentVolumeClaim", claim):
            yield _missing(pod.where, "PersistentVolumeClaim", claim)
    account = pod.spec.get("serviceAccountName")
    if account and not deployment.find("ServiceAccount", account):
        yield _missing(pod.where, "ServiceAccount", account)
    for container in pod.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield Finding(
                    pod.where,
                    f"container {container['name']} mounts volume {mount['name']!r}, which the pod does not have",
                    "correct the name or add the volume",
                    "API server",
                )
        yield from _config_maps(deployment, pod, container)


def _config_maps(deployment: Deployment, pod: Pod, container: Manifest) -> Iterator[Finding]:
    for entry in container.get("envFrom", []):
        source = entry.get("configMapRef")
        if source and not source.get("optional") and not deployment.find("ConfigMap", source["name"]):
            yield _missing(pod.where, "ConfigMap", source["name"])
    for variable in container.get("env", []):
        source = variable.get("valueFrom", {}).get("configMapKeyRef")
        if source is None or source.get("optional"):
            continue
        config = deployment.find("ConfigMap", source["name"])
        if config is None:
            yield _missing(pod.where, "ConfigMap", source["name"])
        elif source["key"] not in config.get("data", {}):
            yield Finding(
                pod.where,
                f"{variable['name']} is read from key {source['key']!r}, which is not in ConfigMap {source['name']}",
                f"set {source['key']} with a configMapGenerator of `behavior: merge` in the overlay",
                "kubelet",
            )


def _ingress_backends(deployment: Deployment) -> Iterator[tuple[Manifest, str | None, int | None]]:
    """Yield the Services of every Ingress, each with the number of its port."""
    for ingress in deployment.all("Ingress"):
        for rule in ingress["spec"].get("rules", []):
            for path in rule.get("http", {}).get("paths", []):
                service = path["backend"].get("service", {})
                yield ingress, service.get("name"), service.get("port", {}).get("number")


def _backends(deployment: Deployment, stale: set[str]) -> Iterator[Finding]:
    """Check the Service of an Ingress: KServe's `<name>-predictor`, in Standard mode only, or KubeRay's."""
    own, opened = (f"{deployment.name}-serve-svc", 8000) if deployment.is_ray else (f"{deployment.name}-predictor", 80)
    for ingress, name, port in _ingress_backends(deployment):
        if name not in (own, *stale) and not deployment.find("Service", name):
            yield _missing(name_of(ingress), "Service", name)
        if name == own and port not in (None, opened):
            operator = "KubeRay" if deployment.is_ray else "KServe"
            yield Finding(
                name_of(ingress),
                f"it sends requests to port {port} of Service {name}, which {operator} opens at {opened}",
                f"use port {opened}",
                "kserve-llm",
            )
    for ingress in deployment.all("Ingress") if deployment.is_knative else []:
        yield Finding(
            name_of(ingress),
            "it bypasses Knative's gateway and activator, so a service at zero replicas does not start",
            "use Standard mode, or remove it and use the gateway's host",
            "kserve-llm",
        )


def _queries(deployment: Deployment) -> Iterator[Finding]:
    """Check the model's name, which is that of the InferenceService, in queries of class keda."""
    served = deployment.settings.get("PREDICTOR_SERVED_MODEL_NAME", deployment.name)
    for metric in (deployment.predictor.get("autoScaling") or {}).get("metrics") or []:
        query = str((metric.get("external") or {}).get("metric", {}).get("query", ""))
        for name in sorted(set(_MODEL_NAME.findall(query)) - {served}):
            yield Finding(
                deployment.where,
                f"the query of autoScaling counts requests of model {name!r}, and {served!r} is served",
                f'patch the query: model_name="{served}"',
                "kserve-llm",
            )


def _selectors(deployment: Deployment) -> Iterator[Finding]:
    """Check the policies, monitors and pools that select the predictor's pods by the service's name."""
    kinds, label = ("NetworkPolicy", "PodMonitor", "InferencePool"), pods_label(deployment)
    opened = {port for pod in deployment.serving_pods for container in pod.containers for port in ports(container)}
    for manifest in [manifest for kind in kinds for manifest in deployment.all(kind)]:
        spec = manifest["spec"]
        selected = (spec.get("podSelector") or spec.get("selector") or {}).get("matchLabels", {}).get(label)
        if selected not in (None, deployment.name):
            yield Finding(
                name_of(manifest),
                f"it selects the pods of {deployment.service['kind']} {selected!r}, which is not in this overlay",
                f"write {label}: {deployment.name}",
                "kserve-llm",
            )
        for endpoint in spec.get("podMetricsEndpoints", []) if selected else []:
            port = endpoint.get("portNumber", endpoint.get("port") if deployment.is_ray else None)
            if port is not None and port not in opened:
                yield Finding(
                    name_of(manifest),
                    f"it scrapes port {port}, which container {deployment.server_name} does not open",
                    "use a port of the container",
                    "kserve-llm",
                )


def _pools(deployment: Deployment) -> Iterator[Finding]:
    """Check the pools of the Gateway API Inference Extension: mode, port and the endpoint picker's Service."""
    for pool in deployment.all("InferencePool"):
        where, spec = name_of(pool), pool["spec"]
        if deployment.is_knative:
            yield Finding(
                where,
                "it bypasses Knative's activator, so a service at zero replicas does not start",
                "add component standard-mode",
                "kserve-llm",
            )
        for port in [target["number"] for target in spec["targetPorts"]]:
            if port not in ports(deployment.server):
                yield Finding(
                    where,
                    f"it sends requests to port {port}, which container {deployment.server_name} does not open",
                    "use the containerPort of the ServingRuntime",
                    "kserve-llm",
                )
        picker = spec["endpointPickerRef"]["name"]
        if not deployment.find("Service", picker):
            yield _missing(where, "Service", picker)


def _services(deployment: Deployment) -> Iterator[Finding]:
    """Check the Services of the overlay's Deployments."""
    for service in deployment.all("Service"):
        selector = service["spec"].get("selector") or {}
        templates = [owner["spec"]["template"] for owner in deployment.all("Deployment")]
        selected = [pod for pod in templates if selector.items() <= pod["metadata"].get("labels", {}).items()]
        if not selected:
            yield Finding(name_of(service), "it selects no pod of this overlay", "correct its selector", "kserve-llm")
            continue
        opened = {port for pod in selected for container in pod["spec"]["containers"] for port in ports(container)}
        for port in service["spec"].get("ports", []):
            target = port.get("targetPort", port["port"])
            if target not in opened:
                yield Finding(
                    name_of(service),
                    f"its target port {target!r} is opened by no selected container",
                    f"use {' or '.join(sorted(map(str, opened))) or 'a containerPort'}",
                    "kserve-llm",
                )


def _roles(deployment: Deployment) -> Iterator[Finding]:
    for binding in deployment.all("RoleBinding"):
        for target in [binding["roleRef"], *binding.get("subjects", [])]:
            if target["kind"] in ("Role", "ServiceAccount") and not deployment.find(target["kind"], target["name"]):
                yield _missing(name_of(binding), target["kind"], target["name"])


def _namespaces(deployment: Deployment) -> Iterator[Finding]:
    """Check that what pods use is in the namespace of the InferenceService, and that it is not one of the system's."""
    for manifest in [manifest for kind in SAME_NAMESPACE for manifest in deployment.all(kind)]:
        metadata = manifest["metadata"]
        # A dashboard may be in Grafana's namespace.
        is_used = "grafana_dashboard" not in (metadata.get("labels") or {})
        if is_used and metadata.get("namespace", "default") != deployment.namespace:
            yield Finding(
                name_of(manifest),
                f"it is in namespace {metadata.get('namespace', 'default')}, and {deployment.where} in "
                f"{deployment.namespace}",
                "set `namespace` once, in the overlay's kustomization",
                "kserve-llm",
            )
    if deployment.is_ray:
        return
    if deployment.namespace in SYSTEM_NAMESPACES or deployment.namespace.startswith("kube-"):
        yield Finding(
            deployment.where,
            f"it is in namespace {deployment.namespace}, in which KServe's webhook mounts no weights",
            "use a namespace of its own",
            "KServe's webhook",
        )


def _missing(where: str, kind: str, name: str | None) -> Finding:
    return Finding(
        where,
        f"it refers to {kind} {name!r}, which is not in this overlay",
        "correct the name or add it",
        _SOURCES.get(kind, "kserve-llm"),
    )
