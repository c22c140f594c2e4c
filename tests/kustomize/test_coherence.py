"""What must agree across objects: one reference, one Job per download, times and numbers, flags and documents."""

import itertools
import re

from predictor import settings as predictor_settings
from preflight.checks import knative, resources, timeouts
from storage_initializer import settings as initializer_settings

FLAG = re.compile(r"kubernetes\.podspec-[a-z-]+")


# One reference


def test_the_download_fetches_what_the_predictor_looks_for(deployment):
    # Kubernetes expands $(NAME) in args from the container's environment.
    assert deployment.download["args"] == ["$(MODEL_REFERENCE)", "/mnt/models"]
    reference = deployment.environment(deployment.download).get("MODEL_REFERENCE")
    assert deployment.settings.get("MODEL_REFERENCE") == reference
    assert sum(reference in config["data"].values() for config in deployment.all("ConfigMap")) == bool(reference)


def test_base_knows_no_model(render, tree):
    base = render(tree.base)
    assert "MODEL_REFERENCE" not in base.environment(base.download)


def test_a_changed_reference_is_a_new_job_and_a_new_revision(overlay, render_with):
    changed = render_with(overlay.path, reference="hf://owner/other")
    assert changed.settings["MODEL_REFERENCE"] == "hf://owner/other"
    assert changed.one("Job")["metadata"]["name"] != overlay.one("Job")["metadata"]["name"]
    assert changed.predictor != overlay.predictor


def test_the_old_one_serves_until_the_new_one_is_ready(deployment):
    # Knative sees to it. In Standard mode a replica that goes first would be missed for as long as a download.
    rollout = deployment.predictor.get("deploymentStrategy", {}).get("rollingUpdate", {})
    assert rollout.get("maxUnavailable", 0) == 0


def test_a_changed_image_is_a_new_job(render_with, tree):
    bare, replaced = render_with(tree.base), render_with(tree.base, tree.images)
    assert replaced.environment(replaced.download)["DOWNLOAD_IMAGE"] == replaced.download["image"]
    assert bare.one("Job")["metadata"]["name"] != replaced.one("Job")["metadata"]["name"]


def test_a_changed_setting_of_the_predictor_is_a_new_revision_but_no_new_job(render_with, tree):
    quiet, chatty = (render_with(tree.dev, LOG_LEVEL=level) for level in ("ERROR", "DEBUG"))
    assert quiet.one("Job") == chatty.one("Job")
    assert quiet.predictor != chatty.predictor


def test_jobs_of_one_name_have_one_template(render, tree):
    # A Job's template is immutable: whatever changes it must change the name as well.
    jobs = [render(folder).all("Job") for folder in (*tree.overlays, *tree.components)]
    for one, other in itertools.combinations(itertools.chain(*jobs), 2):
        if one["metadata"]["name"] == other["metadata"]["name"]:
            assert one["spec"] == other["spec"]


def test_the_job_is_named_like_the_configuration_that_it_reads(deployment):
    for job in deployment.all("Job"):
        name = job["metadata"]["name"]
        assert deployment.download["envFrom"] == [{"configMapRef": {"name": name}}]
        assert re.fullmatch(r"model-download-[a-z0-9]{10}", name)


# Both programs accept what they are told


def test_the_predictor_accepts_its_arguments_and_environment(deployment, monkeypatch):
    monkeypatch.setattr("os.environ", deployment.settings)
    told = predictor_settings.read(deployment.server["args"])
    assert told.model_name == deployment.name
    assert told.model_reference == deployment.settings.get("MODEL_REFERENCE")
    assert str(told.model_dir) == "/mnt/models"
    assert told.http_port == deployment.server["ports"][0]["containerPort"]


def test_the_storage_initializer_accepts_its_arguments_and_environment(deployment, monkeypatch):
    environment = {"MODEL_REFERENCE": "hf://owner/model", **deployment.environment(deployment.download)}
    monkeypatch.setattr("os.environ", environment)
    words = [word.replace("$(MODEL_REFERENCE)", environment["MODEL_REFERENCE"]) for word in deployment.download["args"]]
    command_line, told = initializer_settings.read(words)
    assert [source for source, _ in command_line.pairs] == [environment["MODEL_REFERENCE"]]
    assert told.hf_endpoint == environment["HF_ENDPOINT"]


