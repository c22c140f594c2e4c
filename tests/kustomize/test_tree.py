"""The files as they lie: menus, folders, objects. Nothing is rendered here, so kubectl is not needed."""

import re

import yaml

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
"""Every value that the Helm chart which this replaces could be given."""
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def test_the_menu_names_every_overlay_and_component_once_and_nothing_else(tree):
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
        str(path.relative_to(tree.manifests)) for path in objects(tree)
    }


def objects(tree):
    """The files of manifests that are not kustomize's own."""
    return [
        path
        for path in tree.manifests.rglob("*.yaml")
        if path.name not in ("kustomization.yaml", "image-fields.yaml", "rules.yaml")
    ]


def test_every_file_of_manifests_holds_one_object_and_is_a_resource_of_its_folder(tree):
    for path in objects(tree):
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


def test_every_file_of_kustomize_is_used_by_its_kustomization(tree):
    for path in tree.kustomize.rglob("*.yaml"):
        if path.name != "kustomization.yaml":
            assert path.name in path.with_name("kustomization.yaml").read_text(), path


def test_only_overlays_and_what_is_for_the_cluster_name_a_namespace(tree):
    for path in [*tree.kustomize.rglob("*.yaml"), *tree.manifests.rglob("*.yaml")]:
        if path.parent.relative_to(tree.root) not in tree.overlays and "cluster" not in path.parts:
            assert not re.search(r"^\s*namespace:", path.read_text(), re.MULTILINE), path


def test_names_and_tags_of_images_stand_in_one_component_and_for_the_cluster_the_same(tree):
    said = {}
    for path in [*tree.kustomize.rglob("kustomization.yaml"), *tree.manifests.rglob("kustomization.yaml")]:
        [kustomization] = documents(path)
        if "images" in kustomization:
            said[path.parent.relative_to(tree.root)] = kustomization["images"]
    assert set(said) == {tree.images, tree.storage_container}
    assert all(image in said[tree.images] for image in said[tree.storage_container])


def test_resources_are_local(tree):
    for path in tree.kustomize.rglob("kustomization.yaml"):
        [kustomization] = documents(path)
        for entry in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
            assert (path.parent / entry).exists(), f"{path}: {entry}"


def test_images_come_last_in_an_overlay(tree):
    for folder in tree.overlays:
        [kustomization] = documents(tree.root / folder / "kustomization.yaml")
        assert kustomization["components"][-1] == "../../components/images", folder


def test_every_component_has_a_readme_in_four_parts(tree):
    for folder in tree.components:
        readme = (tree.root / folder / "README.md").read_text()
        parts = re.findall(r"^## (.+)$", readme, re.MULTILINE)
        assert parts == ["Default", "What changes", "How to add", "Result"], folder
        assert f"components:\n  - ../../components/{folder.name}\n" in readme, folder


def test_every_overlay_has_a_readme_that_says_what_it_needs_what_it_costs_and_how_to_try_it(tree):
    for folder in tree.overlays:
        readme = (tree.root / folder / "README.md").read_text()
        assert all(f"**{part}" in readme for part in ("It needs", "It costs", "Try it")), folder


def test_links_lead_somewhere(tree):
    for path in [*tree.kustomize.rglob("*.md"), *tree.manifests.rglob("*.md")]:
        for target in LINK.findall(path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_every_value_of_the_helm_chart_leads_to_a_file_that_has_the_key(tree):
    readme = (tree.kustomize / "README.md").read_text()
    rows = re.findall(r"^\| .+ \| \[`[^`]+`\]\(([^)]+)\): ([^;|]+)[;|]", readme, re.MULTILINE)
    [table] = re.findall(r"^\| Helm value .*\n\|---\|---\|\n((?:\|.*\n)+)", readme, re.MULTILINE)
    assert len(rows) == table.count("\n")
    assert set(re.findall(r"`([\w.]+)`", re.sub(r"\| \[.*", "", table))) >= HELM_VALUES
    for target, keys in rows:
        text = (tree.kustomize / target).read_text()
        for key in re.findall(r"`([^`]+)`", keys):
            assert key in text, f"{target}: {key}"


def test_the_cold_start_budget_of_prod_adds_up_and_fits_into_the_timeout(tree):
    readme = (tree.kustomize / "overlays/prod/README.md").read_text()
    steps = [int(seconds) for seconds in re.findall(r"^\|.*\| (\d+) \|$", readme, re.MULTILINE)]
    [total] = [int(seconds) for seconds in re.findall(r"^\| \*\*Sum\*\* \| (\d+) \|$", readme, re.MULTILINE)]
    assert sum(steps) - total == total
    [service] = documents(tree.manifests / "serving/inference-service.yaml")
    assert total <= service["spec"]["predictor"]["timeout"]
