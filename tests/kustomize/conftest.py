"""Renderings of every kustomization of the tree, made once per session."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from devtools.paths import ROOT
from preflight import offline
from preflight.checks import schema
from preflight.checks.schema import Schemas
from preflight.deployment import Deployment, Manifest
from tests.preflight.conftest import CachedSchemas

RENAMING = Path("kustomize/renaming")
"""A transformer, not objects."""
FOLDERS = sorted(
    path.parent.relative_to(ROOT)
    for top in ("kustomize", "manifests")
    for path in (ROOT / top).rglob("kustomization.yaml")
    if path.parent != ROOT / RENAMING
)
OVERLAYS = [folder for folder in FOLDERS if folder.parts[1] == "overlays"]
COMPONENTS = [folder for folder in FOLDERS if folder.parts[1] == "components"]
RAY = Path("kustomize/overlays/rayservice")
DEPLOYMENTS = [folder for folder in FOLDERS if folder.parts[0] == "kustomize" and folder != RAY]
"""Kustomizations with an InferenceService: base, overlays and components."""
KUSTOMIZE, MANIFESTS = ROOT / "kustomize", ROOT / "manifests"
HOW_TO = ROOT / "docs/how-to"
GOLDEN = ROOT / "tests/kustomize/golden"
BASE = Path("kustomize/base")
DEV = Path("kustomize/overlays/dev")
PROD = Path("kustomize/overlays/prod")
IMAGES = Path("kustomize/components/images")
KNATIVE_CONFIG_MAP = Path("manifests/cluster/knative-config-map")
KNATIVE_SERVING = Path("manifests/cluster/knative-serving")
STORAGE_CONTAINER = Path("manifests/cluster/storage-container")
CLUSTER_RUNTIME = Path("manifests/cluster/runtime")
UNCHECKED = {"KnativeServing", "InferencePool"}
"""Kinds without a CRD in CRD_DIR."""
PINNED = f"hf://owner/model:{'a' * 40}"

Render = Callable[[Path], "Rendered"]
Preflight = Callable[[Deployment], list[str]]


def component_folder(name: str) -> Path:
    return Path("kustomize/components") / name


@dataclass(frozen=True)
class Rendered(Deployment):
    """The objects of one kustomization; a component is rendered on top of base."""

    path: Path
    """The folder that was rendered."""

    @property
    def readme(self) -> str:
        return (ROOT / self.path / "README.md").read_text()

    def one(self, kind: str) -> Manifest:
        [manifest] = self.all(kind)
        return manifest

    @property
    def download(self) -> Manifest:
        """The container that downloads."""
        [(_, container)] = self.downloads
        return container


class RenderWith(Protocol):
    """Renders a folder with components and settings added."""

    def __call__(self, folder: Path, *components: Path, reference: str = ..., **predictor: str) -> Rendered: ...


def documented_service() -> tuple[str, Manifest]:
    """Return the InferenceService without an overlay that the documentation shows, as text and parsed."""
    [text] = re.findall(r"```yaml\n(.*?)```", (HOW_TO / "platform-team.md").read_text(), re.DOTALL)
    return text, yaml.safe_load(text)


def with_cluster_runtime(service: Manifest, runtime: Manifest) -> Deployment:
    """Return a deployment with this runtime, which KServe merges like a namespaced one."""
    named = {**runtime, "kind": "ServingRuntime"}
    predictor = service["spec"]["predictor"]
    model = {**predictor["model"], "runtime": runtime["metadata"]["name"]}
    return Deployment(({**service, "spec": {"predictor": {**predictor, "model": model}}}, named))


def kubectl_with(version: str) -> Path:
    """Return the kubectl that contains this version of kustomize."""
    kubectl = ROOT / ".kubectls" / version / "kubectl"
    if not kubectl.exists():
        pytest.skip("not installed; `make kubectls` installs it")
    return kubectl


def kustomize(folder: Path) -> tuple[Manifest, ...]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    assert not done.stderr, f"{folder} renders with a warning: {done.stderr}"
    return tuple(yaml.load_all(done.stdout, yaml.CSafeLoader))


@pytest.fixture(scope="session")
def render_with(tmp_path_factory: pytest.TempPathFactory) -> RenderWith:
    """Renders a folder through a temporary overlay that adds components and sets MODEL_REFERENCE."""
    overlays = tmp_path_factory.mktemp("overlays").resolve()

    @cache
    def render(folder: Path, *components: Path, reference: str = PINNED, **predictor: str) -> Rendered:
        # mkdtemp is safe with threads; the factory's numbering is not.
        above = Path(tempfile.mkdtemp(dir=overlays))
        kustomization = {
            "resources": [os.path.relpath(ROOT / folder, above)],
            "components": [os.path.relpath(ROOT / component, above) for component in components],
            "configMapGenerator": [
                {"name": "model-download", "behavior": "merge", "literals": [f"MODEL_REFERENCE={reference}"]},
                {"name": "predictor", "behavior": "merge", "literals": [f"{k}={v}" for k, v in predictor.items()]},
            ],
        }
        (above / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return Rendered(kustomize(above), components[0] if components else folder)

    return render


@pytest.fixture(scope="session")
def render(render_with: RenderWith) -> Render:
    """Renders a folder of the tree unchanged; a component on base, with images."""

    @cache
    def render(folder: Path) -> Rendered:
        if folder in COMPONENTS:
            return render_with(BASE, *dict.fromkeys([folder, IMAGES]))
        return Rendered(kustomize(ROOT / folder), folder)

    return render


@pytest.fixture(params=FOLDERS, ids=str)
def rendered(request: pytest.FixtureRequest, render: Render) -> Rendered:
    """Every kustomization of the tree in turn."""
    return render(request.param)


@pytest.fixture(params=DEPLOYMENTS, ids=str)
def deployment(request: pytest.FixtureRequest, render: Render) -> Rendered:
    """Base, every overlay with an InferenceService and every component in turn."""
    return render(request.param)


@pytest.fixture(params=OVERLAYS, ids=str)
def overlay(request: pytest.FixtureRequest, render: Render) -> Rendered:
    """Every overlay in turn."""
    return render(request.param)


@pytest.fixture(params=COMPONENTS, ids=str)
def component(request: pytest.FixtureRequest, render: Render) -> Rendered:
    """Every component in turn, on base."""
    return render(request.param)


@pytest.fixture(scope="session")
def definitions() -> list[Manifest]:
    """The CustomResourceDefinitions in CRD_DIR; none where it is not set."""
    folder = os.environ.get("CRD_DIR")
    return schema.definitions_in(Path(folder)) if folder else []


@pytest.fixture(scope="session")
def cached_schemas(definitions: list[Manifest]) -> Schemas:
    return CachedSchemas(definitions)


@pytest.fixture(scope="session")
def schemas(definitions: list[Manifest], cached_schemas: Schemas) -> Schemas:
    """The schemas of core and custom kinds."""
    if not definitions:
        pytest.skip("CRD_DIR is not set: a folder with the CRDs of KServe, Prometheus' operator and KEDA")
    return cached_schemas


@pytest.fixture(scope="session")
def preflight_findings(definitions: list[Manifest], cached_schemas: Schemas) -> Preflight:
    """Preflight's findings of a rendering; without CRD_DIR, custom kinds are not validated."""

    def findings(rendered: Deployment) -> list[str]:
        findings = offline.check(rendered, cached_schemas)
        unchecked = UNCHECKED if definitions else {manifest["kind"] for manifest in rendered.objects}
        return [
            str(finding)
            for finding in findings
            if "were not checked" not in finding.problem or finding.where.partition("/")[0] not in unchecked
        ]

    return findings


@pytest.fixture(scope="session")
def sdk_round_trip() -> Callable[[Manifest, str], Any]:
    """Loads a manifest into a class of the KServe SDK or the Kubernetes client, and serializes it again."""
    import kserve
    import kubernetes.client
    from kserve.api_client import ApiClient

    def load(value: Any, type_name: str) -> Any:
        """Deserialize with the classes and notations of both clients; neither knows the other's."""
        if matched := re.fullmatch(r"[Ll]ist\[(.+)\]", type_name):
            return [load(item, matched[1]) for item in value]
        model = getattr(kserve, type_name, None) or getattr(kubernetes.client, type_name, None)
        if model is None:
            return value
        types = model.openapi_types
        keys = {name: key for name, key in model.attribute_map.items() if key in value}
        return model(**{name: load(value[key], types[name]) for name, key in keys.items()})

    def round_trip(manifest: Manifest, class_name: str) -> Any:
        # Not the Kubernetes client's: from version 37 on it writes the SDK's classes in snake case.
        return ApiClient().sanitize_for_serialization(load(manifest, class_name))

    return round_trip
