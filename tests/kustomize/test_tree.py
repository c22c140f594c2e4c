"""Files of kustomize/ and manifests/: READMEs, folders, objects. Nothing is rendered, so kubectl is not needed."""

import re
from pathlib import Path

import pytest
import yaml

from devtools.paths import ROOT
from preflight.deployment import Manifest
from tests.kustomize.conftest import (
    BASE,
    CLUSTER_RUNTIME,
    COMPONENTS,
    HOW_TO,
    IMAGES,
    KUSTOMIZE,
    MANIFESTS,
    OVERLAYS,
    PROD,
    RENAMING,
    STORAGE_CONTAINER,
)

HELM_VALUES = {
    *("imagePullSecrets", "nameOverride", "fullnameOverride", "replicaCount", "logger.level", "resources"),
    *("image.registry", "image.repository", "image.pullPolicy", "image.tag"),
    *(f"modelDownloader.image.{key}" for key in ("registry", "repository", "pullPolicy", "tag")),
    *("model.name", "model.path", "model.bitAndBytes.enabled", "pvc.name", "pvc.storageSize"),
    *("secret.enabled", "secret.hfToken", "podLabels", "podAnnotations", "podSecurityContext", "securityContext"),
    *(f"serviceAccount.{key}" for key in ("create", "automount", "annotations", "name")),
    *(f"service.{key}" for key in ("type", "port", "name", "annotations")),
    *(f"ingress.{key}" for key in ("enabled", "className", "annotations", "hosts", "tls")),
    *("livenessProbe", "readinessProbe", "volumes", "volumeMounts", "nodeSelector", "tolerations", "affinity"),
    *("autoscaling.enabled", "autoscaling.minReplicas", "autoscaling.maxReplicas"),
    *("autoscaling.targetCPUUtilizationPercentage", "autoscaling.targetMemoryUtilizationPercentage"),
    *("prometheus.enabled", "prometheus.path", "prometheus.port"),
}
"""Every value of the Helm chart that the overlays replace."""
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
MENU = re.compile(r"^\| \[`([^`]+)`\]\(", re.MULTILINE)


def documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def kustomization(folder: Path) -> Manifest:
    [document] = documents(folder / "kustomization.yaml")
    return document


def files(*tops: Path, pattern: str) -> list[Path]:
    """The files below each of `tops`, of which each has some."""
    matches = [list(top.rglob(pattern)) for top in tops]
    assert all(matches), (tops, pattern)
    return [path for match in matches for path in match]


def object_files() -> list[Path]:
    """The files in manifests/ that hold objects, in contrast to kustomize's and Prometheus' own."""
    other = ("kustomization.yaml", "image-fields.yaml", "rules.yaml")
    return [path for path in files(MANIFESTS, pattern="*.yaml") if path.name not in other]


def test_readme_lists_every_overlay_and_component_once() -> None:
    menu = MENU.findall((KUSTOMIZE / "README.md").read_text())
    assert sorted(menu) == sorted(str(folder.relative_to("kustomize")) for folder in (BASE, *OVERLAYS, *COMPONENTS))


def test_every_folder_of_overlays_and_components_is_a_kustomization() -> None:
    assert OVERLAYS
    assert COMPONENTS
    folders = {path.relative_to(ROOT) for top in ("overlays", "components") for path in (KUSTOMIZE / top).iterdir()}
    assert folders == {*OVERLAYS, *COMPONENTS}


def test_manifests_readme_lists_every_object() -> None:
    listed = MENU.findall((MANIFESTS / "README.md").read_text())
    assert set(listed) == {str(path.relative_to(MANIFESTS)) for path in object_files()}


def test_manifest_file_holds_one_object_and_is_a_resource_of_its_folder() -> None:
    for path in object_files():
        [manifest] = documents(path)
        assert {"apiVersion", "kind", "metadata"} <= set(manifest), path
        assert path.name in kustomization(path.parent)["resources"], path


def test_kustomize_defines_no_object_except_the_namespaces_of_overlays() -> None:
    defined = {
        path.parent.relative_to(ROOT): [
            manifest["kind"]
            for resource in kustomization(path.parent).get("resources", [])
            if (path.parent / resource).is_file()
            for manifest in documents(path.parent / resource)
        ]
        for path in files(KUSTOMIZE, pattern="kustomization.yaml")
    }
    assert {folder: kinds for folder, kinds in defined.items() if kinds} == {
        **{folder: ["Namespace"] for folder in OVERLAYS},
        RENAMING: ["ReplacementTransformer"],
    }


