"""What must agree across objects: one reference, one Job per download, times, numbers and resources."""

import re
from pathlib import Path

from predictor import settings as predictor_settings
from storage_initializer import settings as initializer_settings

KNATIVE_MAX_TIMEOUT_SECONDS = 600
"""max-revision-timeout-seconds of Knative's config-defaults, unless an administrator raised it."""
FLAGS = {
    "nodeSelector": "kubernetes.podspec-nodeselector",
    "tolerations": "kubernetes.podspec-tolerations",
    "affinity": "kubernetes.podspec-affinity",
    "topologySpreadConstraints": "kubernetes.podspec-topologyspreadconstraints",
    "securityContext": "kubernetes.podspec-securitycontext",
    "initContainers": "kubernetes.podspec-init-containers",
    "runtimeClassName": "kubernetes.podspec-runtimeclassname",
    "priorityClassName": "kubernetes.podspec-priorityclassname",
    "schedulerName": "kubernetes.podspec-schedulername",
}
"""Fields of a pod that Knative refuses unless a flag allows them."""


def seconds(duration):
    number, unit = re.fullmatch(r"(\d+)([smh])", duration).groups()
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]


def cores(quantity):
    return int(quantity.removesuffix("m")) / 1000 if quantity.endswith("m") else float(quantity)


def memory(quantity):
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


# One reference


def test_the_job_downloads_what_the_predictor_looks_for(overlay):
    # Kubernetes expands $(NAME) in args from the container's environment.
    source, _ = overlay.download["args"]
    assert source == "$(MODEL_REFERENCE)"
    reference = overlay.environment(overlay.download)["MODEL_REFERENCE"]
    assert overlay.environment(overlay.predictor)["MODEL_REFERENCE"] == reference
    assert sum(reference in config["data"].values() for config in overlay.all("ConfigMap")) == 1


def test_an_overlay_pins_its_model_to_a_commit(overlay):
    reference = overlay.environment(overlay.download)["MODEL_REFERENCE"]
    assert re.fullmatch(r"hf://[\w.-]+/[\w.-]+:[0-9a-f]{40}", reference)


def test_base_knows_no_model(render, tree):
    base = render(tree.base)
    assert "MODEL_REFERENCE" not in base.environment(base.download)


def test_a_changed_reference_is_a_new_job_and_a_new_revision(render, render_with, tree):
    prod, changed = render(tree.prod), render_with(tree.prod, reference="hf://owner/other")
    assert changed.environment(changed.predictor)["MODEL_REFERENCE"] == "hf://owner/other"
    assert changed.one("Job")["metadata"]["name"] != prod.one("Job")["metadata"]["name"]
    assert changed.service != prod.service


def test_a_changed_image_is_a_new_job(render, render_with, tree):
    bare = render_with(tree.base)
    replaced = render(tree.images)
    assert replaced.environment(replaced.download)["DOWNLOAD_IMAGE"] == replaced.download["image"]
    assert bare.one("Job")["metadata"]["name"] != replaced.one("Job")["metadata"]["name"]


def test_a_changed_setting_of_the_predictor_is_a_new_revision_but_no_new_job(render_with, tree):
    quiet, chatty = (render_with(tree.dev, LOG_LEVEL=level) for level in ("ERROR", "DEBUG"))
    assert quiet.one("Job") == chatty.one("Job")
    assert quiet.service != chatty.service


def test_the_job_is_named_like_the_configuration_that_it_reads(deployment):
    job = deployment.one("Job")["metadata"]["name"]
    assert deployment.download["envFrom"] == [{"configMapRef": {"name": job}}]
    assert re.fullmatch(r"model-download-[a-z0-9]{10}", job)


# Both programs accept what they are told


def test_the_predictor_accepts_its_arguments_and_environment(overlay, monkeypatch):
    environment = overlay.environment(overlay.predictor)
    monkeypatch.setattr("os.environ", environment)
    told = predictor_settings.read(overlay.predictor["args"])
    assert told.model_name == overlay.one("InferenceService")["metadata"]["name"]
    assert told.model_reference == environment["MODEL_REFERENCE"]
    assert str(told.model_dir) == "/mnt/models"
    [port] = overlay.predictor["ports"]
    assert told.http_port == port["containerPort"]


def test_the_storage_initializer_accepts_its_arguments_and_environment(overlay, monkeypatch):
    environment = overlay.environment(overlay.download)
    monkeypatch.setattr("os.environ", environment)
    words = [word.replace("$(MODEL_REFERENCE)", environment["MODEL_REFERENCE"]) for word in overlay.download["args"]]
    command_line, _ = initializer_settings.read(words)
    assert command_line.pairs == ((environment["MODEL_REFERENCE"], Path("/mnt/models")),)


# Time


def test_probes_ask_the_model_itself_on_the_port_of_the_server(deployment):
    container = deployment.predictor
    ready = {"path": "/v2/models/{{.Name}}/ready", "port": container["ports"][0]["containerPort"]}
    assert container["startupProbe"]["httpGet"] == container["readinessProbe"]["httpGet"] == ready
    assert container["livenessProbe"]["httpGet"] == {**ready, "path": "/v2/health/live"}


