"""Mistakes that people make, one at a time, each caught with a sentence that names it and nothing else."""

import pytest

from preflight.checks import kserve, resources
from preflight.deployment import Deployment

KNATIVE_CAP = "over the 600 s that Knative allows"


def remove_tolerations(draft):
    del draft.predictor["tolerations"]


def remove_liveness_probe(draft):
    del draft.container["livenessProbe"]


def remove_storage_uri(draft):
    del draft.model["storageUri"]


def remove_reference(draft):
    del draft.download["MODEL_REFERENCE"]


def remove_progress_deadline(draft):
    del draft.annotations["serving.knative.dev/progress-deadline"]


def remove_scale_target(draft):
    del draft.predictor["scaleTarget"]


def remove_mode(draft):
    del draft.annotations["serving.kserve.io/deploymentMode"]


def remove_memory_limit(draft):
    del draft.model["resources"]["limits"]["memory"]


def add_hub_token(draft):
    secret = {"secretKeyRef": {"name": "hf-secret", "key": "HF_TOKEN"}}
    draft.model["env"].append({"name": "HF_TOKEN", "valueFrom": secret})


def three_replicas_on_one_node(draft):
    draft["PersistentVolumeClaim"]["spec"]["accessModes"] = ["ReadWriteOnce"]
    draft.predictor["maxReplicas"] = 3


def timeout_over_the_cap(draft):
    draft.predictor["timeout"] = 601
    draft.settings["PREDICTOR_SNAPSHOT_WAIT_SECONDS"] = "1199"


def add_secret(draft):
    metadata = {"name": "mine", "labels": {}}
    draft.objects.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"a": "b"}})


def remove_read_only_root(draft):
    del draft.container["securityContext"]["readOnlyRootFilesystem"]


def policy_of_another_service(draft):
    selector = {"matchLabels": {"serving.kserve.io/inferenceservice": "x"}}
    draft["NetworkPolicy/predictor"]["spec"]["podSelector"] = selector


def other_reference_in_the_job(draft):
    draft.job["containers"][0]["env"].append({"name": "MODEL_REFERENCE", "value": f"hf://owner/other:{'b' * 40}"})


