"""Renders every kustomization of the tree, once per session, into plain dictionaries to ask questions of."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

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

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """The objects of one kustomization; a component stands for base with that component added."""

    folder: Path
    objects: list[Manifest]

    def all(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.objects if manifest["kind"] == kind]

    def one(self, kind: str) -> Manifest:
        [manifest] = self.all(kind)
        return manifest

    @property
    def service(self) -> Manifest:
        """`spec.predictor` of the InferenceService."""
        return self.one("InferenceService")["spec"]["predictor"]

    @property
    def predictor(self) -> Manifest:
        """The container that KServe makes of the ServingRuntime's and the InferenceService's `model`."""
        [container] = self.one("ServingRuntime")["spec"]["containers"]
        model = self.service["model"]
        name = self.one("InferenceService")["metadata"]["name"]
        return {
            **container,
            **{key: model[key] for key in ("resources", "envFrom") if key in model},
            "args": [arg.replace("{{.Name}}", name) for arg in container["args"] + model.get("args", [])],
            "env": container.get("env", []) + model.get("env", []),
        }

    @property
    def download(self) -> Manifest:
        """The container of the download Job."""
        [container] = self.one("Job")["spec"]["template"]["spec"]["containers"]
        return container

    def environment(self, container: Manifest) -> dict[str, str]:
        """What the process sees, secrets aside; a KeyError where a ConfigMap or a key of it does not exist."""
        maps = {config["metadata"]["name"]: config["data"] for config in self.all("ConfigMap")}
        seen: dict[str, str] = {}
        for source in container.get("envFrom", []):
            seen |= maps[source["configMapRef"]["name"]]
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            if "configMapKeyRef" in source:
                seen[variable["name"]] = maps[source["configMapKeyRef"]["name"]][source["configMapKeyRef"]["key"]]
            elif "value" in variable:
                seen[variable["name"]] = variable["value"]
        return seen


@cache
def _render(folder: Path) -> list[Manifest]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    assert not done.stderr, f"{folder} renders with a warning: {done.stderr}"
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@pytest.fixture(scope="session")
def render_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rendered]:
    """Renders a folder below a throw-away overlay, which adds a component or says its own MODEL_REFERENCE."""

    def render(
        folder: Path, component: Path | None = None, reference: str = "hf://owner/model", **predictor: str
    ) -> Rendered:
        above = tmp_path_factory.mktemp("overlay").resolve()
        kustomization = {
            "resources": [os.path.relpath(ROOT / folder, above)],
            "components": [os.path.relpath(ROOT / component, above)] if component else [],
            "configMapGenerator": [
                {"name": "model-download", "behavior": "merge", "literals": [f"MODEL_REFERENCE={reference}"]},
                {"name": "predictor", "behavior": "merge", "literals": [f"{k}={v}" for k, v in predictor.items()]},
            ],
        }
        (above / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return Rendered(component or folder, _render(above))

    return render


@pytest.fixture(scope="session")
def render(render_with: Callable[..., Rendered]) -> Callable[[Path], Rendered]:
    """Renders a folder of the tree as it is, a component on base."""

    @cache
    def render(folder: Path) -> Rendered:
        return render_with(BASE, folder) if folder in COMPONENTS else Rendered(folder, _render(ROOT / folder))

    return render


@pytest.fixture(params=FOLDERS, ids=str)
def rendered(request: pytest.FixtureRequest, render: Callable[[Path], Rendered]) -> Rendered:
    """Every kustomization of the tree in turn."""
    return render(request.param)


@pytest.fixture(params=DEPLOYMENTS, ids=str)
def deployment(request: pytest.FixtureRequest, render: Callable[[Path], Rendered]) -> Rendered:
    """Base, every overlay and every component in turn: what has an InferenceService and a Job."""
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
        base=BASE,
        overlays=OVERLAYS,
        dev=Path("kustomize/overlays/dev"),
        prod=Path("kustomize/overlays/prod"),
        components=COMPONENTS,
        images=Path("kustomize/components/images"),
    )


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


@pytest.fixture(scope="session")
def schema_errors() -> Callable[[Manifest], list[str]]:
    """What the API server would say to a manifest with strict field validation, by the CRDs in CRD_DIR."""
    folder = os.environ.get("CRD_DIR")
    if not folder:
        pytest.skip("CRD_DIR is not set: a folder with the CRDs of KServe, one <group>_<plural>.yaml each")

    @cache
    def validator(group: str, version: str, kind: str) -> jsonschema.Draft202012Validator:
        text = (Path(folder) / f"{group}_{kind.lower()}s.yaml").read_text()
        versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
        [schema] = [entry["schema"]["openAPIV3Schema"] for entry in versions if entry["name"] == version]
        return jsonschema.Draft202012Validator(_strict(schema, root=True))

    def errors(manifest: Manifest) -> list[str]:
        group, version = manifest["apiVersion"].split("/")
        found = validator(group, version, manifest["kind"]).iter_errors(manifest)
        return [f"{error.json_path}: {error.message}" for error in found]

    return errors


def _strict(schema: Manifest, root: bool = False) -> Manifest:
    """The schema as Kubernetes means it: what it does not know, it prunes, so unknown is an error."""
    strict = dict(schema)
    if "properties" in schema:
        strict["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
    if "items" in schema:
        strict["items"] = _strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(schema["additionalProperties"])
    if root or schema.get("x-kubernetes-embedded-resource"):
        # The API server itself knows what metadata holds.
        strict["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}}
    if (
        schema.get("type") == "object"
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        strict["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        strict.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    return {"anyOf": [strict, {"type": "null"}]} if schema.get("nullable") else strict
