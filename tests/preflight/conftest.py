"""Rendered overlays that tests may change, and a fake API server."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from devtools.paths import ROOT
from preflight import offline, rendering
from preflight.checks import schema
from preflight.checks.resources import Model
from preflight.checks.schema import Schemas
from preflight.deployment import Deployment, Manifest
from preflight.findings import Finding
from tests.loopback import serving, write_kubeconfig

OVERLAYS = ROOT / "kustomize/overlays"


class CachedSchemas(Schemas):
    """Schemas that validate equal objects once: most objects are in many renderings."""

    def problems(self, manifest: Manifest) -> list[str] | None:
        return self._cached(json.dumps(manifest))

    @cache  # noqa: B019 - there is one, and it lives as long as the session
    def _cached(self, text: str) -> list[str] | None:
        return super().problems(json.loads(text))


CORE_SCHEMAS = CachedSchemas()
"""The schemas of core kinds only."""


class Draft:
    """A copy of a rendered overlay that a test may change."""

    def __init__(self, rendered: Deployment) -> None:
        self.objects = copy.deepcopy(list(rendered.objects))

    def __getitem__(self, name: str) -> Manifest:
        """Return the object of a kind, or of `Kind/prefix-of-name`."""
        kind, _, start = name.partition("/")
        objects = (manifest for manifest in self.objects if manifest["kind"] == kind)
        return next(manifest for manifest in objects if manifest["metadata"]["name"].startswith(start))

    def add_adapter(self, reference: str) -> None:
        """Set the reference of an adapter as component `adapter` does."""
        self.download["ADAPTER_REFERENCE"] = reference
        source = {"name": self["ConfigMap/model-download-"]["metadata"]["name"], "key": "ADAPTER_REFERENCE"}
        self.model["env"].append({"name": "ADAPTER_REFERENCE", "valueFrom": {"configMapKeyRef": source}})

    @property
    def annotations(self) -> dict[str, str]:
        annotations: dict[str, str] = self["InferenceService"]["metadata"]["annotations"]
        return annotations

    @property
    def predictor(self) -> Manifest:
        predictor: Manifest = self["InferenceService"]["spec"]["predictor"]
        return predictor

    @property
    def model(self) -> Manifest:
        model: Manifest = self.predictor["model"]
        return model

    @property
    def container(self) -> Manifest:
        [container] = self["ServingRuntime"]["spec"]["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def job(self) -> Manifest:
        pod: Manifest = self["Job"]["spec"]["template"]["spec"]
        return pod

    @property
    def settings(self) -> dict[str, str]:
        data: dict[str, str] = self["ConfigMap/predictor-"]["data"]
        return data

    @property
    def download(self) -> dict[str, str]:
        data: dict[str, str] = self["ConfigMap/model-download-"]["data"]
        return data

    def mount_keys(self, volume: Manifest | None = None, **mount: str) -> None:
        """Add a file of API keys as component api-keys does, with another volume or other fields of the mount."""
        self.settings["PREDICTOR_API_KEYS_FILE"] = "/etc/kserve-llm/api-keys/keys"
        source = volume or {"secret": {"secretName": "predictor-api-keys"}}
        self["ServingRuntime"]["spec"]["volumes"].append({"name": "api-keys", **source})
        self.container["volumeMounts"].append({"name": "api-keys", "mountPath": "/etc/kserve-llm/api-keys"} | mount)

    @property
    def deployment(self) -> Deployment:
        return Deployment(tuple(self.objects))

    def check(self, schemas: Schemas | None = None, model: Model | None = None) -> list[Finding]:
        """Run the offline checks; without schemas, custom kinds are not validated."""
        findings = offline.check(self.deployment, schemas or CORE_SCHEMAS, model)
        return [finding for finding in findings if "were not checked" not in finding.problem]


@cache
def _rendered(name: str) -> Deployment:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    return rendering.render(OVERLAYS / name)


@pytest.fixture(scope="session")
def rendered() -> Callable[[str], Deployment]:
    """Renders an overlay."""
    return _rendered


@pytest.fixture(scope="session")
def draft() -> Callable[[str], Draft]:
    """Renders an overlay into a Draft."""
    return lambda name: Draft(_rendered(name))


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    """The schemas of core and custom kinds."""
    folder = os.environ.get("CRD_DIR")
    if not folder:
        pytest.skip("CRD_DIR is not set: a folder with the CRDs of KServe, Prometheus' operator and KEDA")
    return Schemas(schema.definitions_in(Path(folder)))


@dataclass
class FakeCluster:
    """State of the fake API server: `answers` by path, 403 for forbidden paths, else 404."""

    answers: dict[str, Any] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    kubeconfig: Path = Path()

    def config_map(self, name: str, data: dict[str, str], version: str = "1.21.1") -> None:
        self.answers[f"/api/v1/namespaces/knative-serving/configmaps/{name}"] = {
            "metadata": {"name": name, "labels": {"app.kubernetes.io/version": version}},
            "data": data,
        }


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """Start an HTTP server on loopback, with a kubeconfig whose context `here` points to it."""
    fake = FakeCluster(kubeconfig=tmp_path / "kubeconfig")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            status = 403 if path in fake.forbidden else 200 if path in fake.answers else 404
            body = json.dumps(fake.answers[path] if status == 200 else {"kind": "Status", "code": status}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    write_kubeconfig(fake.kubeconfig, server.server_port)
    # The client reads KUBECONFIG once, when it is imported.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(fake.kubeconfig))
    with serving(server):
        yield fake