MISTAKES = {
    # Fields and names
    "a misspelt field of the Job": (lambda d: d.job.update(restartPolice="Never"), "'restartPolice' was unexpected"),
    "a misspelt setting": (lambda d: d.settings.update(PREDICTOR_MAX_RUNING="8"), "write PREDICTOR_MAX_NUM_SEQS"),
    "a setting that is no number": (
        lambda d: d.settings.update(PREDICTOR_MAX_QUEUED_REQUESTS="lots"),
        "PREDICTOR_MAX_QUEUED_REQUESTS is 'lots', which is no number",
    ),
    "a setting that is neither true nor false": (
        lambda d: d.download.update(STORAGE_INITIALIZER_OFFLINE="maybe"),
        "STORAGE_INITIALIZER_OFFLINE is 'maybe'",
    ),
    "a directory that nothing is mounted at": (
        lambda d: d.settings.update(PREDICTOR_MODEL_DIR="/models"),
        "KServe mounts the claim at /mnt/models",
    ),
    "a claim that is not there": (lambda d: d.model.update(storageUri="pvc://model"), "PersistentVolumeClaim 'model'"),
    "a format that no runtime has": (lambda d: d.model.update(modelFormat={"name": "llm"}), "NoSupportingRuntime"),
    "a protocol that the runtime lacks": (lambda d: d.model.update(protocolVersion="v1"), "does not speak v1"),
    "an account that is not there": (lambda d: d.predictor.update(serviceAccountName="x"), "ServiceAccount 'x'"),
    "a ConfigMap that is not there": (
        lambda d: d.model["envFrom"].append({"configMapRef": {"name": "x"}}),
        "ConfigMap 'x'",
    ),
    "a mount without its volume": (
        lambda d: d.container["volumeMounts"].append({"name": "cache", "mountPath": "/cache"}),
        "mounts volume 'cache'",
    ),
    "a probe of another port": (
        lambda d: d.container["livenessProbe"]["httpGet"].update(port=9000),
        "livenessProbe asks port 9000",
    ),
    "a probe of another model": (
        lambda d: d.container["readinessProbe"]["httpGet"].update(path="/v2/models/x/ready"),
        "readinessProbe asks for model 'x'",
    ),
    "a policy of another service": (policy_of_another_service, "selects the pods of InferenceService 'x'"),
    "a monitor of another port": (
        lambda d: d["PodMonitor"]["spec"]["podMetricsEndpoints"][0].update(portNumber=9000),
        "asks port 9000",
    ),
    "a port that the server does not open": (
        lambda d: d.settings.update(PREDICTOR_HTTP_PORT="9000"),
        "is 9000, and the",
    ),
    "an image without a tag": (
        lambda d: d.container.update(image="registry.example.com/predictor"),
        "without a registry",
    ),
    # The model
    "an unpinned revision": (lambda d: d.download.update(MODEL_REFERENCE="hf://owner/model:main"), "is not pinned"),
    "a reference that is none": (lambda d: d.download.update(MODEL_REFERENCE="owner/model"), "write hf://owner/model"),
    "a sub-path of the claim": (lambda d: d.model.update(storageUri="pvc://models/7b"), "mounts a sub-path"),
    "weights by KServe's own initializer, beside the Job": (
        lambda d: d.model.update(storageUri="hf://owner/model"),
        "the model is downloaded onto models",
    ),
    "no storageUri": (remove_storage_uri, "takes it for a multi-model server"),
    "a scheme that nobody knows": (lambda d: d.model.update(storageUri="nfs://server/models"), "'nfs://server/models'"),
    "another model in the Job": (other_reference_in_the_job, "hf://owner/other"),
    # Scaling
    "more least than most replicas": (
        lambda d: d.predictor.update(minReplicas=3),
        "minReplicas is 3 and maxReplicas 2",
    ),
    "a logger without a mode": (lambda d: d.predictor.update(logger={"url": "http://x"}), "logger.mode is None"),
    "a canary of 101 percent": (lambda d: d.predictor.update(canaryTrafficPercent=101), "is 101"),
    "three replicas on a volume of one node": (three_replicas_on_one_node, "ReadWriteOnce, which one node can mount"),
    "a batch that is not what Knative sends": (lambda d: d.predictor.update(containerConcurrency=100), "is 100"),
    "no scale target": (remove_scale_target, "scaleTarget is 100 by default"),
    "a metric that Knative has not": (lambda d: d.predictor.update(scaleMetric="cpu"), "scaleMetric is cpu"),
    "a strategy in Knative mode": (lambda d: d.predictor.update(deploymentStrategy={}), "deploymentStrategy is set"),
    "a window too short": (lambda d: d.annotations.update({"autoscaling.knative.dev/window": "2s"}), "window is 2s"),
    "a retention without a unit": (
        lambda d: d.annotations.update({"autoscaling.knative.dev/scale-to-zero-pod-retention-period": "13"}),
        "'13', which is no duration",
    ),
    "a min-scale of Knative": (
        lambda d: d.annotations.update({"autoscaling.knative.dev/min-scale": "1"}),
        "is dropped",
    ),
    "an autoscaler that KServe denies": (
        lambda d: d.annotations.update({"serving.kserve.io/autoscalerClass": "kpa"}),
        "autoscalerClass 'kpa'",
    ),
    "no mode": (remove_mode, "no deployment mode is said"),
    # Times
    "a timeout over the cap": (timeout_over_the_cap, KNATIVE_CAP),
    "a deadline behind the gateway's": (
        lambda d: d.settings.update(PREDICTOR_REQUEST_TIMEOUT_SECONDS="600"),
        "PREDICTOR_REQUEST_TIMEOUT_SECONDS is 600",
    ),
    "a grace that the pod does not get": (
        lambda d: d.settings.update(PREDICTOR_SHUTDOWN_GRACE_SECONDS="900"),
        "the pod is killed after 600 s",
    ),
    "a stuck replica that stays": (
        lambda d: d.settings.update(PREDICTOR_STEP_TIMEOUT_SECONDS="500"),
        "a stuck predictor is restarted after 500 s",
    ),
    "a wait longer than the probe": (
        lambda d: d.settings.update(PREDICTOR_SNAPSHOT_WAIT_SECONDS="3000"),
        "waiting for a snapshot (3000 s)",
    ),
    "Knative's own progress deadline": (remove_progress_deadline, "Knative gives up after 600 s"),
    # Probes and pods
    "a removed probe": (remove_liveness_probe, "has no livenessProbe"),
    "a preStop in Knative mode": (
        lambda d: d.container.update(lifecycle={}),
        "has lifecycle, which Knative never admits",
    ),
    "a termination grace in Knative mode": (
        lambda d: d.predictor.update(terminationGracePeriodSeconds=30),
        "terminationGracePeriodSeconds is set",
    ),
    "a second port": (lambda d: d.container["ports"].append({"containerPort": 8081}), "2 container ports"),
    "a reserved variable": (
        lambda d: d.container["env"].append({"name": "PORT", "value": "8080"}),
        "sets PORT, which is Knative's",
    ),
    "a PYTHONPATH": (lambda d: d.container["env"].append({"name": "PYTHONPATH", "value": "/x"}), "sets PYTHONPATH"),
    # GPUs and memory
    "a missing toleration": (remove_tolerations, "the taint nvidia.com/gpu not tolerated"),
    "GPUs requested other than limited": (
        lambda d: d.model["resources"]["requests"].update({"nvidia.com/gpu": "2"}),
        "differ from limits",
    ),
    "a GPU that may be missing": (lambda d: d.settings.update(PREDICTOR_DEVICE="auto"), "serves from its CPU"),
    "no memory limit": (remove_memory_limit, "does not say how much memory"),
    "a request over its limit": (lambda d: d.model["resources"]["requests"].update(cpu="9"), "requests cpu 9"),
    # Security
    "the Hub's token in the predictor": (add_hub_token, "the predictor is given the Hub's token"),
    "a predictor that may ask the Hub": (
        lambda d: d.model["env"].append({"name": "HF_HUB_OFFLINE", "value": "0"}),
        "the predictor may ask the Hub",
    ),
    "root": (lambda d: d.container["securityContext"].update(runAsUser=0), "may run as root"),
    "a writable root": (remove_read_only_root, "has a writable root"),
    "weights that can be changed": (
        lambda d: d.annotations.update({"storage.kserve.io/readonly": "false"}),
        "may change them",
    ),
    "a predictor that may ask everybody": (
        lambda d: d["NetworkPolicy/predictor"]["spec"].update(egress=[{}]),
        "lets the predictor out to everybody",
    ),
    "capabilities": (lambda d: d.container["securityContext"].update(capabilities={}), "keeps capabilities"),
    "privileges to gain": (
        lambda d: d.job["containers"][0]["securityContext"].update(allowPrivilegeEscalation=True),
        "may gain privileges",
    ),
    "no seccomp profile": (
        lambda d: d.job["securityContext"].update(seccompProfile={"type": "Unconfined"}),
        "has no seccomp profile",
    ),
    "a home that cannot be written": (
        lambda d: d.model["env"].append({"name": "HF_HOME", "value": "/root/hf"}),
        "HF_HOME is '/root/hf'",
    ),
    "a service-account token": (
        lambda d: d.job.update(automountServiceAccountToken=True),
        "gets a service-account token",
    ),
    "a namespace that KServe passes over": (
        lambda d: d["Namespace"]["metadata"]["labels"].update({"control-plane": "x"}),
        "has the label control-plane",
    ),
    "a namespace that enforces nothing": (
        lambda d: d["Namespace"]["metadata"].update(labels={}),
        "does not enforce Pod Security restricted",
    ),
    "a secret in a ConfigMap": (lambda d: d.download.update({"HF_TOKEN": "hf_x"}), "holds HF_TOKEN"),
    "a Secret in the overlay": (add_secret, "Secret mine is part of the overlay"),
}


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_one_mistake_is_one_sentence(draft, mistake, sentence):
    prod = draft("prod")
    mistake(prod)
    [finding] = prod.look()
    assert sentence in str(finding)
    assert "\n" not in str(finding)
    assert str(finding).startswith(f"{finding.severity}: ")
    assert str(finding).endswith(".")