# Time


def test_times_fit_into_each_other(deployment):
    assert [str(finding) for finding in timeouts.check(deployment)] == []


def test_the_readme_writes_down_every_inequality_that_preflight_checks(tree):
    readme = (tree.kustomize / "README.md").read_text()
    for line in re.findall(r"^    (\S.*(?:<=|<|=).*?)\s{2,}", timeouts.__doc__, re.MULTILINE):
        assert f"`{line}`" in readme, line


def test_probes_ask_the_model_itself(deployment):
    ready = {"path": f"/v2/models/{deployment.name}/ready", "port": 8080}
    assert deployment.server["startupProbe"]["httpGet"] == deployment.server["readinessProbe"]["httpGet"] == ready
    assert deployment.server["livenessProbe"]["httpGet"] == {**ready, "path": "/v2/health/live"}


def test_the_ingress_lets_through_what_the_predictor_takes(render, tree):
    ingress = render(tree.component("ingress"))
    annotations = ingress.one("Ingress")["metadata"]["annotations"]
    limit = annotations["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert int(limit.removesuffix("m")) * 2**20 == int(ingress.settings["PREDICTOR_MAX_REQUEST_BYTES"])


# Resources


def test_a_replica_is_sent_as_many_requests_as_its_batch_holds(deployment):
    if deployment.is_knative:
        batch = int(deployment.settings["PREDICTOR_MAX_NUM_SEQS"])
        assert deployment.predictor["scaleTarget"] == deployment.predictor["containerConcurrency"] == batch
        assert deployment.predictor["scaleMetric"] == "concurrency"


def test_the_model_of_an_overlay_fits_into_its_memory(overlay, tree):
    path = tree.root / overlay.path / "model-config.json"
    if path.exists():
        assert list(resources.check(overlay, resources.read(path))) == []
    else:
        assert overlay.path.name == "prod-multi-gpu"


def test_scratch_volumes_are_limited(deployment):
    for pod in deployment.pods:
        assert all(each["emptyDir"]["sizeLimit"] for each in pod.spec["volumes"] if "emptyDir" in each)


# Knative's flags


def test_base_and_dev_are_admitted_with_the_default_flags_of_knative(render, tree):
    assert knative.flags(render(tree.base)) == knative.flags(render(tree.dev)) == set()


def test_an_overlay_says_which_flags_of_knative_it_needs(overlay, tree):
    readme = (tree.root / overlay.path / "README.md").read_text()
    assert set(FLAG.findall(readme)) == knative.flags(overlay)


def test_a_component_says_which_flags_of_knative_it_needs(component, tree):
    readme = (tree.root / component.path / "README.md").read_text()
    assert set(FLAG.findall(readme)) == knative.flags(component)


def test_the_cluster_manifests_enable_every_flag_that_anything_needs_and_no_other(render, tree):
    needed = set().union(*(knative.flags(render(folder)) for folder in (*tree.overlays, *tree.components)))
    features = {each["metadata"]["name"]: each["data"] for each in render(tree.knative_config_map).all("ConfigMap")}
    assert features["config-features"] == dict.fromkeys(needed, "enabled")
    assert features["config-defaults"] == {"max-revision-timeout-seconds": str(knative.MAX_TIMEOUT_SECONDS)}


def test_the_operator_is_told_the_same_as_the_config_maps(render, tree):
    config = render(tree.knative_serving).one("KnativeServing")["spec"]["config"]
    for name, settings in config.items():
        assert render(tree.knative_config_map).find("ConfigMap", f"config-{name}")["data"] == settings
    assert len(config) == len(render(tree.knative_config_map).objects)


# The Job


def test_the_job_retries_what_may_pass_and_gives_up_on_what_will_not(render, tree):
    dev = render(tree.dev)
    job = dev.one("Job")["spec"]
    rules = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"]}
    assert rules["FailJob"]["onExitCodes"] == {"containerName": dev.download["name"], "operator": "In", "values": [2]}
    # The API server demands it of a Job with a podFailurePolicy.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["backoffLimit"] > 0


def test_the_job_goes_away_after_it_is_done(render, tree):
    job = render(tree.dev).one("Job")["spec"]
    assert 0 < job["ttlSecondsAfterFinished"] < job["activeDeadlineSeconds"]
