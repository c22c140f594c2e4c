"""`cluster.sh` with the real kubectl, against an API server on loopback.

What pods of a cluster would do is done by real programs: the Hub's pod runs its command, the Job's reference is
requested from it, and the client sends its requests to a predictor of this process.
"""

import base64
import copy
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from devtools import processes
from devtools.paths import ROOT
from preflight.checks import security
from preflight.deployment import Deployment, Manifest
from preflight.rendering import render
from tests.api_server import ApiServer
from tests.e2e.cluster import __main__ as cluster
from tests.e2e.cluster import client, kubectl, objects
from tests.e2e.cluster.objects import HUB_PORT, NAMESPACE, REPOSITORIES, TOOLS, URL, Images
from tests.e2e.cluster.report import Phase, Report
from tests.loopback import serving
from tests.predictor.servers import HANG_SECONDS, InProcessServer, in_process

WORKFLOW = ROOT / ".github/workflows/e2e.yaml"
SERVICE = f"/apis/serving.kserve.io/v1beta1/namespaces/{NAMESPACE}/inferenceservices/llm"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods/"
TOOL_PODS = f"/api/v1/namespaces/{TOOLS}/pods/"


class Cluster:
    """Controllers and a kubelet. Pods of the Hub and the client are processes here."""

    def __init__(self, folder: Path, predictor_url: str) -> None:
        self.predictor_url = predictor_url
        self.folder = folder
        self.hub_port = processes.free_port()
        self.references: list[str] = []
        self.processes: list[subprocess.Popen[str]] = []
        self.fails_to_download = False
        self.services: list[Manifest] = []
        """Each version of the InferenceService that was applied."""
        self._pods = 0

    def __call__(self, server: ApiServer, change: str) -> None:
        method, path = change.split()
        if path.startswith(TOOL_PODS) and method == "POST":
            self._start_tool(server, path)
        elif "/jobs/" in path and method in ("POST", "PATCH"):
            self._download(server, path)
        elif path == SERVICE and method in ("POST", "PATCH"):
            self._reconcile(server)
        elif path.startswith(PODS) and method == "DELETE":
            self._start_pods(server, 1)
        elif re.fullmatch("/api/v1/namespaces/[^/]+", path) and method == "DELETE":
            for inner in [inner for inner in list(server.objects) if f"/{path.rpartition('/')[2]}/" in inner]:
                server.remove(inner)

    def _reconcile(self, server: ApiServer) -> None:
        """Replace all pods; stop them instead if the annotation says so."""
        service = server.objects[SERVICE]
        self.services.append(copy.deepcopy(service))
        metadata = service["metadata"]
        metadata["generation"] = metadata.get("generation", 0) + 1
        for path in self.pods(server):
            server.remove(path)
        if metadata["annotations"].get("serving.kserve.io/stop") == "true":
            return
        self._start_pods(server, service["spec"]["predictor"]["minReplicas"] or 1)
        service["status"] = {"observedGeneration": metadata["generation"], "conditions": _true("Ready")}
        if metadata["annotations"]["serving.kserve.io/deploymentMode"] == "Standard":
            autoscaler = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
            server.put({**autoscaler, "metadata": {"name": "llm-predictor", "namespace": NAMESPACE}})

    def pods(self, server: ApiServer) -> list[str]:
        """Paths of the predictor's pods."""
        return [path for path in list(server.objects) if path.startswith(PODS)]

    def _start_pods(self, server: ApiServer, number: int) -> None:
        for _ in range(number):
            self._pods += 1
            metadata = {
                "name": f"llm-predictor-{self._pods}",
                "namespace": NAMESPACE,
                "labels": {"serving.kserve.io/inferenceservice": "llm"},
            }
            server.put(
                {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"conditions": _true("Ready")}}
            )

    def _download(self, server: ApiServer, path: str) -> None:
        """Request the Job's reference from the Hub."""
        job = server.objects[path]
        [reference] = [
            config["data"]["MODEL_REFERENCE"]
            for config in list(server.objects.values())
            if config["kind"] == "ConfigMap" and config["metadata"]["name"] == job["metadata"]["name"]
        ]
        self.references.append(reference)
        repository, _, commit = reference.removeprefix("hf://").partition(":")
        url = f"http://127.0.0.1:{self.hub_port}/api/models/{repository}/revision/{commit}"
        found = httpx.get(url, trust_env=False).is_success and not self.fails_to_download
        job["status"] = {"conditions": _true("Complete" if found else "Failed")}

    def _start_tool(self, server: ApiServer, path: str) -> None:
        """Run the command of a pod in a folder for its volumes."""
        pod = server.objects[path]
        [container] = pod["spec"]["containers"]
        folders = {
            name: self.folder / f"{pod['metadata']['name']}{len(self.processes)}{name}" for name in ("parts", "work")
        }
        for folder in folders.values():
            folder.mkdir()
        self._mount(server, pod, folders["parts"])
        local = {
            "python": sys.executable,
            "/parts": str(folders["parts"]),
            "/work": str(folders["work"]),
            URL: self.predictor_url,
            str(HUB_PORT): str(self.hub_port),
            "0.0.0.0": "127.0.0.1",
        }
        command = [local.get(word, word) for word in container["command"]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        if pod["metadata"]["name"] == "hub":
            assert process.stdout
            process.stdout.readline()
            pod["status"] = {"phase": "Running", "conditions": _true("Ready")}
        else:
            pod["status"] = {"phase": "Running"}
            threading.Thread(target=self._finish, args=(server, path, pod, process)).start()

    def _mount(self, server: ApiServer, pod: Manifest, folder: Path) -> None:
        """Write the ConfigMaps of a projected volume."""
        [projected] = [volume["projected"] for volume in pod["spec"]["volumes"] if "projected" in volume]
        for source in projected["sources"]:
            config = server.objects[f"/api/v1/namespaces/{TOOLS}/configmaps/{source['configMap']['name']}"]
            size = sum(len(value) for value in config["binaryData"].values())
            assert size < 1 << 20, "a ConfigMap holds at most 1 MiB"
            for name, value in config["binaryData"].items():
                (folder / name).write_bytes(base64.b64decode(value))

    def _finish(self, server: ApiServer, path: str, pod: Manifest, process: "subprocess.Popen[str]") -> None:
        """Record the output of a client; without requests, Knative removes the predictor's pods."""
        output, _ = process.communicate(timeout=HANG_SECONDS)
        server.logs[path] = output
        service = server.objects[SERVICE]
        if service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Knative":
            for name in self.pods(server):
                server.remove(name)
        pod["status"] = {"phase": "Succeeded" if process.returncode == 0 else "Failed"}

    def close(self) -> None:
        for process in self.processes:
            processes.stop(process)


def _true(condition: str) -> list[dict[str, str]]:
    return [{"type": condition, "status": "True"}]


@pytest.fixture(scope="module")
def predictor() -> Iterator[InProcessServer]:
    with in_process(model_name="llm") as server:
        yield server


@pytest.fixture
def simulated(tmp_path: Path, predictor: InProcessServer) -> Iterator[Cluster]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    simulated = Cluster(tmp_path, predictor.url)
    yield simulated
    simulated.close()


@pytest.fixture
def server(simulated: Cluster) -> Iterator[ApiServer]:
    server = ApiServer([], simulated)
    with serving(server):
        yield server


@pytest.fixture
def run(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the program with a kubeconfig of the API server."""
    kubeconfig = tmp_path / "config"
    server.write_kubeconfig(kubeconfig)
    monkeypatch.setenv("KUBECACHEDIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kubectl, "POLL_SECONDS", 0.05)
    arguments = ["--kubeconfig", str(kubeconfig), "--context", "here", "--requests", "40", "--load-seconds", "8"]
    return lambda *words: cluster.main([*arguments, *words])


def lines(output: str) -> dict[str, str]:
    """Results of the report by phase."""
    return {
        name.strip(): result for name, result in re.findall(r"^.{9} (.{28}) +[\d.]+ s  (\w+)", output, re.MULTILINE)
    }


@pytest.mark.slow
def test_cluster_knative_runs_all_phases_and_leaves_nothing(
    run: Callable[..., int], server: ApiServer, simulated: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code = run("knative")
    output = capsys.readouterr()
    assert exit_code == 0, output.out + output.err
    phases = lines(output.out)
    assert set(phases.values()) == {"ok"}
    assert set(client.protocols("llm")) < set(phases)
    expected = ["to zero", "answer from zero", "rollout", "deleted pod", "changed reference", "load", "delete"]
    assert list(phases)[-len(expected) :] == expected
    assert "40 requests, 20 of them streams: 0 lost" in output.out
    assert [objects.reference(name) for name in REPOSITORIES] == simulated.references
    assert server.objects == {}


@pytest.mark.slow
def test_cluster_standard_serves_with_two_replicas_and_an_autoscaler(
    run: Callable[..., int], server: ApiServer, simulated: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code = run("standard")
    output = capsys.readouterr()
    assert exit_code == 0, output.out + output.err
    assert "to zero" not in lines(output.out)
    assert lines(output.out)["autoscaler"] == "ok"
    service = simulated.services[0]
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
    assert service["spec"]["predictor"]["minReplicas"] == service["spec"]["predictor"]["maxReplicas"] == 2
    assert f"POST {TOOL_PODS}load" in server.changes


def test_cluster_failed_download_ends_the_test_and_leaves_everything(
    run: Callable[..., int], server: ApiServer, simulated: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated.fails_to_download = True
    assert run("both") == 1
    output = capsys.readouterr()
    assert lines(output.out) == {"hub": "ok", "apply": "ok", "download": "FAILED"}
    assert re.fullmatch(r"e2e: Job model-download-\w+ failed; its pod's log has the reason\n", output.err)
    assert SERVICE in server.objects
    # A second run would mix with what is left.
    assert run("both") == 2
    assert f"namespace {NAMESPACE} exists already" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["knative", "standard"])
def test_cluster_overlay_has_the_images_that_the_workflow_loads(mode: str, tmp_path: Path) -> None:
    (loaded,) = re.findall(r"kind load docker-image (.+)", WORKFLOW.read_text())
    predictor, storage_initializer = loaded.split()
    objects.write_overlay(tmp_path, mode, Images(predictor, storage_initializer), "demo/arithmetic")
    overlay = render(tmp_path)
    assert {container["image"] for pod in overlay.pods for container in pod.containers} == set(loaded.split())
    assert {item["imagePullPolicy"] for pod in overlay.pods for item in pod.containers} == {"IfNotPresent"}
    assert cluster.parser().parse_args([]).predictor_image == predictor
    assert cluster.parser().parse_args([]).storage_initializer_image == storage_initializer


def test_cluster_pods_pass_pod_security(tmp_path: Path) -> None:
    [hub] = [manifest for manifest in objects.tools("image") if manifest["kind"] == "Pod"]
    objects.write_overlay(tmp_path, "standard", Images("predictor", "storage-initializer"), "demo/arithmetic")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "e2e"}, "spec": {"template": hub}}
    findings = security.check(Deployment((*render(tmp_path).objects, job)))
    assert [str(item) for item in findings if item.where == "Job/e2e" and item.source == "API server"] == []


def test_cluster_script_starts_the_program() -> None:
    command = ["bash", str(ROOT / "tests/e2e/cluster.sh"), "serverless"]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "invalid choice: 'serverless'" in done.stderr


def test_report_with_an_error_or_without_phases_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    failed = [report.failed]
    for errors in ([], ["stream at 2.0 s: the stream ended early"]):
        report.add(Phase("standard", "load", errors=errors))
        failed.append(report.failed)
    assert failed == [True, False, True]
    assert "stream at 2.0 s: the stream ended early" in capsys.readouterr().out


class Losing(BaseHTTPRequestHandler):
    """Answers rightly, with 503, with a stream that ends early, with no response, and wrongly, in turn."""

    protocol_version = "HTTP/1.1"
    server: "LosingServer"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        turn = next(self.server.turns)
        if turn == "reset":
            self.close_connection = True
            return
        text = f"3{client.ANSWER}" if turn != "wrong" else "43"
        is_stream = body.get("stream", False)
        end = "" if turn == "cut" else "data: [DONE]\n\n"
        event = json.dumps({"choices": [{"delta": {"content": text}}]})
        content = (f"data: {event}\n\n{end}" if is_stream else json.dumps({"text": text})).encode()
        self.send_response(503 if turn == "refused" else 200)
        self.send_header("Content-Type", "text/event-stream" if is_stream else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class LosingServer(ThreadingHTTPServer):
    """A server whose answers are given in order."""

    def __init__(self, *turns: str) -> None:
        super().__init__(("127.0.0.1", 0), Losing)
        self.turns = iter(turns)


@pytest.mark.parametrize(
    ("turn", "error"),
    [
        ("refused", "stream at .*ValueError: status 503"),
        ("cut", "stream at .*ValueError: the stream ended early"),
        ("reset", "stream at .*RemoteDisconnected"),
        ("wrong", "stream at .*unexpected answer '43'"),
    ],
)
def test_client_counts_a_lost_stream(turn: str, error: str) -> None:
    losing = LosingServer("right", turn, "right", "right")
    with serving(losing):
        result = client.load(f"http://127.0.0.1:{losing.server_port}", "llm", requests=4, seconds=0.4)
    assert (result["sent"], result["streams"], result["lost"]) == (4, 2, 1)
    assert re.match(error, result["errors"][0])