def test_a_name_that_kserve_denies_and_that_a_policy_and_a_monitor_do_not_know(draft):
    prod = draft("prod")
    prod["InferenceService"]["metadata"]["name"] = "7b"
    said = "\n".join(map(str, prod.look()))
    assert "its name is '7b'" in said
    assert "NetworkPolicy/predictor: it selects the pods of InferenceService 'llm'" in said
    assert "PodMonitor/predictor: it selects the pods of InferenceService 'llm'" in said


def test_the_reference_is_missed_by_name_and_by_meaning(draft):
    prod = draft("prod")
    remove_reference(prod)
    key, meaning = prod.look()
    assert "key 'MODEL_REFERENCE'" in str(key)
    assert "is told no MODEL_REFERENCE" in str(meaning)


def test_a_misspelt_field_of_a_custom_kind(draft, schemas):
    prod = draft("prod")
    prod.model["storageURI"] = "pvc://models"
    [finding] = prod.look(schemas)
    assert "'storageURI' was unexpected" in str(finding)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda d: d.predictor.update(minReplicas="one"),
        lambda d: d.predictor.update(model=[]),
        lambda d: d.model["resources"]["limits"].update(cpu="four"),
        lambda d: d.settings.update(PREDICTOR_MAX_NUM_SEQS="many"),
        lambda d: d.annotations.update({"autoscaling.knative.dev/initial-scale": 1}),
    ],
)
def test_values_of_the_wrong_kind_are_findings_and_no_crash(draft, mistake):
    prod = draft("prod")
    mistake(prod)
    assert [finding for finding in prod.look() if finding.severity == "error"]


