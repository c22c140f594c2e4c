"""Every object of every kustomization: it renders, Kubernetes and KServe understand all of it, what it names exists."""

import re

CORE = {"v1", "batch/v1"}
LABELS = {"app.kubernetes.io/name", "app.kubernetes.io/component", "app.kubernetes.io/part-of"}


def test_it_renders_with_no_name_twice(rendered):
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in rendered.objects]
    assert names
    assert len(names) == len(set(names))


def test_the_kserve_sdk_and_the_kubernetes_client_keep_every_field(rendered, sdk_round_trip):
    for manifest in rendered.objects:
        group, _, version = manifest["apiVersion"].rpartition("/")
        assert manifest["apiVersion"] in CORE or group == "serving.kserve.io", manifest["kind"]
        written = sdk_round_trip(manifest, f"{version.capitalize()}{manifest['kind']}")
        if manifest["kind"] == "InferenceService":
            assert written["spec"]["predictor"]["model"].pop("name") == ""  # the SDK's default
        assert written == manifest


def test_the_sdk_check_finds_a_misspelt_field(render, tree, sdk_round_trip):
    claim = render(tree.base).one("PersistentVolumeClaim")
    misspelt = {**claim, "spec": {**claim["spec"], "accessMode": ["ReadWriteMany"]}}
    assert sdk_round_trip(misspelt, "V1PersistentVolumeClaim") == claim


def test_the_api_server_would_accept_every_field_of_a_custom_resource(rendered, schema_errors):
    for manifest in rendered.objects:
        if manifest["apiVersion"] not in CORE:
            assert schema_errors(manifest) == [], manifest["metadata"]["name"]


def test_the_schema_check_finds_a_misspelt_field(render, tree, schema_errors):
    service = render(tree.base).one("InferenceService")
    model = {**service["spec"]["predictor"]["model"], "storageURI": "pvc://models"}
    [error] = schema_errors({**service, "spec": {"predictor": {"model": model}}})
    assert "storageURI" in error


def test_every_object_is_labelled(rendered):
    for manifest in rendered.objects:
        assert set(manifest["metadata"].get("labels", {})) >= LABELS, manifest["metadata"]["name"]


def test_only_overlays_have_a_namespace_and_all_their_objects_are_in_it(rendered, tree):
    expected = {rendered.one("Namespace")["metadata"]["name"]} if rendered.folder in tree.overlays else {None}
    assert {each["metadata"].get("namespace") for each in rendered.objects if each["kind"] != "Namespace"} == expected
    assert bool(rendered.all("Namespace")) == (rendered.folder in tree.overlays)


def test_names_fit_what_kserve_and_knative_derive_from_them(deployment):
    name = deployment.one("InferenceService")["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 39
    assert "-default" not in name
    assert "-predictor" not in name


def test_the_inference_service_names_the_runtime_the_format_and_the_claim_that_are_there(deployment):
    model, runtime = deployment.service["model"], deployment.one("ServingRuntime")
    assert model["runtime"] == runtime["metadata"]["name"]
    [model_format] = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"]["name"] == model_format["name"]
    assert model_format["autoSelect"] is False
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    # The root: a sub-path is frozen when the container starts, and a missing one is silently an empty directory.
    assert model["storageUri"] == f"pvc://{deployment.one('PersistentVolumeClaim')['metadata']['name']}"


def test_the_job_mounts_the_claim_where_it_is_told_to_download(deployment):
    claim = deployment.one("PersistentVolumeClaim")["metadata"]["name"]
    volumes = deployment.one("Job")["spec"]["template"]["spec"]["volumes"]
    [volume] = [each["name"] for each in volumes if each.get("persistentVolumeClaim") == {"claimName": claim}]
    [mount] = [each for each in deployment.download["volumeMounts"] if each["name"] == volume]
    assert mount == {"name": volume, "mountPath": deployment.download["args"][1]}


def test_every_mount_has_its_volume(deployment):
    for pod, container in [
        (deployment.one("Job")["spec"]["template"]["spec"], deployment.download),
        (deployment.one("ServingRuntime")["spec"], deployment.predictor),
    ]:
        assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}


def test_every_config_map_that_is_named_exists_and_every_one_is_used(deployment):
    containers = [deployment.predictor, deployment.download]
    sources = [source for container in containers for source in container["envFrom"]]
    sources += [variable.get("valueFrom", {}) for container in containers for variable in container["env"]]
    named = {(source.get("configMapRef") or source.get("configMapKeyRef") or {}).get("name") for source in sources} - {
        None
    }
    assert named == {config["metadata"]["name"] for config in deployment.all("ConfigMap")}


def test_images_of_an_overlay_have_a_registry_and_a_tag(overlay):
    for container in (overlay.predictor, overlay.download):
        assert re.fullmatch(r"[\w.-]+\.\w+/[\w./-]+:\d[\w.-]*", container["image"])
        assert container["imagePullPolicy"] == "IfNotPresent"


def test_the_component_images_replaces_every_image_of_the_manifests(tree, render):
    text = "".join(path.read_text() for path in tree.manifests.rglob("*.yaml"))
    bare = set(re.findall(r"image: (\S+)", text))
    replaced = render(tree.images)
    assert len(bare) == 2
    assert not bare & {replaced.predictor["image"], replaced.download["image"]}
