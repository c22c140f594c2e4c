"""examples/open-webui: its objects, and what they refer to. Open WebUI itself is not run."""

import re
import shutil
from typing import Any

import pytest
import yaml

from devtools.paths import ROOT
from preflight import rendering
from preflight.checks import schema, security
from preflight.deployment import Deployment
from tests.e2e.cluster import objects as cluster

FOLDER = ROOT / "examples/open-webui"


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is required")
    rendered = rendering.render(FOLDER).objects
    found = {item["kind"]: item for item in rendered}
    assert len(found) == len(rendered)
    return found


def test_open_webui_objects_have_known_fields(objects: dict[str, Any]) -> None:
    assert {kind: schema.Schemas().problems(item) for kind, item in objects.items()} == {kind: [] for kind in objects}


def test_open_webui_pod_has_no_finding_of_security(objects: dict[str, Any]) -> None:
    overlay = rendering.render(ROOT / "kustomize/overlays/dev")
    both = Deployment((*overlay.objects, *objects.values()))
    assert len(both.pods) > len(overlay.pods)
    assert list(security.check(both)) == list(security.check(overlay))


def test_open_webui_uses_the_service_of_overlay_dev_inside_the_cluster(objects: dict[str, Any]) -> None:
    settings = objects["ConfigMap"]["data"]
    assert settings["OPENAI_API_BASE_URL"] == f"{cluster.URL}/v1"
    service = yaml.safe_load((ROOT / "manifests/serving/inference-service.yaml").read_text())
    timeout = service["spec"]["predictor"]["timeout"]
    assert settings["AIOHTTP_CLIENT_TIMEOUT"] == settings["AIOHTTP_CLIENT_TIMEOUT_MODEL_LIST"] == str(timeout)


def test_open_webui_references_are_defined(objects: dict[str, Any]) -> None:
    pod = objects["Deployment"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    assert container["image"] == "ghcr.io/open-webui/open-webui:v0.11.4-slim"
    assert container["envFrom"] == [{"configMapRef": {"name": objects["ConfigMap"]["metadata"]["name"]}}]
    assert pod["spec"]["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"]
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"][:1]]
    assert claims == [objects["PersistentVolumeClaim"]["metadata"]["name"]]
    assert {mount["name"] for mount in container["volumeMounts"]} == {item["name"] for item in pod["spec"]["volumes"]}
    assert objects["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert {item["metadata"].get("namespace") for kind, item in objects.items() if kind != "Namespace"} == {
        objects["Namespace"]["metadata"]["name"]
    }


def test_open_webui_readme_creates_the_secret(objects: dict[str, Any]) -> None:
    [container] = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    references = [item["valueFrom"]["secretKeyRef"] for item in container["env"]]
    readme = (FOLDER / "README.md").read_text()
    [name] = {reference["name"] for reference in references}
    assert f"create secret generic {name} -n {objects['Namespace']['metadata']['name']} " in readme
    assert {reference["key"] for reference in references} == set(re.findall(r"--from-literal=(\w+)=", readme))
