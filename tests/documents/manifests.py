"""Check documented YAML: kustomizations are rendered, objects validated against their schemas."""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from devtools.paths import ROOT
from preflight.checks import schema
from preflight.deployment import Manifest

KUSTOMIZATION_FIELDS = {
    *("apiVersion", "kind", "metadata", "namespace", "namePrefix", "nameSuffix", "resources", "components", "patches"),
    *(
        "configMapGenerator",
        "secretGenerator",
        "generatorOptions",
        "images",
        "labels",
        "commonAnnotations",
        "replacements",
    ),
    *("replicas", "transformers", "configurations"),
}
REMOTE = re.compile(r"(?:https://)?github\.com/OWNER/REPO(?:\.git)?//?(?P<path>[^?]*)(?:\?.*)?")
"""A folder of this repository, as a remote base."""
DOCUMENTED = Path("kustomize/overlays/documented")
"""The overlay with a documented kustomization."""
LEFT_OUT = "…"
"""Marks an excerpt, which is only parsed."""


def check(text: str, checkout: Path) -> None:
    """Check a block: a kustomization or a fragment of one is rendered on base, an object is validated.

    Raises:
        AssertionError: with the reason.
    """
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise AssertionError(str(error)) from error
    for document in documents:
        if not isinstance(document, dict) or LEFT_OUT in text:
            continue
        is_kustomization = document.get("kind") in ("Kustomization", "Component") or "kind" not in document
        if document.keys() <= KUSTOMIZATION_FIELDS and is_kustomization and document.keys() != {"metadata"}:
            _render_fragment(document, checkout)
        elif {"apiVersion", "kind"} <= document.keys():
            validate(document)
        elif document.keys() == {"spec"} and "predictor" in document["spec"]:
            about = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": "llm"}}
            validate(about | _without_nulls(document))


def validate(manifest: Manifest) -> None:
    """Validate an object; a custom kind without a definition in CRD_DIR is not validated.

    Raises:
        AssertionError: with the problems.
    """
    problems = _schemas().problems(manifest)
    assert not problems, f"{manifest['kind']}: {problems}"


def render(folder: Path, text: str) -> None:
    """Render a kustomization at a path below `folder`, or a folder of this repository as a remote base.

    Raises:
        AssertionError: with kubectl's message.
    """
    if remote := REMOTE.fullmatch(text):
        _render(ROOT / remote["path"], 0)
    elif not text.startswith(("https://", "github.com/")):
        path = folder / text
        assert path.is_dir(), f"{text} does not exist"
        newest = max(file.lstat().st_mtime_ns for top in _tops(path) for file in top.rglob("*"))
        _render(path, newest)


def _tops(path: Path) -> list[Path]:
    """Return the folders that a kustomization at this path may use."""
    tops = [parent for parent in path.parents if parent.name in ("kustomize", "manifests")]
    return [tops[-1].parent / name for name in ("kustomize", "manifests")] if tops else [path]


@cache
def _render(folder: Path, _newest_ns: int) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def _schemas() -> schema.Schemas:
    folder = os.environ.get("CRD_DIR")
    return schema.Schemas(schema.definitions_in(Path(folder)) if folder else [])


def _without_nulls(value: Any) -> Any:
    """Return fields without those that a patch removes."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _render_fragment(fragment: dict[str, Any], checkout: Path) -> None:
    """Render an overlay with the files of `dev` and the fields of a fragment, on base unless it has resources."""
    overlay = checkout / DOCUMENTED
    components = [_local(entry, checkout) for entry in fragment.get("components", [])]
    if fragment.keys() == {"components"} and len(components) == 1:
        # tests/kustomize renders every component on base.
        assert Path(os.path.normpath(overlay / components[0])).is_dir(), f"{components[0]} does not exist"
        return
    shutil.copytree(ROOT / "kustomize" / "overlays" / "dev", overlay, dirs_exist_ok=True)
    kustomization = {"resources": ["../../base"]} | fragment
    kustomization["resources"] = [_local(entry, checkout) for entry in kustomization["resources"]]
    kustomization["components"] = [*components, *(["../../components/images"] if "resources" not in fragment else [])]
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _local(entry: str, checkout: Path) -> str:
    remote = REMOTE.fullmatch(entry)
    return os.path.relpath(checkout / remote["path"], checkout / DOCUMENTED) if remote else entry
