"""examples/deploy/deploy.py against an API server and a predictor on loopback that record requests."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from devtools.paths import ROOT
from tests.api_server import discovery
from tests.loopback import serving, write_kubeconfig

DEV = ROOT / "kustomize/overlays/dev"
SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/kserve-llm-dev/inferenceservices"
HOST = "llm.kserve-llm-dev.example.com"
READY = {"observedGeneration": 1, "url": f"http://{HOST}", "conditions": [{"type": "Ready", "status": "True"}]}


class Loopback(ThreadingHTTPServer):
    """An API server that stores InferenceServices, and the gateway in front of the predictor."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.services: dict[str, Any] = {}
        self.requests: list[tuple[str, str, Any, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Loopback

    def respond(self) -> None:
        path = self.path.partition("?")[0]
        size = int(self.headers.get("Content-Length") or 0)
        body = yaml.safe_load(self.rfile.read(size)) if size else None
        self.server.requests.append((self.command, path, self.headers, body))
        content = self.content(path, body)
        text = json.dumps({"kind": "Status", "code": 404} if content is None else content).encode()
        self.send_response(404 if content is None else 201 if path == SERVICES and body else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def content(self, path: str, body: Any) -> Any:
        services = self.server.services
        if path == "/v2/models/llm/infer":
            return {
                "model_name": "llm",
                "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["Paris"]}],
            }
        if path.startswith(SERVICES):
            if self.command in ("POST", "PATCH"):
                services["llm"] = {**body, "metadata": {**body["metadata"], "generation": 1}, "status": READY}
            return (
                {"items": list(services.values())} if (self.command, path) == ("GET", SERVICES) else services.get("llm")
            )
        return body if self.command == "PATCH" else discovery(path)

    do_GET = do_POST = do_PATCH = respond  # noqa: N815 - names of the standard library

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    server = Loopback()
    kubeconfig = tmp_path / "kubeconfig"
    write_kubeconfig(kubeconfig, server.server_port)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    # The dynamic client caches discovery there.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serving(server):
        yield server


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy", ROOT / "examples/deploy/deploy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example: ModuleType, loopback: Loopback) -> Callable[[], int]:
    arguments = [str(DEV), "The capital of France is", "--gateway", loopback.url, "--context", "here", "--wait", "1"]
    return lambda: int(example.main(arguments, polling_seconds=0.01))


def test_deploy_applies_objects_and_creates_the_service(
    run: Callable[[], int], loopback: Loopback, example: ModuleType
) -> None:
    assert run() == 0
    applied = [body for method, _, _, body in loopback.requests if method == "PATCH"]
    [created] = [body for method, path, _, body in loopback.requests if (method, path) == ("POST", SERVICES)]
    assert (*applied, created) == example.render(DEV).objects
    types = {headers["Content-Type"] for method, _, headers, _ in loopback.requests if method == "PATCH"}
    assert types == {"application/apply-patch+yaml"}


def test_deploy_patches_an_existing_service(run: Callable[[], int], loopback: Loopback) -> None:
    run()
    loopback.requests.clear()
    assert run() == 0
    [headers] = [
        headers for method, path, headers, _ in loopback.requests if path == f"{SERVICES}/llm" and method == "PATCH"
    ]
    assert headers["Content-Type"] == "application/merge-patch+json"
    assert not [path for method, path, _, _ in loopback.requests if method == "POST" and path == SERVICES]


def test_query_uses_the_host_of_the_service(
    run: Callable[[], int], loopback: Loopback, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    [(headers, body)] = [(headers, body) for _, path, headers, body in loopback.requests if path.startswith("/v2")]
    assert headers["Host"] == HOST
    assert body["inputs"][0]["data"] == ["The capital of France is"]
    assert capsys.readouterr().out.splitlines()[-1] == "Paris"


def test_deploy_with_a_broken_overlay_is_an_error(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], loopback: Loopback
) -> None:
    assert example.main([str(tmp_path), "x"]) == 2
    assert re.match(r"deploy: .* does not render", capsys.readouterr().err)
    assert not loopback.requests
