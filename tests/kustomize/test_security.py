"""Pod Security `restricted`, a read-only root, and no secret where none is needed."""

import re

RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""What Pod Security `restricted` wants of each container; the rest may stand on the pod."""
IDENTITY = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
VOLUMES = {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "projected", "downwardAPI", "csi", "ephemeral"}
"""The volume types that `restricted` allows."""


def test_the_predictor_is_restricted_by_its_container_alone(deployment):
    # Knative refuses a pod's securityContext by default, and KServe's runtime has none.
    assert "securityContext" not in deployment.service
    context = deployment.predictor["securityContext"]
    assert context == RESTRICTED | IDENTITY | {"readOnlyRootFilesystem": True}


def test_the_job_is_restricted_and_writes_as_the_user_who_reads(deployment):
    pod = deployment.one("Job")["spec"]["template"]["spec"]
    assert deployment.download["securityContext"] == RESTRICTED | {"readOnlyRootFilesystem": True}
    assert pod["securityContext"].items() >= IDENTITY.items()
    assert pod["securityContext"]["fsGroup"] == deployment.predictor["securityContext"]["runAsGroup"]


def test_volumes_are_of_the_types_that_restricted_allows(deployment):
    volumes = (
        deployment.one("Job")["spec"]["template"]["spec"]["volumes"]
        + deployment.one("ServingRuntime")["spec"]["volumes"]
    )
    assert {key for volume in volumes for key in volume} - {"name"} <= VOLUMES


def test_what_the_programs_write_outside_the_claim_is_on_a_scratch_volume(deployment):
    for container in (deployment.predictor, deployment.download):
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        environment = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        assert environment["HOME"] in mounts
        assert environment["HF_HOME"].startswith(f"{environment['HOME']}/")


def test_no_pod_gets_a_service_account_token_or_service_links(deployment):
    for pod in (deployment.service, deployment.one("Job")["spec"]["template"]["spec"]):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False


def test_the_predictor_gets_no_secret_and_never_asks_the_hub(deployment):
    serving = repr([deployment.one("ServingRuntime"), deployment.one("InferenceService"), deployment.predictor])
    assert "secret" not in serving.lower()
    assert "TOKEN" not in serving
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in deployment.predictor["env"]


def test_only_the_job_names_a_secret_and_the_readme_says_which(deployment, tree):
    secrets = [source["secretKeyRef"] for each in deployment.download["env"] if (source := each.get("valueFrom"))]
    assert secrets == [{"name": "hf-secret", "key": "HF_TOKEN", "optional": True}]
    readme = (tree.kustomize / "README.md").read_text()
    assert "secret generic hf-secret" in readme
    assert "--from-literal=HF_TOKEN=" in readme
    others = [each for each in deployment.objects if each["kind"] != "Job"]
    assert not re.search(r"secretKeyRef|secretRef|secretName", repr(others))


def test_nothing_secret_is_in_a_config_map_or_in_the_tree(deployment):
    assert not deployment.all("Secret")
    for config in deployment.all("ConfigMap"):
        assert not [key for key in config["data"] if re.search("TOKEN|PASSWORD|SECRET|API_KEY", key)]
        assert not [value for value in config["data"].values() if value.startswith("hf_")]


def test_the_namespace_of_an_overlay_enforces_restricted_and_is_seen_by_kserve(overlay):
    labels = overlay.one("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    # KServe's webhook passes over namespaces with this label: the predictor would start without its volume.
    assert "control-plane" not in labels
