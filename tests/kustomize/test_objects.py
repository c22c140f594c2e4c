"""Every object of every kustomization: it renders, Kubernetes and KServe understand all of it, what it names exists."""

import copy
import re

import pytest

from preflight.checks import knative, kserve, references
from preflight.deployment import Deployment

UNCHECKED = {"KnativeServing"}
"""Kinds that no CRD is at hand for."""
LABELS = {"app.kubernetes.io/name", "app.kubernetes.io/component", "app.kubernetes.io/part-of"}
NOT_OURS = {"ConfigMap/config-features", "ConfigMap/config-defaults", "KnativeServing/knative-serving"}
"""Patches of objects that belong to Knative: their labels are not for us to set."""


def test_it_renders_with_no_name_twice(rendered):
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in rendered.objects]
    assert names
    assert len(names) == len(set(names))


def test_the_api_server_would_accept_every_field(rendered, schemas):
    for manifest in rendered.objects:
        expected = None if manifest["kind"] in UNCHECKED else []
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
def test_the_schema_check_finds_a_misspelt_field(render, tree, schemas, kind, path, field):
    manifest = copy.deepcopy(render(tree.dev).one(kind))
    inner = manifest
    for key in path:
        inner = inner[key]
    inner[field] = "x"
    [problem] = schemas.problems(manifest)
    assert field in problem


def test_the_kserve_sdk_and_the_kubernetes_client_keep_every_field(overlay, sdk_round_trip):
    for manifest in overlay.objects:
        if manifest["kind"] in ("PodMonitor", "PrometheusRule"):
            continue  # Neither knows them.
        version = manifest["apiVersion"].rpartition("/")[2]
        written = sdk_round_trip(manifest, f"{version.capitalize()}{manifest['kind']}")
        if manifest["kind"] == "InferenceService":
            assert written["spec"]["predictor"]["model"].pop("name") == ""  # the SDK's default
        assert written == manifest


def test_preflight_finds_nothing_wrong_with_it(overlay, look):
    assert look(overlay) == []


def test_preflight_finds_nothing_wrong_with_base_and_a_component(component, look):
    assert look(component) == []


def test_kserve_and_knative_admit_it(deployment):
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
def test_a_name_that_leads_nowhere_is_found_beside_the_predictor_as_well(render, tree, kind, path, sentence):
    objects = copy.deepcopy(render(tree.component("prometheus")).objects)
    inner = next(each for each in objects if each["kind"] == kind)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "x"
    [finding] = references.check(Deployment(objects))
    assert sentence in str(finding)


def test_every_object_is_labelled(rendered):
    for manifest in rendered.objects:
        if f"{manifest['kind']}/{manifest['metadata']['name']}" not in NOT_OURS:
            assert set(manifest["metadata"].get("labels", {})) >= LABELS, manifest["metadata"]["name"]


def test_only_overlays_have_a_namespace_and_all_their_objects_are_in_it(deployment, tree):
    is_overlay = deployment.path in tree.overlays
    expected = {deployment.one("Namespace")["metadata"]["name"]} if is_overlay else {None}
    assert {each["metadata"].get("namespace") for each in deployment.objects if each["kind"] != "Namespace"} == expected
    assert bool(deployment.all("Namespace")) == is_overlay


def test_the_secrets_that_an_overlay_needs_are_named_in_its_readme(overlay, tree):
    readme = (tree.root / overlay.path / "README.md").read_text()
    needed = {each.name for each in references.secrets(overlay) if not each.optional}
    assert set(re.findall(r"Secret `([a-z-]+)`", readme)) == needed


def test_the_secrets_that_a_component_names_are_named_in_its_readme(component, tree):
    readme = (tree.root / component.path / "README.md").read_text()
    pull = {"registry-credentials"} if component.path != tree.images else set()
    assert (
        set(re.findall(r"Secret `([a-z-]+)`", readme)) == {each.name for each in references.secrets(component)} - pull
    )


def test_every_config_map_is_used(deployment):
    named = set()
    for pod in deployment.pods:
        for container in pod.containers:
            named |= {source["configMapRef"]["name"] for source in container.get("envFrom", [])}
        named |= {volume["configMap"]["name"] for volume in pod.spec["volumes"] if "configMap" in volume}
    # Grafana finds its dashboards by their label.
    dashboards = {each["metadata"]["name"] for each in deployment.all("ConfigMap") if is_dashboard(each)}
    assert named == {config["metadata"]["name"] for config in deployment.all("ConfigMap")} - dashboards


def is_dashboard(config_map):
    return "grafana_dashboard" in config_map["metadata"]["labels"]


def test_every_service_account_is_used(deployment):
    accounts = {pod.spec["serviceAccountName"] for pod in deployment.pods}
    assert accounts == {account["metadata"]["name"] for account in deployment.all("ServiceAccount")}


def test_selectors_select_the_pods_that_they_are_about(deployment):
    """Of policies and monitors: KServe labels the predictor's pods, the Job's template has labels of its own."""
    labels = [{"serving.kserve.io/inferenceservice": deployment.name}]
    labels += [job["spec"]["template"]["metadata"]["labels"] for job in deployment.all("Job")]
    for manifest in [*deployment.all("NetworkPolicy"), *deployment.all("PodMonitor")]:
        selector = manifest["spec"].get("podSelector", manifest["spec"].get("selector")).get("matchLabels", {})
        assert any(selector.items() <= each.items() for each in labels), manifest["metadata"]["name"]


def test_the_predictor_takes_the_place_of_no_runtime_of_kserve(deployment):
    [model_format] = deployment.runtime["spec"]["supportedModelFormats"]
    assert model_format["name"] == "kserve-llm"
    assert model_format["autoSelect"] is False
