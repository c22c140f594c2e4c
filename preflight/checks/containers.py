"""Check containers: probes and ports, images, expansions in arguments, and annotations with a port."""

import re
from collections.abc import Iterator

from preflight.checks.api_server import PROBES
from preflight.checks.knative import RESERVED
from preflight.deployment import Deployment, Manifest
from preflight.findings import Finding

_EXPANSION = re.compile(r"(?<!\$)\$\((\w+)\)")
_OF_SERVICE = re.compile(r"_SERVICE_(HOST|PORT)")
"""Variables that Kubernetes sets for Services."""
_SHELL_EXPANSION = re.compile(r"\$\{(\w+)\}")


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield probes, ports, images and arguments that do not fit the containers."""
    yield from _probes(deployment)
    yield from _images(deployment)
    yield from _expansions(deployment)
    yield from _scrape_annotations(deployment)


def ports(container: Manifest) -> set[int | str]:
    """Return the numbers and names of a container's ports."""
    return {port[key] for port in container.get("ports", []) for key in ("containerPort", "name") if key in port}


def _probes(deployment: Deployment) -> Iterator[Finding]:
    # A replica of Ray Serve may load as long as it needs.
    for kind in PROBES[1:] if deployment.is_ray else PROBES:
        probe = deployment.server.get(kind)
        if probe is None:
            yield Finding(
                deployment.where,
                f"container {deployment.server_name} has no {kind}",
                f"copy it from manifests/{'ray/ray-service' if deployment.is_ray else 'serving/serving-runtime'}.yaml",
                "kserve-llm",
            )
            continue
        path = re.fullmatch(r"/v2/models/([^/]+)/ready", probe.get("httpGet", {}).get("path", ""))
        if path and path[1] != deployment.name:
            yield Finding(
                deployment.where,
                f"the {kind} requests model {path[1]!r}, and {deployment.name} is served",
                "use the path /v2/models/{{.Name}}/ready",
                "kserve-llm",
            )
    live = (deployment.server.get("livenessProbe") or {}).get("httpGet", {})
    if str(live.get("path", "")).endswith("/ready"):
        yield Finding(
            deployment.where,
            "the livenessProbe requests readiness, so a predictor that is not ready restarts and loses its requests",
            "use the path /v2/health/live",
            "kserve-llm",
        )
    for pod in deployment.pods:
        for container in pod.containers:
            for kind in PROBES:
                if container.get(kind, {}).get("httpGet", {}).get("scheme") == "HTTPS":
                    yield Finding(
                        pod.where,
                        f"the {kind} uses HTTPS, and container {container['name']} serves HTTP",
                        "remove scheme",
                        "kubelet",
                    )
                port = container.get(kind, {}).get("httpGet", {}).get("port")
                if port is not None and port not in ports(container):
                    yield Finding(
                        pod.where,
                        f"the {kind} uses port {port!r}, which container {container['name']} does not open",
                        f"use {' or '.join(sorted(map(str, ports(container)))) or 'a containerPort'}",
                        "kubelet",
                    )
    host = deployment.settings.get("PREDICTOR_HOST", "0.0.0.0")  # noqa: S104
    if host != "0.0.0.0" and not deployment.is_ray:  # noqa: S104
        yield Finding(
            deployment.where,
            f"PREDICTOR_HOST is {host}, an address that probes and clients do not use",
            "remove it",
            "kserve-llm",
        )
    opened = ports(deployment.server)
    port = deployment.settings.get("PREDICTOR_HTTP_PORT")
    if port and opened and int(port) not in opened and not deployment.is_ray:
        yield Finding(
            deployment.where,
            f"PREDICTOR_HTTP_PORT is {port}, and the container opens another port",
            "make them equal",
            "kserve-llm",
        )


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
                    "kserve-llm",
                )


def _expansions(deployment: Deployment) -> Iterator[Finding]:
    """Check `$(NAME)` in arguments: without a variable of that name, Kubernetes keeps the text."""
    for pod in deployment.pods:
        for container in pod.containers:
            if "command" in container:
                continue  # A shell expands both forms itself.
            has_unknown = any("secretRef" in source for source in container.get("envFrom", []))
            names = {variable["name"] for variable in container.get("env", [])} | set(deployment.environment(container))
            names |= set(RESERVED) if deployment.is_knative else set()
            for text in map(str, container.get("args", [])):
                for name in _EXPANSION.findall(text):
                    # checks/settings.py reports a missing reference.
                    if name not in (*names, "MODEL_REFERENCE") and not has_unknown and not _OF_SERVICE.search(name):
                        yield Finding(
                            pod.where,
                            f"container {container['name']} uses $({name}), and has no variable of that name",
                            "correct the name, or set the variable",
                            "kserve-llm",
                        )
                for name in _SHELL_EXPANSION.findall(text):
                    yield Finding(
                        pod.where,
                        f"container {container['name']} uses ${{{name}}}, which only a shell expands",
                        f"write $({name})",
                        "kserve-llm",
                    )


def _scrape_annotations(deployment: Deployment) -> Iterator[Finding]:
    """Check the annotations for a Prometheus that discovers pods by them."""
    opened = {str(port) for port in ports(deployment.server)}
    for prefix in ("prometheus.io", "prometheus.kserve.io"):
        port, path = (deployment.annotations.get(f"{prefix}/{name}") for name in ("port", "path"))
        if opened and port is not None and str(port) not in opened:
            yield Finding(
                deployment.where,
                f"annotation {prefix}/port is {port}, which container {deployment.server_name} does not open",
                f"use {' or '.join(sorted(opened))}",
                "kserve-llm",
            )
        if path not in (None, "/metrics"):
            yield Finding(deployment.where, f"annotation {prefix}/path is {path}", "use /metrics", "kserve-llm")
