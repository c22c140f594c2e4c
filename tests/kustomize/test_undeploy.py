"""`kustomize/undeploy.sh` with the real kubectl, against an API server on loopback."""

import copy
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devtools.paths import ROOT
from tests.api_server import ApiServer
from tests.kustomize.conftest import DEV, RAY, Render, Rendered
from tests.loopback import serving

NAMESPACE = "kserve-llm-dev"
POD = f"/api/v1/namespaces/{NAMESPACE}/pods/llm-predictor-1"
CLAIM = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims/models"
SERVICE = f"/apis/serving.kserve.io/v1beta1/namespaces/{NAMESPACE}/inferenceservices/llm"
Undeploy = Callable[..., "subprocess.CompletedProcess[str]"]


POD_OF_THE_SERVICE = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "llm-predictor-1",
        "namespace": NAMESPACE,
        "labels": {"serving.kserve.io/inferenceservice": "llm"},
    },
}
DELETION_PROTECTION = Path("manifests/cluster/deletion-protection")


class Controller:
    """Acts as KServe: a stopped service loses its pod a while after the annotation. Records what is deleted before."""

    def __init__(self, stops: bool = True) -> None:
        self.stops = stops
        self.too_early: list[str] = []

    def __call__(self, server: ApiServer, change: str) -> None:
        if change.startswith("DELETE") and POD in server.objects:
            self.too_early.append(change)
        annotations = server.objects.get(SERVICE, {}).get("metadata", {}).get("annotations", {})
        is_running = self.stops and POD in server.objects
        if is_running and change == f"PATCH {SERVICE}" and annotations.get("serving.kserve.io/stop") == "true":
            removal = threading.Timer(0.3, server.remove, [POD])
            removal.daemon = True
            removal.start()


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
def server(request: pytest.FixtureRequest, render: Render, controller: Controller) -> Iterator[ApiServer]:
    """A cluster on which overlay dev is deployed, with a running pod; or another overlay, without."""
    overlay: Path | None = getattr(request, "param", None)
    pods = [] if overlay else [POD_OF_THE_SERVICE]
    server = ApiServer([*copy.deepcopy(render(overlay or DEV).objects), *pods], controller)
    with serving(server):
        yield server


@pytest.fixture
def undeploy(server: ApiServer, tmp_path: Path) -> Undeploy:
    """Runs the script, as `make undeploy` does."""
    server.write_kubeconfig(tmp_path / "config")
    environment = os.environ | {"KUBECONFIG": str(tmp_path / "config"), "KUBECACHEDIR": str(tmp_path)}

    def undeploy(claim: str = "keep", timeout: str = "60s", overlay: Path = DEV) -> "subprocess.CompletedProcess[str]":
        command = ["make", "--silent", "undeploy", f"OVERLAY={overlay}", f"CLAIM={claim}"]
        return subprocess.run(
            command, cwd=ROOT, env=environment | {"TIMEOUT": timeout}, capture_output=True, text=True, check=False
        )

    return undeploy


def test_undeploy_waits_for_the_pods_and_keeps_the_claim(
    undeploy: Undeploy, server: ApiServer, controller: Controller
) -> None:
    done = undeploy()
    assert done.returncode == 0, done.stderr
    assert set(server.objects) == {CLAIM, f"/api/v1/namespaces/{NAMESPACE}"}
    assert controller.too_early == []
    assert server.changes[0] == f"PATCH {SERVICE}"
    assert f"kept in namespace {NAMESPACE}: persistentvolumeclaim/models, with the weights" in done.stdout
    assert server.objects[CLAIM]["metadata"]["labels"]["kserve-llm/deletion"] == "protected"


def test_undeploy_deletes_claim_and_namespace_last_on_request(
    undeploy: Undeploy, server: ApiServer, controller: Controller
) -> None:
    done = undeploy("delete")
    assert done.returncode == 0, done.stderr
    assert server.objects == {}
    assert controller.too_early == []
    namespace = f"/api/v1/namespaces/{NAMESPACE}"
    # The label is removed first, since a policy may deny the deletion.
    assert server.changes[-4:] == [f"{verb} {path}" for path in (CLAIM, namespace) for verb in ("PATCH", "DELETE")]
    assert "kserve-llm/deletion" not in server.labels_at_deletion[CLAIM]


@pytest.mark.slow
def test_undeploy_at_zero_replicas_keeps_a_namespace_with_another_claim(undeploy: Undeploy, server: ApiServer) -> None:
    server.remove(POD)
    other = copy.deepcopy(server.objects[CLAIM])
    other["metadata"]["name"] = "team-a-models"
    server.objects[CLAIM.replace("models", "team-a-models")] = other
    done = undeploy("delete")
    assert done.returncode == 0, done.stderr
    assert f"kept: namespace/{NAMESPACE}, which also contains persistentvolumeclaim/team-a-models" in done.stdout
    assert len(server.objects) == 2


@pytest.mark.slow
def test_undeploy_twice_changes_nothing_more(undeploy: Undeploy, server: ApiServer) -> None:
    assert undeploy("delete").returncode == 0
    server.changes.clear()
    done = undeploy("delete")
    assert (done.returncode, server.changes) == (0, []), done.stderr


@pytest.mark.slow
def test_undeploy_deletes_nothing_while_pods_remain(
    undeploy: Undeploy, server: ApiServer, controller: Controller
) -> None:
    controller.stops = False
    done = undeploy("delete", timeout="1s")
    assert done.returncode != 0
    assert "timed out waiting for the condition on pods/llm-predictor-1" in done.stderr
    assert server.changes == [f"PATCH {SERVICE}"]


@pytest.mark.parametrize("server", [RAY], indirect=True)
def test_undeploy_ray_service_is_deleted_first(undeploy: Undeploy, server: ApiServer) -> None:
    done = undeploy("delete", overlay=RAY)
    assert done.returncode == 0, done.stderr
    assert server.objects == {}
    namespace = "kserve-llm-rayservice"
    assert server.changes[0] == f"DELETE /apis/ray.io/v1/namespaces/{namespace}/rayservices/llm"
    assert server.changes[-1] == f"DELETE /api/v1/namespaces/{namespace}"


@pytest.mark.parametrize("arguments", [(), ("",), (str(DEV), "drop")])
def test_undeploy_with_wrong_arguments_prints_its_usage(arguments: tuple[str, ...]) -> None:
    command = ["bash", "kustomize/undeploy.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: kustomize/undeploy.sh OVERLAY [keep|delete]\n")


def test_deletion_protection_selects_claims_and_namespaces_of_overlays(render: Render, overlay: Rendered) -> None:
    policy = render(DELETION_PROTECTION).one("ValidatingAdmissionPolicy")
    binding = render(DELETION_PROTECTION).one("ValidatingAdmissionPolicyBinding")
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    constraints = policy["spec"]["matchConstraints"]
    [rule] = constraints["resourceRules"]
    assert (rule["operations"], rule["resources"]) == (["DELETE"], ["persistentvolumeclaims", "namespaces"])
    selected = constraints["objectSelector"]["matchLabels"].items()
    protected = [manifest["kind"] for manifest in overlay.objects if selected <= manifest["metadata"]["labels"].items()]
    assert sorted(protected) == ["Namespace", "PersistentVolumeClaim"]
