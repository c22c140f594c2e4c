"""Names that must lead somewhere: within the overlay, or to a Secret that somebody must make."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from preflight.deployment import KSERVE_CONTAINER, Deployment, Manifest, Pod, name_of
from preflight.findings import Finding

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
PODS_OF = "serving.kserve.io/inferenceservice"
"""KServe's label of the pods of an InferenceService."""


@dataclass(frozen=True, slots=True, order=True)
class SecretKey:
    """A Secret that the overlay names and, on purpose, does not hold."""

    name: str
    key: str | None
    """None where all of it is used."""
    optional: bool = False


def secrets(deployment: Deployment) -> list[SecretKey]:
    """The Secrets that must exist in the namespace, and those that may."""
    found: set[SecretKey] = set()
    for pod in deployment.pods:
        for container in pod.containers:
            for variable in container.get("env", []):
                if source := variable.get("valueFrom", {}).get("secretKeyRef"):
                    found.add(SecretKey(source["name"], source["key"], source.get("optional", False)))
            for entry in container.get("envFrom", []):
                if source := entry.get("secretRef"):
                    found.add(SecretKey(source["name"], None, source.get("optional", False)))
        for volume in pod.spec.get("volumes", []):
            if source := volume.get("secret"):
                items = source.get("items") or [{"key": None}]
                found |= {SecretKey(source["secretName"], each["key"], source.get("optional", False)) for each in items}
        found |= {SecretKey(each["name"], ".dockerconfigjson", True) for each in pod.spec.get("imagePullSecrets", [])}
    for account in deployment.all("ServiceAccount"):
        # The kubelet warns of a pull secret that is not there, and pulls without it.
        found |= {SecretKey(each["name"], ".dockerconfigjson", True) for each in account.get("imagePullSecrets", [])}
    for ingress in deployment.all("Ingress"):
        found |= {
            SecretKey(tls["secretName"], "tls.crt") for tls in ingress["spec"].get("tls", []) if "secretName" in tls
        }
    return sorted(found, key=lambda each: (each.name, each.key or ""))


def check(deployment: Deployment) -> Iterator[Finding]:
    """Every name that is used and leads nowhere."""
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
            f"ServingRuntime {name!r} is not in this overlay" if name else "spec.predictor.model names no runtime",
            "set model.runtime to the ServingRuntime that is",
        )
    uri = deployment.model.get("storageUri", "")
    if deployment.claim is not None and not deployment.find("PersistentVolumeClaim", deployment.claim):
        yield _missing(deployment.where, "PersistentVolumeClaim", deployment.claim)
    elif deployment.claim or (uri.startswith("hf://") and "storageContainerName" not in deployment.predictor):
        filled = [claim for pod, _ in deployment.downloads for claim in pod.claims]
        if filled and deployment.claim not in filled:
            yield Finding(
                deployment.where,
                f"storageUri is {uri!r}, and the model is downloaded onto {' and '.join(filled)}",
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
                f"{variable['name']} comes from key {source['key']!r}, which ConfigMap {source['name']} does not have",
                f"set {source['key']} with a configMapGenerator of `behavior: merge` in the overlay",
            )


def _probes(deployment: Deployment) -> Iterator[Finding]:
    for kind in PROBES:
        probe = deployment.server.get(kind)
        if probe is None:
            yield Finding(
                deployment.where,
                f"container {KSERVE_CONTAINER} has no {kind}",
                "put back the one of manifests/serving/serving-runtime.yaml",
            )
            continue
        asked = re.fullmatch(r"/v2/models/([^/]+)/ready", probe.get("httpGet", {}).get("path", ""))
        if asked and asked[1] != deployment.name:
            yield Finding(
                deployment.where,
                f"the {kind} asks for model {asked[1]!r}, and {deployment.name} is served",
                "ask /v2/models/{{.Name}}/ready",
            )
    for pod in deployment.pods:
        for container in pod.containers:
            for kind in PROBES:
                port = container.get(kind, {}).get("httpGet", {}).get("port")
                if port is not None and port not in _ports(container):
                    yield Finding(
                        pod.where,
                        f"the {kind} asks port {port!r}, which container {container['name']} does not open",
                        f"use {' or '.join(sorted(map(str, _ports(container)))) or 'a containerPort'}",
                    )
    ports = _ports(deployment.server)
    told = deployment.settings.get("PREDICTOR_HTTP_PORT")
    if told and ports and int(told) not in ports:
        yield Finding(
            deployment.where, f"PREDICTOR_HTTP_PORT is {told}, and the container opens another port", "make them equal"
        )


