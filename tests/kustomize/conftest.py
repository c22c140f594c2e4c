"""Renders every kustomization of the tree, once per session, into objects to ask questions of."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from preflight import offline
from preflight.checks import schema, settings
from preflight.checks.schema import Schemas
from preflight.deployment import Deployment, Manifest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(
    path.parent.relative_to(ROOT)
    for top in ("kustomize", "manifests")
    for path in (ROOT / top).rglob("kustomization.yaml")
)
OVERLAYS = [folder for folder in FOLDERS if folder.parts[1] == "overlays"]
COMPONENTS = [folder for folder in FOLDERS if folder.parts[1] == "components"]
DEPLOYMENTS = [folder for folder in FOLDERS if folder.parts[0] == "kustomize"]
BASE = Path("kustomize/base")
IMAGES = Path("kustomize/components/images")
PINNED = f"hf://owner/model:{'a' * 40}"


@dataclass(frozen=True)
class Rendered(Deployment):
    """The objects of one kustomization; a component stands for base with that component added."""

    path: Path
    """The folder that this is the rendering of."""

    def one(self, kind: str) -> Manifest:
        [manifest] = self.all(kind)
        return manifest

    @property
    def download(self) -> Manifest:
        """The container that downloads."""
        [(_, container)] = self.downloads
        return container


@cache
def _render(folder: Path) -> tuple[Manifest, ...]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    assert not done.stderr, f"{folder} renders with a warning: {done.stderr}"
    return tuple(yaml.load_all(done.stdout, yaml.CSafeLoader))


@pytest.fixture(scope="session")
def render_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rendered]:
    """Renders a folder below a throw-away overlay, which adds components and says its own MODEL_REFERENCE."""

    overlays = tmp_path_factory.mktemp("overlays").resolve()

    def render(folder: Path, *components: Path, reference: str = PINNED, **predictor: str) -> Rendered:
        # Not by the factory, whose numbers several threads would fight for.
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
        return Rendered(_render(above), components[0] if components else folder)

    return render


@pytest.fixture(scope="session")
def render(render_with: Callable[..., Rendered]) -> Callable[[Path], Rendered]:
    """Renders a folder of the tree as it is; a component on base, with images."""

    @cache
    def render(folder: Path) -> Rendered:
        if folder in COMPONENTS:
            return render_with(BASE, *dict.fromkeys([folder, IMAGES]))
        return Rendered(_render(ROOT / folder), folder)

    return render


@pytest.fixture(params=FOLDERS, ids=str)
def rendered(request: pytest.FixtureRequest, render: Callable[[Path], Rendered]) -> Rendered:
    """Every kustomization of the tree in turn."""
    return render(request.param)


@pytest.fixture(params=DEPLOYMENTS, ids=str)
def deployment(request: pytest.FixtureRequest, render: Callable[[Path], Rendered]) -> Rendered:
    """Base, every overlay and every component in turn: what has an InferenceService."""
    return render(request.param)


@pytest.fixture(params=OVERLAYS, ids=str)
def overlay(request: pytest.FixtureRequest, render: Callable[[Path], Rendered]) -> Rendered:
    """Every overlay in turn."""
    return render(request.param)


@pytest.fixture(params=COMPONENTS, ids=str)
def component(request: pytest.FixtureRequest, render: Callable[[Path], Rendered]) -> Rendered:
    """Every component in turn, on base."""
    return render(request.param)


@pytest.fixture(scope="session")
def tree() -> SimpleNamespace:
    """Where things are."""
    return SimpleNamespace(
        root=ROOT,
        kustomize=ROOT / "kustomize",
        manifests=ROOT / "manifests",
        folders=FOLDERS,
        base=BASE,
        overlays=OVERLAYS,
        components=COMPONENTS,
        dev=Path("kustomize/overlays/dev"),
        prod=Path("kustomize/overlays/prod"),
        images=IMAGES,
        knative_config_map=Path("manifests/cluster/knative-config-map"),
        knative_serving=Path("manifests/cluster/knative-serving"),
        storage_container=Path("manifests/cluster/storage-container"),
        component=lambda name: Path("kustomize/components") / name,
    )


class Remembering(Schemas):
    """As the original, which reads megabytes of JSON for every object; most objects are in many renderings."""

    def problems(self, manifest: Manifest) -> list[str] | None:
        """What is wrong with an object, asked once."""
        return self._remembered(json.dumps(manifest))

    @cache  # noqa: B019 - there is one, and it lives as long as the session
    def _remembered(self, text: str) -> list[str] | None:
        return super().problems(json.loads(text))


@pytest.fixture(scope="session")
def definitions() -> list[Manifest]:
    """The CustomResourceDefinitions in CRD_DIR; none where it is not set."""
    folder = os.environ.get("CRD_DIR")
    return schema.definitions_in(Path(folder)) if folder else []


@pytest.fixture(scope="session")
def schemas(definitions: list[Manifest]) -> Schemas:
    """What the API server knows."""
    if not definitions:
        pytest.skip("CRD_DIR is not set: a folder with the CRDs of KServe, Prometheus' operator and KEDA")
    return Remembering(definitions)


@pytest.fixture(scope="session")
def look(definitions: list[Manifest]) -> Callable[[Deployment], list[str]]:
    """What preflight says of a rendering; without CRD_DIR, custom kinds are taken as they are."""
    schemas, known = Remembering(definitions), settings.known_keys(ROOT / BASE)

    def look(rendered: Deployment) -> list[str]:
        findings = offline.check(rendered, schemas, known)
        return [str(finding) for finding in findings if definitions or "were not checked" not in finding.problem]

    return look


@pytest.fixture(scope="session")
def sdk_round_trip() -> Callable[[Manifest, str], Manifest]:
    """Loads a manifest into a class of the KServe SDK or the Kubernetes client, and writes it out again."""
    import kserve
    import kubernetes.client
    from kserve.api_client import ApiClient

    def load(value: Any, type_name: str) -> Any:
        """As the clients' own deserializers, of which neither knows the classes and the notation of the other."""
        if matched := re.fullmatch(r"[Ll]ist\[(.+)\]", type_name):
            return [load(each, matched[1]) for each in value]
        model = getattr(kserve, type_name, None) or getattr(kubernetes.client, type_name, None)
        if model is None:
            return value
        types = model.openapi_types
        known = {name: key for name, key in model.attribute_map.items() if key in value}
        return model(**{name: load(value[key], types[name]) for name, key in known.items()})

    def round_trip(manifest: Manifest, class_name: str) -> Manifest:
        # Not the Kubernetes client's: from version 37 on it writes the SDK's classes in snake case.
        return ApiClient().sanitize_for_serialization(load(manifest, class_name))

    return round_trip