def test_waiting_and_loading_fit_into_the_startup_probe_and_that_into_the_progress_deadline(deployment):
    wait = int(deployment.environment(deployment.predictor | {"env": []})["PREDICTOR_SNAPSHOT_WAIT_SECONDS"])
    probe = deployment.predictor["startupProbe"]
    annotations = deployment.one("InferenceService")["metadata"]["annotations"]
    deadline = seconds(annotations["serving.knative.dev/progress-deadline"])
    # The first caller is held for `timeout` at most, so loading may not take longer.
    assert wait + deployment.service["timeout"] <= probe["periodSeconds"] * probe["failureThreshold"] <= deadline


def test_requests_end_before_the_pod_is_killed_and_within_the_cap_of_knative(overlay):
    grace = int(overlay.environment(overlay.predictor)["PREDICTOR_SHUTDOWN_GRACE_SECONDS"])
    # Knative makes the timeout the pod's terminationGracePeriodSeconds.
    assert grace <= overlay.service["timeout"] <= KNATIVE_MAX_TIMEOUT_SECONDS


def test_the_cold_start_budget_of_prod_fits_into_the_timeout(render, tree):
    readme = (tree.root / tree.prod / "README.md").read_text()
    [budget] = re.findall(r"^\| \*\*Sum\*\* \| (\d+) \|$", readme, re.MULTILINE)
    assert int(budget) <= render(tree.prod).service["timeout"]


# Scaling


def test_the_mode_is_said_and_the_service_scales_to_zero(deployment):
    assert (
        deployment.one("InferenceService")["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Knative"
    )
    assert deployment.service["minReplicas"] == 0
    assert deployment.service["maxReplicas"] >= 1


def test_a_replica_is_sent_as_many_requests_as_its_batch_holds(overlay):
    batch = int(overlay.environment(overlay.predictor)["PREDICTOR_MAX_RUNNING"])
    assert overlay.service["scaleTarget"] == overlay.service["containerConcurrency"] == batch
    assert overlay.service["scaleMetric"] == "concurrency"


def test_a_volume_of_one_node_has_one_replica(deployment):
    [mode] = deployment.one("PersistentVolumeClaim")["spec"]["accessModes"]
    assert mode == "ReadWriteMany" or deployment.service["maxReplicas"] == 1


# Resources


def test_every_container_says_what_it_needs(deployment):
    for container in (deployment.predictor, deployment.download):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert cores(requests["cpu"]) <= cores(limits["cpu"])
        assert memory(requests["memory"]) <= memory(limits["memory"])


def test_torch_uses_as_many_threads_as_the_container_may(overlay):
    threads = int(overlay.environment(overlay.predictor)["OMP_NUM_THREADS"])
    assert threads == cores(overlay.predictor["resources"]["limits"]["cpu"])


def test_scratch_volumes_are_limited_and_shared_memory_leaves_room_for_the_model(deployment):
    volumes = (
        deployment.one("ServingRuntime")["spec"]["volumes"]
        + deployment.one("Job")["spec"]["template"]["spec"]["volumes"]
    )
    sizes = {each["name"]: memory(each["emptyDir"]["sizeLimit"]) for each in volumes if "emptyDir" in each}
    assert sizes["shm"] < memory(deployment.predictor["resources"]["limits"]["memory"]) / 2


def test_a_gpu_comes_with_all_that_it_needs(deployment):
    resources = deployment.predictor["resources"]
    gpus = resources["limits"].get("nvidia.com/gpu")
    assert resources["requests"].get("nvidia.com/gpu") == gpus
    tolerated = "nvidia.com/gpu" in [each["key"] for each in deployment.service.get("tolerations", [])]
    told = deployment.environment(deployment.predictor | {"env": []})["PREDICTOR_DEVICE"]
    assert (tolerated, told) == ((True, "cuda") if gpus else (False, "auto"))


def flags_needed(rendered):
    fields = set(rendered.service) | set(rendered.one("ServingRuntime")["spec"])
    return {flag for field, flag in FLAGS.items() if field in fields}


def test_base_and_dev_are_admitted_with_the_default_flags_of_knative(render, tree):
    assert flags_needed(render(tree.base)) == flags_needed(render(tree.dev)) == set()


def test_a_component_says_which_flags_of_knative_it_needs(component, tree):
    readme = (tree.root / component.folder / "README.md").read_text()
    assert set(re.findall(r"kubernetes\.podspec-[a-z-]+", readme)) == flags_needed(component)


# The Job


def test_the_job_retries_what_may_pass_and_gives_up_on_what_will_not(deployment):
    job = deployment.one("Job")["spec"]
    rules = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"]}
    assert rules["FailJob"]["onExitCodes"] == {
        "containerName": deployment.download["name"],
        "operator": "In",
        "values": [2],
    }
    # The API server demands it of a Job with a podFailurePolicy.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["backoffLimit"] > 0


def test_the_job_goes_away_after_it_is_done(deployment):
    assert (
        0
        < deployment.one("Job")["spec"]["ttlSecondsAfterFinished"]
        < deployment.one("Job")["spec"]["activeDeadlineSeconds"]
    )
