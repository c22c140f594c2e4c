"""A small API server on loopback, for kubectl: stores, lists and deletes objects, reports removals, has pods' logs."""

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from preflight.deployment import Manifest
from tests.loopback import write_kubeconfig

KINDS = {
    "v1": [
        ("Namespace", "namespaces", False),
        ("ServiceAccount", "serviceaccounts", True),
        ("ConfigMap", "configmaps", True),
        ("PersistentVolumeClaim", "persistentvolumeclaims", True),
        ("Pod", "pods", True),
        ("Service", "services", True),
    ],
    "autoscaling/v2": [("HorizontalPodAutoscaler", "horizontalpodautoscalers", True)],
    "batch/v1": [("Job", "jobs", True)],
    "monitoring.coreos.com/v1": [
        ("PodMonitor", "podmonitors", True),
        ("PrometheusRule", "prometheusrules", True),
    ],
    "networking.k8s.io/v1": [("NetworkPolicy", "networkpolicies", True)],
    "ray.io/v1": [("RayService", "rayservices", True)],
    "serving.kserve.io/v1alpha1": [("ServingRuntime", "servingruntimes", True)],
    "serving.kserve.io/v1beta1": [("InferenceService", "inferenceservices", True)],
}
"""Kinds by API version: kind, name in paths, whether it is in a namespace."""


VERBS = ["get", "list", "watch", "create", "patch", "delete"]
WATCH_SECONDS = 30