def test_an_annotation_that_is_no_string(draft, schemas):
    prod = draft("prod")
    prod.annotations["prometheus.io/port"] = 8080
    [finding] = prod.look(schemas)
    assert "$.metadata.annotations['prometheus.io/port']: 8080 is not of type 'string'" in str(finding)


def test_a_download_in_the_pod_that_may_ask_nobody(draft):
    prod = draft("prod")
    [container] = prod.job["containers"]
    prod.predictor["initContainers"] = [{**container, "securityContext": prod.container["securityContext"]}]
    prod.predictor["volumes"] = [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}]
    prod.objects = [each for each in prod.objects if each["kind"] != "Job"]
    [finding] = prod.look()
    assert "NetworkPolicy/default-deny: it lets the predictor's pod out to nobody" in str(finding)


def test_spans_that_may_reach_nobody(draft):
    prod = draft("prod")
    prod.settings["PREDICTOR_TRACING"] = "true"
    [finding] = prod.look()
    assert "NetworkPolicy/default-deny: it lets the predictor's pod out to nobody, and PREDICTOR_TRACING" in str(
        finding
    )
    prod["NetworkPolicy/predictor"]["spec"]["egress"] = [{"ports": [{"port": 4318}]}]
    assert prod.look() == []


def test_a_runtime_that_is_not_there(draft):
    prod = draft("prod")
    prod.model["runtime"] = "kserve-lm"
    assert "ServingRuntime 'kserve-lm' is not in this overlay" in "\n".join(map(str, prod.look()))


def test_two_implementations(draft):
    prod = draft("prod")
    prod.predictor["containers"] = [{**prod.container, "name": "kserve-container"}]
    assert "2 implementations" in "\n".join(map(str, prod.look()))


HF, HTTPS = {"uri": "hf://a/b"}, {"uri": "https://x/y", "mountPath": "/srv/y"}
S3_STORAGE = {"path": "x", "parameters": {"type": "s3"}}


