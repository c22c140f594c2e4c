"""The files as they lie: menus, folders, objects. Nothing is rendered here, so kubectl is not needed."""

import re

import pytest
import yaml

from predictor.settings import ENV_PREFIX, Settings
from storage_initializer.settings import PREFIX, known_variables

LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def test_the_menu_names_every_overlay_and_component_and_nothing_else(tree):
    menu = re.findall(r"^\| \[`([^`]+)`\]\(", (tree.kustomize / "README.md").read_text(), re.MULTILINE)
    folders = [tree.base, *tree.overlays, *tree.components]
    assert sorted(menu) == sorted(str(folder.relative_to("kustomize")) for folder in folders)


def test_every_folder_of_overlays_and_components_is_a_kustomization(tree):
    folders = {
        path.relative_to(tree.root) for top in ("overlays", "components") for path in (tree.kustomize / top).iterdir()
    }
    assert folders == {*tree.overlays, *tree.components}


def test_manifests_list_every_object(tree):
    readme = (tree.manifests / "README.md").read_text()
    assert set(re.findall(r"^\| \[`([^`]+)`\]\(", readme, re.MULTILINE)) == {
        str(path.relative_to(tree.manifests))
        for path in tree.manifests.rglob("*.yaml")
        if path.name != "kustomization.yaml"
    }


def test_every_file_of_manifests_holds_one_object_and_is_a_resource_of_its_folder(tree):
    for path in tree.manifests.rglob("*.yaml"):
        if path.name != "kustomization.yaml":
            [manifest] = documents(path)
            assert {"apiVersion", "kind", "metadata"} <= set(manifest), path
            [kustomization] = documents(path.with_name("kustomization.yaml"))
            assert path.name in kustomization["resources"], path


def test_kustomize_defines_no_object_but_the_namespaces_of_overlays(tree):
    for path in tree.kustomize.rglob("kustomization.yaml"):
        [kustomization] = documents(path)
        for resource in kustomization.get("resources", []):
            if (path.parent / resource).is_file():
                assert path.parent.relative_to(tree.root) in tree.overlays, path
                assert [manifest["kind"] for manifest in documents(path.parent / resource)] == ["Namespace"], resource


def test_only_overlays_name_a_namespace(tree):
    for path in [*tree.kustomize.rglob("*.yaml"), *tree.manifests.rglob("*.yaml")]:
        if path.parent.relative_to(tree.root) not in tree.overlays:
            assert not re.search(r"^\s*namespace:", path.read_text(), re.MULTILINE), path


def test_only_the_component_images_names_images_and_tags(tree):
    for path in tree.kustomize.rglob("kustomization.yaml"):
        [kustomization] = documents(path)
        assert ("images" in kustomization) == (path.parent.name == "images"), path


def test_resources_are_local(tree):
    for path in tree.kustomize.rglob("kustomization.yaml"):
        [kustomization] = documents(path)
        for entry in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
            assert (path.parent / entry).exists(), f"{path}: {entry}"


def test_every_component_has_a_readme_in_four_parts(tree):
    for folder in tree.components:
        parts = re.findall(r"^## (.+)$", (tree.root / folder / "README.md").read_text(), re.MULTILINE)
        assert parts == ["Default", "What changes", "How to add", "Result"], folder


def test_every_overlay_has_a_readme_that_says_what_it_needs_what_it_costs_and_how_to_try_it(tree):
    for folder in tree.overlays:
        readme = (tree.root / folder / "README.md").read_text()
        assert all(f"**{part}" in readme for part in ("It needs", "It costs", "Try it")), folder


def test_links_lead_somewhere(tree):
    for path in [*tree.kustomize.rglob("*.md"), *tree.manifests.rglob("*.md")]:
        for target in LINK.findall(path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


@pytest.mark.parametrize("name", ["predictor.env", "storage-initializer.env"])
def test_every_setting_of_base_has_a_comment(tree, name):
    lines = (tree.root / tree.base / name).read_text().splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if line and not line.startswith("#"):
            assert above.startswith("# "), f"{name}: {line}"


def test_every_key_of_an_env_file_is_a_setting(tree):
    known = known_variables() | {f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields}
    for path in tree.kustomize.rglob("*.env"):
        keys = {line.partition("=")[0] for line in path.read_text().splitlines() if line and not line.startswith("#")}
        assert {key for key in keys if key.startswith((ENV_PREFIX, PREFIX))} <= known, path


def test_the_cold_start_budget_of_prod_adds_up(tree):
    readme = (tree.kustomize / "overlays/prod/README.md").read_text()
    *steps, total = (int(seconds) for seconds in re.findall(r"^\|.*\| (\d+) \|$", readme, re.MULTILINE))
    assert sum(steps) == total
