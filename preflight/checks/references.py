"""Check references between objects, and list the Secrets that must exist."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from preflight.deployment import KSERVE_CONTAINER, Deployment, Manifest, Pod, name_of
from preflight.findings import Finding

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
PODS_OF = "serving.kserve.io/inferenceservice"
"""Label that KServe sets on the pods of an InferenceService."""


@dataclass(frozen=True, slots=True, order=True)
class SecretKey:
    """A referenced Secret, which overlays deliberately do not contain."""

    name: str
    key: str | None
    """None if the whole Secret is used."""
    optional: bool = False


def secrets(deployment: Deployment) -> list[SecretKey]:
    """Return the required and optional Secrets of the namespace."""
    keys: set[SecretKey] = set()
    for pod in deployment.pods:
        for container in pod.containers:
            for variable in container.get("env", []):
                if source := variable.get("valueFrom", {}).get("secretKeyRef"):
                    keys.add(SecretKey(source["name"], source["key"], source.get("optional", False)))
            for entry in container.get("envFrom", []):
                if source := entry.get("secretRef"):
                    keys.add(SecretKey(source["name"], None, source.get("optional", False)))
        for volume in pod.spec.get("volumes", []):
            if source := volume.get("secret"):
                items = source.get("items") or [{"key": None}]
                keys |= {SecretKey(source["secretName"], item["key"], source.get("optional", False)) for item in items}
        keys |= {SecretKey(entry["name"], ".dockerconfigjson", True) for entry in pod.spec.get("imagePullSecrets", [])}
    for account in deployment.all("ServiceAccount"):
        # Without the pull secret, the kubelet logs a warning and pulls anonymously.
        keys |= {SecretKey(entry["name"], ".dockerconfigjson", True) for entry in account.get("imagePullSecrets", [])}
    for ingress in deployment.all("Ingress"):
        keys |= {
            SecretKey(tls["secretName"], "tls.crt") for tls in ingress["spec"].get("tls", []) if "secretName" in tls
        }
    return sorted(keys, key=lambda key: (key.name, key.key or ""))


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield references without a target."""
    yield from _runtime_and_claim(deployment)
    for pod in deployment.pods:
        yield from _of_pod(deployment, pod)
    yield from _probes(deployment)
    yield from _backends(deployment)
    yield from _selectors(deployment)
    yield from _services(deployment)
    yield from _roles(deployment)
    yield from _images(deployment)


def _runtime_and_claim(deployment: Deployment) -> Iterator[Finding]:
    name = deployment.model.get("runtime")
    if deployment.model and deployment.runtime is None:
        yield Finding(
            deployment.where,
            f"ServingRuntime {name!r} is not in this overlay" if name else "spec.predictor.model has no runtime",
            "set model.runtime to the ServingRuntime of this overlay",
        )
    uri = deployment.model.get("storageUri", "")
    if deployment.claim is not None and not deployment.find("PersistentVolumeClaim", deployment.claim):
        yield _missing(deployment.where, "PersistentVolumeClaim", deployment.claim)
    elif deployment.claim or (uri.startswith("hf://") and "storageContainerName" not in deployment.predictor):
        filled = [claim for pod, _ in deployment.downloads for claim in pod.claims]
        if filled and deployment.claim not in filled:
            yield Finding(
                deployment.where,
                f"storageUri is {uri!r}, and the model is downloaded to {' and '.join(filled)}",
                f"set storageUri: pvc://{filled[0]}",
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
            )


def _probes(deployment: Deployment) -> Iterator[Finding]:
    for kind in PROBES:
        probe = deployment.server.get(kind)
        if probe is None:
            yield Finding(
                deployment.where,
                f"container {KSERVE_CONTAINER} has no {kind}",
                "copy it from manifests/serving/serving-runtime.yaml",
            )
            continue
        path = re.fullmatch(r"/v2/models/([^/]+)/ready", probe.get("httpGet", {}).get("path", ""))
        if path and path[1] != deployment.name:
            yield Finding(
                deployment.where,
                f"the {kind} requests model {path[1]!r}, and {deployment.name} is served",
                "use the path /v2/models/{{.Name}}/ready",
            )
    for pod in deployment.pods:
        for container in pod.containers:
            for kind in PROBES:
                port = container.get(kind, {}).get("httpGet", {}).get("port")
                if port is not None and port not in _ports(container):
                    yield Finding(
                        pod.where,
                        f"the {kind} uses port {port!r}, which container {container['name']} does not open",
                        f"use {' or '.join(sorted(map(str, _ports(container)))) or 'a containerPort'}",
                    )
    ports = _ports(deployment.server)
    port = deployment.settings.get("PREDICTOR_HTTP_PORT")
    if port and ports and int(port) not in ports:
        yield Finding(
            deployment.where, f"PREDICTOR_HTTP_PORT is {port}, and the container opens another port", "make them equal"
        )