@pytest.mark.parametrize(
    ("predictor", "sentence"),
    [
        ({"storageUris": [{"uri": ""}]}, "an entry without a uri"),
        ({"storageUris": [{"uri": "hf://a/b", "mountPath": "/mnt/../x"}]}, "mountPath '/mnt/../x'"),
        ({"storageUris": [{"uri": "pvc://a"}, {"uri": "pvc://b"}]}, "two claims at one path"),
        ({"storageUris": [HF, HTTPS]}, "without a common parent (/mnt/models, /srv/y)"),
        ({"logger": {"mode": "all", "storage": S3_STORAGE}}, "logger.storage lacks key"),
        ({"containers": [{"name": "transformer-container", "env": [{"name": "STORAGE_URI"}]}]}, "sets STORAGE_URI"),
        ({"workerSpec": {"containers": [{"name": "a"}, {"name": "b"}]}}, "several containers"),
        ({"workerSpec": {"containers": [{"name": "a", "env": [{"name": "PYTHONPATH"}]}]}}, "a sets PYTHONPATH"),
        ({"workerSpec": {"tensorParallelSize": 0}}, "tensorParallelSize is 0"),
        ({"workerSpec": {}}, "autoscalerClass: none"),
    ],
)
def test_what_the_webhook_denies_of_what_no_overlay_has(draft, predictor, sentence):
    prod = draft("prod")
    prod.predictor.update(predictor)
    if "storageUris" in predictor:
        del prod.model["storageUri"]
    denied = [str(finding) for finding in kserve.check(Deployment(tuple(prod.objects)))]
    assert [finding for finding in denied if sentence in finding], denied


def test_a_container_of_ones_own_that_speaks_no_protocol_of_kserve(draft):
    prod = draft("prod")
    del prod.predictor["model"]
    prod.predictor["containers"] = [{"name": "kserve-container", "env": [{"name": "PROTOCOL", "value": "grpc"}]}]
    [finding] = kserve.check(Deployment(tuple(prod.objects)))
    assert "sets PROTOCOL to 'grpc'" in str(finding)


def test_an_overlay_without_a_service(draft):
    prod = draft("prod")
    prod.objects = [each for each in prod.objects if each["kind"] != "InferenceService"]
    [finding] = prod.look()
    assert "the overlay has 0 of them" in str(finding)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda d: d.predictor.update(minReplicas=0), "minReplicas is 0"),
        (lambda d: d.predictor.update(scaleMetric="concurrency"), "scaleMetric is concurrency"),
        (lambda d: d.predictor.update(canaryTrafficPercent=10), "only Knative mode can do"),
        (
            lambda d: d.predictor.update(terminationGracePeriodSeconds=30),
            "do not fit into terminationGracePeriodSeconds",
        ),
        (lambda d: d["Ingress"]["metadata"].update(annotations={}), "cuts requests off after 60 s"),
        (lambda d: d["Ingress"]["spec"]["rules"][0]["http"]["paths"][0].update(backend={}), "Service None"),
    ],
)
def test_mistakes_of_standard_mode(draft, mistake, sentence):
    standard = draft("prod-standard")
    mistake(standard)
    findings = [str(finding) for finding in standard.look() if "was expected" not in finding.problem]
    assert any(sentence in finding for finding in findings), findings


def test_an_ingress_in_knative_mode(draft):
    standard = draft("prod-standard")
    standard.annotations["serving.kserve.io/deploymentMode"] = "Knative"
    assert "bypasses Knative's gateway" in "\n".join(map(str, standard.look()))


def test_a_model_that_does_not_fit_into_memory(draft):
    dev = draft("dev")
    model = resources.Model(3584, 18944, 28, 28, 4, 128, 152064, tied=False, dtype="bfloat16")
    [finding] = dev.look(model=model)
    assert "needs 16.1 GiB, of which weights 14.2 GiB and KV cache 0.9 GiB, and the memory limit is 4.0 GiB" in str(
        finding
    )
    dev.settings["PREDICTOR_QUANTIZATION"] = "8bit"
    [finding] = dev.look(model=model)
    assert "weights 8.1 GiB" in str(finding)


def test_a_model_that_does_not_fit_into_a_slice(draft):
    prod = draft("prod")
    for kind in ("requests", "limits"):
        prod.model["resources"][kind] |= {"nvidia.com/mig-1g.5gb": "1"}
        del prod.model["resources"][kind]["nvidia.com/gpu"]
    model = resources.Model(3584, 18944, 28, 28, 4, 128, 152064, tied=False, dtype="bfloat16")
    [finding] = prod.look(model=model)
    assert "the weights take 8.1 GiB, and a slice has 4.7 GiB" in str(finding)
