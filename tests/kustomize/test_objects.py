"""Objects of every kustomization: their fields, their names, the objects that they refer to."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from preflight.checks import containers, knative, kserve, references
from preflight.checks.schema import Schemas
from preflight.deployment import Deployment, Manifest
from tests.kustomize.conftest import DEV, OVERLAYS, UNCHECKED, Preflight, Render, Rendered, component_folder

LABELS = {"app.kubernetes.io/name", "app.kubernetes.io/component", "app.kubernetes.io/part-of"}
NOT_OURS = {"ConfigMap/config-features", "ConfigMap/config-defaults", "KnativeServing/knative-serving"}
"""Patches of Knative's own objects, whose labels Knative sets."""


def test_rendered_names_are_unique(rendered: Rendered) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in rendered.objects]
    assert names
    assert len(names) == len(set(names))


def test_rendered_fields_match_the_schemas(rendered: Rendered, schemas: Schemas) -> None:
    assert rendered.objects
    for manifest in rendered.objects:
        expected: list[str] | None = None if manifest["kind"] in UNCHECKED else []
        assert schemas.problems(manifest) == expected, manifest["metadata"]["name"]


@pytest.mark.parametrize(
    ("kind", "path", "field"),
    [
        ("InferenceService", ("spec", "predictor", "model"), "storageURI"),
        ("ServingRuntime", ("spec",), "protocolVersion"),
        ("PersistentVolumeClaim", ("spec",), "accessMode"),
        ("Job", ("spec", "template", "spec"), "restartPolice"),
    ],
)
def test_schemas_misspelled_field_is_a_problem(
    render: Render, schemas: Schemas, kind: str, path: tuple[str, ...], field: str
) -> None:
    manifest = copy.deepcopy(render(DEV).one(kind))
    inner = manifest
    for key in path:
        inner = inner[key]
    inner[field] = "x"
    problems = schemas.problems(manifest)
    assert problems
    [problem] = problems
    assert field in problem


def test_sdk_round_trip_keeps_every_field(overlay: Rendered, sdk_round_trip: Callable[[Manifest, str], Any]) -> None:
    assert overlay.objects
    for manifest in overlay.objects:
        if manifest["kind"] in ("PodMonitor", "PrometheusRule"):
            continue  # Neither has classes for them.
        version = manifest["apiVersion"].rpartition("/")[2]
        written = sdk_round_trip(manifest, f"{version.capitalize()}{manifest['kind']}")
        if manifest["kind"] == "InferenceService":
            assert written["spec"]["predictor"]["model"].pop("name") == ""  # the SDK's default
        assert written == manifest


def test_preflight_overlay_has_no_finding(overlay: Rendered, preflight_findings: Preflight) -> None:
    assert preflight_findings(overlay) == []


def test_preflight_component_has_no_finding(component: Rendered, preflight_findings: Preflight) -> None:
    assert preflight_findings(component) == []


def test_kserve_and_knative_checks_have_no_finding(deployment: Rendered) -> None:
    findings = [*kserve.check(deployment), *knative.check(deployment)]
    assert [str(finding) for finding in findings] == []


