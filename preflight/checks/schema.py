"""Whether the API server would know every field: core kinds by Kubernetes' own schemas, others by their CRDs."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import yaml

from preflight.deployment import Deployment, Manifest, name_of
from preflight.findings import CannotLook, Finding

KUBERNETES_VERSION = "1.32"
"""The oldest that KServe v0.20 supports."""
_CORE = re.compile(r"v1|(apps|batch|autoscaling|policy)/v\d+|[a-z.]+\.k8s\.io/v\d+\w*")
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {"type": "object", "properties": {"labels": _STRINGS, "annotations": _STRINGS}}
_NO_CORE = ("gateway.networking.k8s.io/",)
"""Groups of k8s.io that are CustomResourceDefinitions all the same."""


class Schemas:
    """The schemas of custom kinds. Cheap to make; a schema is compiled when it is first asked for."""

    def __init__(self, definitions: Iterable[Manifest] = ()) -> None:
        self._schemas = {
            (definition["spec"]["group"], version["name"], definition["spec"]["names"]["kind"]): version["schema"]
            for definition in definitions
            for version in definition["spec"]["versions"]
        }
        self._validators: dict[tuple[str, str, str], jsonschema.Draft202012Validator] = {}

    def problems(self, manifest: Manifest) -> list[str] | None:
        """What is wrong, as `$.path: message`; None where no schema of the kind is at hand."""
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
    """Whether Kubernetes itself serves the group."""
    return bool(_CORE.fullmatch(api_version)) and not api_version.startswith(_NO_CORE)


def definitions_in(folder: Path) -> list[Manifest]:
    """The CustomResourceDefinitions of a folder, one or more in each `*.yaml`.

    Raises:
        CannotLook: there is none in it.
    """
    definitions = [
        document
        for path in sorted(folder.glob("*.yaml"))
        for document in yaml.load_all(path.read_text(), yaml.CSafeLoader)
        if document and document.get("kind") == "CustomResourceDefinition"
    ]
    if not definitions:
        raise CannotLook(f"{folder} holds no CustomResourceDefinition; name a folder with those of KServe with --crds.")
    return definitions


def check(deployment: Deployment, schemas: Schemas) -> Iterator[Finding]:
    """Unknown fields, wrong types, missing fields."""
    for manifest in deployment.objects:
        problems = schemas.problems(manifest)
        if problems is None:
            yield Finding(
                name_of(manifest),
                f"its fields were not checked, as no CRD of {manifest['apiVersion']} {manifest['kind']} is at hand",
                "name a folder that has it with --crds, or a cluster with --context",
                "warning",
            )
        for problem in problems or []:
            yield Finding(name_of(manifest), problem, "the API server refuses it, so correct or remove the field")


def _core_problems(manifest: Manifest) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"Kubernetes {KUBERNETES_VERSION} has no {manifest['apiVersion']} {manifest['kind']}"]
    return []


def _strict(schema: dict[str, Any], root: bool = False) -> dict[str, Any]:
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
