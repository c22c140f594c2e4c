"""Values that must agree across objects: the reference, Job names, timeouts, resources, flags and READMEs."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

from devtools.paths import ROOT
from predictor import settings as predictor_settings
from preflight.checks import knative, resources, tensor_parallel, timeouts
from preflight.deployment import Manifest
from snapshot_format.reference import parse as parse_reference
from storage_initializer import settings as initializer_settings
from storage_initializer.cli import arguments
from tests.kustomize.conftest import (
    BASE,
    CLUSTER_RUNTIME,
    COMPONENTS,
    DEV,
    HOW_TO,
    IMAGES,
    KNATIVE_CONFIG_MAP,
    KNATIVE_SERVING,
    OVERLAYS,
    Render,
    Rendered,
    RenderWith,
    component_folder,
    documented_service,
    with_cluster_runtime,
)

FLAG = re.compile(r"kubernetes\.podspec-[a-z-]+")


# The reference and the Job


def test_download_fetches_the_reference_of_the_predictor(deployment: Rendered) -> None:
    # Kubernetes expands $(NAME) in args from the container's environment.
    assert deployment.download["args"] == ["$(MODEL_REFERENCE)", "/mnt/models"]
    reference = deployment.environment(deployment.download).get("MODEL_REFERENCE")
    assert deployment.settings.get("MODEL_REFERENCE") == reference
    assert sum(reference in config["data"].values() for config in deployment.all("ConfigMap")) == bool(reference)


def test_base_has_no_model_reference(render: Render) -> None:
    base = render(BASE)
    assert "MODEL_REFERENCE" not in base.environment(base.download)


def test_changed_reference_makes_a_new_job_and_revision(overlay: Rendered, render_with: RenderWith) -> None:
    changed = render_with(overlay.path, reference="hf://owner/other")
    assert changed.settings["MODEL_REFERENCE"] == "hf://owner/other"
    assert changed.one("Job")["metadata"]["name"] != overlay.one("Job")["metadata"]["name"]
    assert changed.service["spec"] != overlay.service["spec"]


def test_rollout_keeps_the_old_replica_until_the_new_one_is_ready(deployment: Rendered) -> None:
    # Knative ensures it. In Standard mode, removing a replica first would leave none for as long as a download.
    rollout = deployment.predictor.get("deploymentStrategy", {}).get("rollingUpdate", {})
    assert rollout.get("maxUnavailable", 0) == 0


def test_changed_image_makes_a_new_job(render_with: RenderWith) -> None:
    bare, replaced = render_with(BASE), render_with(BASE, IMAGES)
    assert replaced.environment(replaced.download)["DOWNLOAD_IMAGE"] == replaced.download["image"]
    assert bare.one("Job")["metadata"]["name"] != replaced.one("Job")["metadata"]["name"]


def test_changed_predictor_setting_makes_a_new_revision_and_keeps_the_job(render_with: RenderWith) -> None:
    quiet, verbose = (render_with(DEV, LOG_LEVEL=level) for level in ("ERROR", "DEBUG"))
    assert quiet.one("Job") == verbose.one("Job")
    assert quiet.predictor != verbose.predictor


def test_jobs_of_the_same_name_have_the_same_spec(render: Render) -> None:
    # A Job's template is immutable: a change of it must change the name as well. How long it is kept may change.
    specs: dict[str, list[Manifest]] = defaultdict(list)
    for folder in (*OVERLAYS, *COMPONENTS):
        for job in render(folder).all("Job"):
            unchanging = {key: value for key, value in job["spec"].items() if key != "ttlSecondsAfterFinished"}
            specs[job["metadata"]["name"]].append(unchanging)
    assert max(len(same_name) for same_name in specs.values()) > 1
    for name, [spec, *others] in specs.items():
        assert all(other == spec for other in others), name


def test_job_has_the_name_of_its_config_map(deployment: Rendered) -> None:
    jobs = deployment.all("Job")
    assert len(jobs) == (deployment.path.name != "init-container")
    for job in jobs:
        name = job["metadata"]["name"]
        assert deployment.download["envFrom"] == [{"configMapRef": {"name": name}}]
        assert re.fullmatch(r"model-download-[a-z0-9]{10}", name)


def test_job_retries_errors_except_permanent_ones(render: Render) -> None:
    dev = render(DEV)
    job = dev.one("Job")["spec"]
    rules = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"]}
    assert rules["FailJob"]["onExitCodes"] == {"containerName": dev.download["name"], "operator": "In", "values": [2]}
    # The API server requires it of a Job with a podFailurePolicy.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["backoffLimit"] > 0


def test_job_is_deleted_after_it_has_finished(render: Render) -> None:
    job = render(DEV).one("Job")["spec"]
    assert 0 < job["ttlSecondsAfterFinished"] < job["activeDeadlineSeconds"]


# Settings of both programs


def test_predictor_accepts_its_arguments_and_environment(deployment: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", deployment.settings)
    settings = predictor_settings.read(deployment.server["args"])
    assert settings.served_model_name == deployment.name
    assert settings.model_reference == deployment.settings.get("MODEL_REFERENCE")
    assert str(settings.model_dir) == "/mnt/models"
    assert settings.http_port == deployment.server["ports"][0]["containerPort"]


def test_storage_initializer_accepts_its_arguments_and_environment(
    deployment: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"MODEL_REFERENCE": "hf://owner/model", **deployment.environment(deployment.download)}
    monkeypatch.setattr("os.environ", environment)
    words = [word.replace("$(MODEL_REFERENCE)", environment["MODEL_REFERENCE"]) for word in deployment.download["args"]]
    command = arguments.parse(words)
    assert isinstance(command, arguments.Publish)
    settings = initializer_settings.load(command.overrides)
    assert [source for source, _ in command.pairs] == [parse_reference(environment["MODEL_REFERENCE"])]
    assert settings.hf_endpoint == environment["HF_ENDPOINT"]


# Timeouts and probes


def test_timeouts_satisfy_every_inequality(deployment: Rendered) -> None:
    assert [str(finding) for finding in timeouts.check(deployment)] == []


def test_documentation_lists_every_inequality_of_the_timeout_checks() -> None:
    assert timeouts.__doc__
    checked = re.findall(r"^(\S.*? <=? .*?) {2,}\S", timeouts.__doc__, re.MULTILINE)
    listed = re.findall(r"^\| `(.*? <=? .*?)` \|", (HOW_TO / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(checked) >= 8
    assert listed == checked


def test_probes_request_the_readiness_of_the_model(deployment: Rendered) -> None:
    ready = {"path": f"/v2/models/{deployment.name}/ready", "port": 8080}
    assert deployment.server["startupProbe"]["httpGet"] == deployment.server["readinessProbe"]["httpGet"] == ready
    assert deployment.server["livenessProbe"]["httpGet"] == {**ready, "path": "/v2/health/live"}


def test_ingress_allows_the_body_size_of_the_predictor(render: Render) -> None:
    ingress = render(component_folder("ingress"))
    annotations = ingress.one("Ingress")["metadata"]["annotations"]
    limit = annotations["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert int(limit.removesuffix("m")) * 2**20 == int(ingress.settings["PREDICTOR_MAX_REQUEST_BYTES"])


# Resources


def test_knative_concurrency_equals_max_num_seqs(deployment: Rendered) -> None:
    concurrency = {
        field: deployment.predictor.get(field) for field in ("scaleMetric", "scaleTarget", "containerConcurrency")
    }
    batch = int(deployment.settings["PREDICTOR_MAX_NUM_SEQS"])
    knative_values = {"scaleMetric": "concurrency", "scaleTarget": batch, "containerConcurrency": batch}
    # In Standard mode the fields are not read, so they must not be there.
    assert concurrency == (knative_values if deployment.is_knative else dict.fromkeys(concurrency))


def test_both_modes_are_among_the_deployments(render: Render) -> None:
    assert {render(folder).is_knative for folder in OVERLAYS} == {True, False}


@pytest.mark.parametrize("folder", OVERLAYS, ids=str)
def test_model_of_an_overlay_fits_into_its_memory(render: Render, folder: Path) -> None:
    model = resources.read(ROOT / folder / "model-config.json")
    assert [*resources.check(render(folder), model), *tensor_parallel.check(render(folder), model)] == []


def test_scratch_volumes_have_a_size_limit(deployment: Rendered) -> None:
    limits = [
        volume["emptyDir"]["sizeLimit"]
        for pod in deployment.pods
        for volume in pod.spec["volumes"]
        if "emptyDir" in volume
    ]
    assert limits
    assert all(limits)


# Knative's feature flags


def test_base_and_dev_need_no_knative_flag(render: Render) -> None:
    assert knative.flags(render(BASE)) == knative.flags(render(DEV)) == set()


def test_overlay_readme_lists_its_knative_flags(overlay: Rendered) -> None:
    assert set(FLAG.findall(overlay.readme)) == knative.flags(overlay)


def test_component_readme_lists_its_knative_flags(component: Rendered) -> None:
    assert set(FLAG.findall(component.readme)) == knative.flags(component)


def test_cluster_manifests_enable_exactly_the_needed_flags(render: Render) -> None:
    _, service = documented_service()
    runtimes = render(CLUSTER_RUNTIME).all("ClusterServingRuntime")
    deployments = [
        *(render(folder) for folder in (*OVERLAYS, *COMPONENTS)),
        *(with_cluster_runtime(service, runtime) for runtime in runtimes),
    ]
    needed = set().union(*map(knative.flags, deployments))
    assert needed
    features = {config["metadata"]["name"]: config["data"] for config in render(KNATIVE_CONFIG_MAP).all("ConfigMap")}
    assert features["config-features"] == dict.fromkeys(needed, "enabled")
    assert features["config-defaults"] == {"max-revision-timeout-seconds": str(knative.MAX_TIMEOUT_SECONDS)}


def test_knative_operator_config_equals_the_config_maps(render: Render) -> None:
    config = render(KNATIVE_SERVING).one("KnativeServing")["spec"]["config"]
    config_maps = {manifest["metadata"]["name"]: manifest["data"] for manifest in render(KNATIVE_CONFIG_MAP).objects}
    assert {f"config-{name}": settings for name, settings in config.items()} == config_maps