@pytest.mark.parametrize(
    ("kind", "path", "sentence"),
    [
        ("Deployment", ("spec", "template", "spec", "volumes", 1, "persistentVolumeClaim", "claimName"), "Claim 'x'"),
        ("Deployment", ("spec", "template", "spec", "volumes", 0, "configMap", "name"), "ConfigMap 'x'"),
        ("Deployment", ("spec", "template", "spec", "serviceAccountName"), "ServiceAccount 'x'"),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "volumeMounts", 0, "name"), "volume 'x'"),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "livenessProbe", "httpGet", "port"), "port 'x'"),
        ("Service", ("spec", "ports", 0, "targetPort"), "port 'x'"),
        ("Service", ("spec", "selector", "app.kubernetes.io/name"), "selects no pod"),
        ("RoleBinding", ("roleRef", "name"), "Role 'x'"),
        ("RoleBinding", ("subjects", 0, "name"), "ServiceAccount 'x'"),
    ],
)
def test_references_missing_target_of_another_pod_is_a_finding(
    render: Render, kind: str, path: tuple[str | int, ...], sentence: str
) -> None:
    objects = copy.deepcopy(render(component_folder("prometheus")).objects)
    inner: Any = next(manifest for manifest in objects if manifest["kind"] == kind)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "x"
    deployment = Deployment(objects)
    [finding] = [*references.check(deployment), *containers.check(deployment)]
    assert sentence in str(finding)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("selector", "matchLabels", references.PODS_OF), "x", "selects the pods of InferenceService 'x'"),
        (("targetPorts", 0, "number"), 80, "sends requests to port 80"),
        (("endpointPickerRef", "name"), "x", "Service 'x'"),
    ],
)
def test_references_wrong_inference_pool_is_a_finding(
    render: Render, path: tuple[str | int, ...], value: str | int, sentence: str
) -> None:
    objects = copy.deepcopy(render(component_folder("inference-pool")).objects)
    inner: Any = next(manifest for manifest in objects if manifest["kind"] == "InferencePool")["spec"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    [finding] = references.check(Deployment(objects))
    assert sentence in str(finding)


def test_references_inference_pool_in_knative_mode_is_a_finding(render: Render) -> None:
    objects = copy.deepcopy(render(component_folder("inference-pool")).objects)
    deployment = Deployment(objects)
    deployment.annotations["serving.kserve.io/deploymentMode"] = "Knative"
    [finding] = references.check(deployment)
    assert "bypasses Knative's activator" in str(finding)


def test_every_object_has_the_common_labels(rendered: Rendered) -> None:
    labels = {
        f"{manifest['kind']}/{manifest['metadata']['name']}": set(manifest["metadata"].get("labels", {}))
        for manifest in rendered.objects
    }
    assert labels
    assert {name for name, names in labels.items() if not names >= LABELS} <= NOT_OURS


def test_only_overlays_have_a_namespace_for_all_objects(deployment: Rendered) -> None:
    is_overlay = deployment.path in OVERLAYS
    expected = {deployment.one("Namespace")["metadata"]["name"]} if is_overlay else {None}
    namespaced = [manifest for manifest in deployment.objects if manifest["kind"] != "Namespace"]
    assert {manifest["metadata"].get("namespace") for manifest in namespaced} == expected
    assert bool(deployment.all("Namespace")) == is_overlay


def test_overlay_readme_names_its_required_secrets(overlay: Rendered) -> None:
    needed = {secret.name for secret in references.secrets(overlay) if not secret.optional}
    assert set(re.findall(r"Secret `([a-z-]+)`", overlay.readme)) == needed


def test_component_readme_names_its_secrets(component: Rendered) -> None:
    secrets = {secret.name for secret in references.secrets(component)}
    assert set(re.findall(r"Secret `([a-z-]+)`", component.readme)) == secrets


def test_every_config_map_is_used(deployment: Rendered) -> None:
    used: set[str] = set()
    for pod in deployment.pods:
        for container in pod.containers:
            used |= {source["configMapRef"]["name"] for source in container.get("envFrom", [])}
        used |= {volume["configMap"]["name"] for volume in pod.spec["volumes"] if "configMap" in volume}
    # Grafana selects dashboards by their label.
    dashboards = {config["metadata"]["name"] for config in deployment.all("ConfigMap") if is_dashboard(config)}
    assert used == {config["metadata"]["name"] for config in deployment.all("ConfigMap")} - dashboards


def is_dashboard(config_map: Manifest) -> bool:
    return "grafana_dashboard" in config_map["metadata"]["labels"]


def test_every_service_account_is_used(deployment: Rendered) -> None:
    accounts = {pod.spec["serviceAccountName"] for pod in deployment.pods}
    assert accounts == {account["metadata"]["name"] for account in deployment.all("ServiceAccount")}


def test_policy_and_monitor_selectors_match_a_pod(deployment: Rendered) -> None:
    # KServe labels the predictor's pods; a Deployment or Job labels its own.
    labels = [{"serving.kserve.io/inferenceservice": deployment.name}]
    labels += [job["spec"]["template"]["metadata"]["labels"] for job in deployment.all("Job")]
    kinds = ("NetworkPolicy", "PodMonitor", "InferencePool")
    for manifest in [manifest for kind in kinds for manifest in deployment.all(kind)]:
        selector = manifest["spec"].get("podSelector", manifest["spec"].get("selector")).get("matchLabels", {})
        assert any(selector.items() <= pod_labels.items() for pod_labels in labels), manifest["metadata"]["name"]


def test_serving_runtime_is_not_auto_selected(deployment: Rendered) -> None:
    assert deployment.runtime
    [model_format] = deployment.runtime["spec"]["supportedModelFormats"]
    assert model_format["name"] == "kserve-llm"
    assert model_format["autoSelect"] is False
