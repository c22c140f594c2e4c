"""Validate fields: core kinds by Kubernetes' schemas, custom kinds by their CRDs."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import yaml

from preflight.deployment import Deployment, Manifest, name_of
from preflight.findings import CheckError, Finding

KUBERNETES_VERSION = "1.32"
"""The oldest version that KServe v0.20 supports."""
_CORE = re.compile(r"v1|(apps|batch|autoscaling|policy)/v\d+|[a-z.]+\.k8s\.io/v\d+\w*")
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {"type": "object", "properties": {"labels": _STRINGS, "annotations": _STRINGS}}
_NO_CORE = ("gateway.networking.k8s.io/", "inference.networking.k8s.io/")
"""Groups below k8s.io that are CustomResourceDefinitions."""


class Schemas:
    """Schemas of custom kinds, each compiled on first use."""

    def __init__(self, definitions: Iterable[Manifest] = ()) -> None:
        self._schemas = {
            (definition["spec"]["group"], version["name"], definition["spec"]["names"]["kind"]): version["schema"]
            for definition in definitions
            for version in definition["spec"]["versions"]
        }
        self._validators: dict[tuple[str, str, str], jsonschema.Draft202012Validator] = {}

    def problems(self, manifest: Manifest) -> list[str] | None:
        """Return problems as `$.path: message`; None without a schema of the kind."""
        api_version = str(manifest["apiVersion"])
        if is_core(api_version):
            return _core_problems(manifest)
        group, _, version = api_version.partition("/")
        key = (group, version, str(manifest["kind"]))
        if key not in self._schemas:
            return None
        if key not in self._validators:
            schema = _strict(self._schemas[key]["openAPIV3Schema"], root=True)
            self._validators[key] = jsonschema.Draft202012Validator(schema)
        return [f"{error.json_path}: {error.message}" for error in self._validators[key].iter_errors(manifest)]


def is_core(api_version: str) -> bool:
    """Return whether Kubernetes itself serves the group."""
    return bool(_CORE.fullmatch(api_version)) and not api_version.startswith(_NO_CORE)


def definitions_in(folder: Path) -> list[Manifest]:
    """Read the CustomResourceDefinitions of a folder's `*.yaml` files.

    Raises:
        CheckError: the folder contains none.
    """
    definitions = [
        document
        for path in sorted(folder.glob("*.yaml"))
        for document in yaml.load_all(path.read_text(), yaml.CSafeLoader)
        if document and document.get("kind") == "CustomResourceDefinition"
    ]
    if not definitions:
        raise CheckError(f"{folder} contains no CustomResourceDefinition. Set --crds to a folder with those of KServe.")
    return definitions


def check(deployment: Deployment, schemas: Schemas) -> Iterator[Finding]:
    """Yield unknown fields, wrong types and missing fields."""
    for manifest in deployment.objects:
        problems = schemas.problems(manifest)
        if problems is None:
            yield Finding(
                name_of(manifest),
                f"its fields were not checked: no CRD of {manifest['apiVersion']} {manifest['kind']}",
                "set --crds to a folder that contains it, or --context to a cluster",
                "kserve-llm",
                "warning",
            )
        for problem in problems or []:
            yield Finding(
                name_of(manifest), problem, "correct or remove the field, which the API server rejects", "API server"
            )


def _core_problems(manifest: Manifest) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"Kubernetes {KUBERNETES_VERSION} has no {manifest['apiVersion']} {manifest['kind']}"]
    return []


def _strict(schema: dict[str, Any], root: bool = False) -> dict[str, Any]:
    """Return the schema with unknown fields as errors; Kubernetes prunes them."""
    strict = dict(schema)
    if "properties" in schema:
        strict["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
    if "items" in schema:
        strict["items"] = _strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(schema["additionalProperties"])
    if root or schema.get("x-kubernetes-embedded-resource"):
        # The API server validates metadata without the CRD.
        strict["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": _METADATA}
    if (
        schema.get("type") == "object"
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        strict["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        strict.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    return {"anyOf": [strict, {"type": "null"}]} if schema.get("nullable") else strict