def _backends(deployment: Deployment) -> Iterator[Finding]:
    """Check the Service of an Ingress: that of KServe, `<name>-predictor`, which exists in Standard mode only."""
    for ingress in deployment.all("Ingress"):
        for rule in ingress["spec"].get("rules", []):
            for path in rule.get("http", {}).get("paths", []):
                name = path["backend"].get("service", {}).get("name")
                if name != f"{deployment.name}-predictor" and not deployment.find("Service", name):
                    yield _missing(name_of(ingress), "Service", name)
        if deployment.is_knative:
            yield Finding(
                name_of(ingress),
                "it bypasses Knative's gateway and activator, so a service at zero replicas does not start",
                "use Standard mode, or remove it and use the gateway's host",
            )


def _ports(container: Manifest) -> set[int | str]:
    """Return the numbers and names of a container's ports."""
    return {port[key] for port in container.get("ports", []) for key in ("containerPort", "name") if key in port}


def _selectors(deployment: Deployment) -> Iterator[Finding]:
    """Check the policies and monitors that select the predictor's pods by the InferenceService's name."""
    for manifest in [*deployment.all("NetworkPolicy"), *deployment.all("PodMonitor")]:
        spec = manifest["spec"]
        selected = (spec.get("podSelector") or spec.get("selector") or {}).get("matchLabels", {}).get(PODS_OF)
        if selected not in (None, deployment.name):
            yield Finding(
                name_of(manifest),
                f"it selects the pods of InferenceService {selected!r}, which is not in this overlay",
                f"write {PODS_OF}: {deployment.name}",
            )
        for endpoint in spec.get("podMetricsEndpoints", []) if selected else []:
            port = endpoint.get("portNumber")
            if port is not None and port not in _ports(deployment.server):
                yield Finding(
                    name_of(manifest),
                    f"it scrapes port {port}, which container {KSERVE_CONTAINER} does not open",
                    "use the containerPort of the ServingRuntime",
                )


def _services(deployment: Deployment) -> Iterator[Finding]:
    """Check the Services of the overlay's Deployments."""
    for service in deployment.all("Service"):
        selector = service["spec"].get("selector") or {}
        templates = [owner["spec"]["template"] for owner in deployment.all("Deployment")]
        selected = [pod for pod in templates if selector.items() <= pod["metadata"].get("labels", {}).items()]
        if not selected:
            yield Finding(name_of(service), "it selects no pod of this overlay", "correct its selector")
            continue
        ports = {port for pod in selected for container in pod["spec"]["containers"] for port in _ports(container)}
        for port in service["spec"].get("ports", []):
            target = port.get("targetPort", port["port"])
            if target not in ports:
                yield Finding(
                    name_of(service),
                    f"its target port {target!r} is opened by no selected container",
                    f"use {' or '.join(sorted(map(str, ports))) or 'a containerPort'}",
                )


def _roles(deployment: Deployment) -> Iterator[Finding]:
    for binding in deployment.all("RoleBinding"):
        for target in [binding["roleRef"], *binding.get("subjects", [])]:
            if target["kind"] in ("Role", "ServiceAccount") and not deployment.find(target["kind"], target["name"]):
                yield _missing(name_of(binding), target["kind"], target["name"])


def _images(deployment: Deployment) -> Iterator[Finding]:
    for pod in deployment.pods:
        for container in pod.containers:
            image = str(container.get("image", ""))
            registry, _, rest = image.partition("/")
            tagged = "@" in rest or ":" in rest.rpartition("/")[2]
            if ("." not in registry and ":" not in registry) or not tagged or image.endswith(":latest"):
                yield Finding(
                    pod.where,
                    f"the image of container {container['name']} is {image!r}, without a registry or without a tag",
                    "set it in component images, and list that component last",
                )


def _missing(where: str, kind: str, name: str | None) -> Finding:
    return Finding(where, f"it refers to {kind} {name!r}, which is not in this overlay", "correct the name or add it")