class ApiServer(ThreadingHTTPServer):
    """Objects by path, and the changes that were requested.

    Args:
        objects: the objects that exist at first.
        on_change: called with this server and each change, `METHOD path`, to act as a controller.
    """

    def __init__(self, objects: Iterable[Manifest], on_change: Callable[["ApiServer", str], None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.changes: list[str] = []
        self.labels_at_deletion: dict[str, dict[str, str]] = {}
        self.objects = {_path(manifest): manifest for manifest in objects}
        self.on_change = on_change
        self.removed: list[tuple[str, Manifest]] = []
        self.logs: dict[str, str] = {}
        """Of pods, by path."""
        self.changed = threading.Condition()

    def write_kubeconfig(self, path: Path) -> None:
        """Write a kubeconfig whose current context is this server."""
        write_kubeconfig(path, self.server_port)

    @property
    def version(self) -> int:
        """The resource version, which grows with every removal."""
        return len(self.removed) + 1

    def put(self, manifest: Manifest) -> str:
        """Store an object, as a controller does; return its path."""
        path = _path(manifest)
        self.objects[path] = manifest
        return path

    def remove(self, path: str) -> None:
        """Remove an object; watches report it."""
        with self.changed:
            self.removed.append((path, self.objects.pop(path)))
            self.changed.notify_all()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if content := discovery(url.path):
            self._send(content)
        elif url.path == "/openapi/v2":
            # An empty document in the protocol buffers that kubectl accepts: it validates nothing.
            self._send_text("", "application/octet-stream")
        elif "watch" in query:
            self._watch(url.path, query)
        elif url.path in self.server.objects:
            self._send(self.server.objects[url.path])
        elif url.path.endswith("/log") and url.path.removesuffix("/log") in self.server.logs:
            self._send_text(self.server.logs[url.path.removesuffix("/log")], "text/plain")
        elif url.path.rpartition("/")[2] in {plural for kinds in KINDS.values() for _, plural, _ in kinds}:
            # The version first: a watch from it must report what is removed after the list.
            version = {"resourceVersion": str(self.server.version)}
            items = _select(list(self.server.objects.items()), url.path, query)
            self._send({"kind": "List", "apiVersion": "v1", "metadata": version, "items": items})
        else:
            self._not_found()

    def do_POST(self) -> None:
        manifest = json.loads(self._body())
        path = self.server.put(manifest)
        self._change("POST", path, manifest)

    def do_PATCH(self) -> None:
        patch = json.loads(self._body())
        path = urlsplit(self.path).path
        if path not in self.server.objects:
            self._not_found()
            return
        self.server.objects[path] = _merge(self.server.objects[path], patch)
        self._change("PATCH", path, self.server.objects[path])

    def do_DELETE(self) -> None:
        self._body()
        path = urlsplit(self.path).path
        if path not in self.server.objects:
            self._not_found()
            return
        manifest = self.server.objects[path]
        self.server.labels_at_deletion[path] = dict(manifest["metadata"].get("labels") or {})
        self.server.remove(path)
        self._change("DELETE", path, manifest)

    def _change(self, method: str, path: str, manifest: Manifest) -> None:
        change = f"{method} {path}"
        self.server.changes.append(change)
        self.server.on_change(self.server, change)
        self._send(manifest)

    def _watch(self, folder: str, query: dict[str, list[str]]) -> None:
        """Send the removals since the resource version of the list, once there is one, and end the watch."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        since = int(query["resourceVersion"][0]) - 1
        with self.server.changed:
            self.server.changed.wait_for(lambda: len(self.server.removed) > since, timeout=WATCH_SECONDS)
        for manifest in _select(self.server.removed[since:], folder, query):
            self.wfile.write(json.dumps({"type": "DELETED", "object": manifest}).encode() + b"\n")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _not_found(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        self._send({**status, "message": f"{name} not found"}, 404)

    def _send(self, content: Any, status: int = 200) -> None:
        self._send_text(json.dumps(content), "application/json", status)

    def _send_text(self, text: str, content_type: str, status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def _merge(value: Any, patch: Any) -> Any:
    """Return what a JSON merge patch makes of a value."""
    if not isinstance(patch, dict):
        return patch
    below = value if isinstance(value, dict) else {}
    merged = below | {key: _merge(below.get(key), inner) for key, inner in patch.items()}
    return {key: inner for key, inner in merged.items() if inner is not None}


def _path(manifest: Manifest) -> str:
    version, metadata = manifest["apiVersion"], manifest["metadata"]
    [(plural, is_namespaced)] = [(p, n) for kind, p, n in KINDS[version] if kind == manifest["kind"]]
    group = f"/apis/{version}" if "/" in version else f"/api/{version}"
    namespace = f"/namespaces/{metadata['namespace']}" if is_namespaced else ""
    return f"{group}{namespace}/{plural}/{metadata['name']}"


def _select(objects: Iterable[tuple[str, Manifest]], folder: str, query: dict[str, list[str]]) -> list[Manifest]:
    """Return the objects below the path of a list that the selectors of its query match."""
    fields, labels = (query.get(name, [""])[0] for name in ("fieldSelector", "labelSelector"))
    return [
        manifest
        for path, manifest in objects
        if path.rpartition("/")[0] == folder and _matches(manifest, fields, labels)
    ]


def _matches(manifest: Manifest, fields: str, labels: str) -> bool:
    """Return whether an object matches `metadata.name=…` and `key=value`, the only selectors that are used here."""
    metadata = manifest["metadata"]
    name, (key, _, value) = fields.removeprefix("metadata.name="), labels.partition("=")
    return (not fields or metadata["name"] == name) and (not labels or (metadata.get("labels") or {}).get(key) == value)


def discovery(path: str) -> Manifest | None:
    """Return a discovery document; None for other paths."""
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/version":
        return {"major": "1", "minor": "33"}
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for version in KINDS:
        group, _, number = version.rpartition("/")
        groups[group].append({"groupVersion": version, "version": number})
    if path == "/apis":
        named = [
            {"name": group, "versions": versions, "preferredVersion": versions[0]}
            for group, versions in groups.items()
            if group
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": named}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    kinds = [
        {"kind": kind, "name": plural, "singularName": kind.lower(), "namespaced": namespaced, "verbs": VERBS}
        for kind, plural, namespaced in KINDS.get(version, [])
    ]
    return (
        {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": kinds} if kinds else None
    )