def _backends(deployment: Deployment) -> Iterator[Finding]:
    """The Service behind an Ingress is KServe's, named after the InferenceService, and in Standard mode only."""
    for ingress in deployment.all("Ingress"):
        for rule in ingress["spec"].get("rules", []):
            for path in rule.get("http", {}).get("paths", []):
                name = path["backend"].get("service", {}).get("name")
                if name != f"{deployment.name}-predictor" and not deployment.find("Service", name):
                    yield _missing(name_of(ingress), "Service", name)
        if deployment.is_knative:
            yield Finding(
                name_of(ingress),
                "it bypasses Knative's gateway and activator, so nothing wakes a service at zero",
                "use Standard mode, or remove it and use the gateway's host",
            )


def _ports(container: Manifest) -> set[int | str]:
    """Numbers and names of the ports that a container opens."""
    return {port[key] for port in container.get("ports", []) for key in ("containerPort", "name") if key in port}


def _selectors(deployment: Deployment) -> Iterator[Finding]:
    """Policies and monitors of the predictor, which find its pods by the name of the InferenceService."""
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
                    f"it asks port {port}, which container {KSERVE_CONTAINER} does not open",
                    "use the containerPort of the ServingRuntime",
                )


def _services(deployment: Deployment) -> Iterator[Finding]:
    """Services of the overlay's own, which stand before Deployments of its own."""
    for service in deployment.all("Service"):
        selector = service["spec"].get("selector") or {}
        templates = [each["spec"]["template"] for each in deployment.all("Deployment")]
        chosen = [each for each in templates if selector.items() <= each["metadata"].get("labels", {}).items()]
        if not chosen:
            yield Finding(name_of(service), "it selects no pod of this overlay", "correct its selector")
            continue
        ports = {port for each in chosen for container in each["spec"]["containers"] for port in _ports(container)}
        for port in service["spec"].get("ports", []):
            target = port.get("targetPort", port["port"])
            if target not in ports:
                yield Finding(
                    name_of(service),
                    f"it leads to port {target!r}, which no container behind it opens",
                    f"use {' or '.join(sorted(map(str, ports))) or 'a containerPort'}",
                )


def _roles(deployment: Deployment) -> Iterator[Finding]:
    for binding in deployment.all("RoleBinding"):
        named = [binding["roleRef"], *binding.get("subjects", [])]
        for each in named:
            if each["kind"] in ("Role", "ServiceAccount") and not deployment.find(each["kind"], each["name"]):
                yield _missing(name_of(binding), each["kind"], each["name"])


def _images(deployment: Deployment) -> Iterator[Finding]:
    for pod in deployment.pods:
        for container in pod.containers:
            image = str(container.get("image", ""))
            registry, _, rest = image.partition("/")
            tagged = "@" in rest or ":" in rest.rpartition("/")[2]
            if ("." not in registry and ":" not in registry) or not tagged or image.endswith(":latest"):
                yield Finding(
                    pod.where,
                    f"the image of container {container['name']} is {image!r}, without a registry or a tag of its own",
                    "name it in component images, and list that component last",
                )


def _missing(where: str, kind: str, name: str | None) -> Finding:
    return Finding(where, f"it names {kind} {name!r}, which is not in this overlay", "correct the name or add it")