def test_every_file_of_kustomize_is_used_by_its_kustomization() -> None:
    patches = [path for path in files(KUSTOMIZE, pattern="*.yaml") if path.name != "kustomization.yaml"]
    assert patches
    for path in patches:
        assert path.name in path.with_name("kustomization.yaml").read_text(), path


def test_only_overlays_and_cluster_manifests_set_a_namespace() -> None:
    setting = {
        path.parent.relative_to(ROOT)
        for path in files(KUSTOMIZE, MANIFESTS, pattern="*.yaml")
        if re.search(r"^\s*namespace:", path.read_text(), re.MULTILINE)
    }
    assert set(OVERLAYS) <= setting
    assert all(folder in OVERLAYS or "cluster" in folder.parts for folder in setting), setting


def test_image_names_and_tags_are_in_one_component_and_equal_for_the_cluster() -> None:
    images = {
        path.parent.relative_to(ROOT): kustomization(path.parent)["images"]
        for path in files(KUSTOMIZE, MANIFESTS, pattern="kustomization.yaml")
        if "images" in kustomization(path.parent)
    }
    assert set(images) == {IMAGES, STORAGE_CONTAINER, CLUSTER_RUNTIME}
    for folder in (STORAGE_CONTAINER, CLUSTER_RUNTIME):
        assert images[folder]
        assert all(image in images[IMAGES] for image in images[folder])


def test_resources_and_components_are_local_files() -> None:
    entries = [
        path.parent / entry
        for path in files(KUSTOMIZE, pattern="kustomization.yaml")
        for field in ("resources", "components")
        for entry in kustomization(path.parent).get(field, [])
    ]
    assert entries
    assert [entry for entry in entries if not entry.exists()] == []


def test_component_images_is_last_in_every_overlay() -> None:
    last = {folder: kustomization(ROOT / folder)["components"][-1] for folder in OVERLAYS}
    assert last == dict.fromkeys(OVERLAYS, "../../components/images")


@pytest.mark.parametrize("folder", COMPONENTS, ids=str)
def test_component_readme_has_four_parts(folder: Path) -> None:
    readme = (ROOT / folder / "README.md").read_text()
    assert re.findall(r"^## (.+)$", readme, re.MULTILINE) == ["Default", "What changes", "How to add", "Result"]
    assert f"components:\n  - ../../components/{folder.name}\n" in readme


@pytest.mark.parametrize("folder", OVERLAYS, ids=str)
def test_overlay_readme_has_requirements_costs_and_commands(folder: Path) -> None:
    readme = (ROOT / folder / "README.md").read_text()
    assert [part for part in ("Requirements", "Costs", "Try it") if f"**{part}" not in readme] == []


@pytest.mark.parametrize("folder", OVERLAYS, ids=str)
def test_overlay_costs_count_the_replicas_of_a_rollout(folder: Path) -> None:
    readme = (ROOT / folder / "README.md").read_text()
    [costs] = re.findall(r"\*\*Costs:\*\*.*?\n\n", readme, re.DOTALL)
    assert "rollout" in costs


def test_relative_links_point_to_files() -> None:
    targets = [
        (path, target)
        for path in files(KUSTOMIZE, MANIFESTS, pattern="*.md")
        for target in LINK.findall(path.read_text())
    ]
    assert targets
    assert [(path, target) for path, target in targets if not (path.parent / target).exists()] == []


def test_every_helm_value_has_a_file_with_its_key() -> None:
    page = (HOW_TO / "from-helm.md").read_text()
    rows = re.findall(r"^\| .+ \| \[`[^`]+`\]\(([^)]+)\): ([^;|]+)[;|]", page, re.MULTILINE)
    [table] = re.findall(r"^\| Helm value .*\n\|---\|---\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert len(rows) == table.count("\n")
    assert set(re.findall(r"`([\w.]+)`", re.sub(r"\| \[.*", "", table))) >= HELM_VALUES
    for target, keys in rows:
        text = (HOW_TO / target).read_text()
        for key in re.findall(r"`([^`]+)`", keys):
            assert key in text, f"{target}: {key}"


def test_cold_start_budget_of_prod_adds_up_and_is_within_the_timeout() -> None:
    readme = (ROOT / PROD / "README.md").read_text()
    steps = [int(seconds) for seconds in re.findall(r"^\|.*\| (\d+) \|$", readme, re.MULTILINE)]
    [total] = [int(seconds) for seconds in re.findall(r"^\| \*\*Sum\*\* \| (\d+) \|$", readme, re.MULTILINE)]
    assert sum(steps) - total == total
    [service] = documents(MANIFESTS / "serving/inference-service.yaml")
    assert total <= service["spec"]["predictor"]["timeout"]
