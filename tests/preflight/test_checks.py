"""Each mistake in an overlay is one finding that names it."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from devtools.paths import ROOT
from preflight.checks import kserve, resources
from preflight.checks.schema import Schemas
from preflight.deployment import Manifest
from preflight.findings import Source
from tests.preflight.conftest import Draft

Drafts = Callable[[str], Draft]
Mistake = Callable[[Draft], object]

KNATIVE_MAXIMUM = "more than Knative's maximum of 600 s"


def remove_tolerations(draft: Draft) -> None:
    del draft.predictor["tolerations"]


def remove_liveness_probe(draft: Draft) -> None:
    del draft.container["livenessProbe"]


def remove_storage_uri(draft: Draft) -> None:
    del draft.model["storageUri"]


def remove_reference(draft: Draft) -> None:
    del draft.download["MODEL_REFERENCE"]


def remove_progress_deadline(draft: Draft) -> None:
    del draft.annotations["serving.knative.dev/progress-deadline"]


def remove_full_duplex(draft: Draft) -> None:
    del draft.annotations["features.knative.dev/http-full-duplex"]


def remove_scale_target(draft: Draft) -> None:
    del draft.predictor["scaleTarget"]


def remove_mode(draft: Draft) -> None:
    del draft.annotations["serving.kserve.io/deploymentMode"]


def remove_memory_limit(draft: Draft) -> None:
    del draft.model["resources"]["limits"]["memory"]


def remove_gpu_request(draft: Draft) -> None:
    del draft.model["resources"]["requests"]["nvidia.com/gpu"]


def remove_gpu_limit(draft: Draft) -> None:
    del draft.model["resources"]["limits"]["nvidia.com/gpu"]
    draft.settings["PREDICTOR_DEVICE"] = "cpu"


def half_a_gpu(draft: Draft) -> None:
    for kind in ("requests", "limits"):
        draft.model["resources"][kind]["nvidia.com/gpu"] = "0.5"


def one_gpu_in_other_notations(draft: Draft) -> None:
    draft.model["resources"]["requests"]["nvidia.com/gpu"] = "1000m"
    draft.model["resources"]["limits"]["nvidia.com/gpu"] = 1


def fp8_without_gpu(draft: Draft) -> None:
    remove_gpu_request(draft)
    remove_gpu_limit(draft)
    draft.settings["PREDICTOR_QUANTIZATION"] = "fp8"


def no_gpu(draft: Draft) -> None:
    for kind in ("requests", "limits"):
        draft.model["resources"][kind]["nvidia.com/gpu"] = "0"
    draft.settings["PREDICTOR_DEVICE"] = "cpu"
    del draft.predictor["tolerations"]


def add_hub_token(draft: Draft) -> None:
    secret = {"secretKeyRef": {"name": "hf-secret", "key": "HF_TOKEN"}}
    draft.model["env"].append({"name": "HF_TOKEN", "valueFrom": secret})


def three_replicas_on_one_node(draft: Draft) -> None:
    draft["PersistentVolumeClaim"]["spec"]["accessModes"] = ["ReadWriteOnce"]
    draft.predictor["maxReplicas"] = 3


def timeout_over_the_maximum(draft: Draft) -> None:
    draft.predictor["timeout"] = 601
    draft.settings["PREDICTOR_SNAPSHOT_WAIT_SECONDS"] = "1199"


def add_secret(draft: Draft) -> None:
    metadata = {"name": "mine", "namespace": "kserve-llm-prod"}
    draft.objects.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"a": "b"}})


def mount_keys_from_a_config_map(draft: Draft) -> None:
    draft.mount_keys({"configMap": {"name": draft["ConfigMap/predictor-"]["metadata"]["name"]}})


def remove_read_only_root(draft: Draft) -> None:
    del draft.container["securityContext"]["readOnlyRootFilesystem"]


def policy_of_another_service(draft: Draft) -> None:
    selector = {"matchLabels": {"serving.kserve.io/inferenceservice": "x"}}
    draft["NetworkPolicy/predictor"]["spec"]["podSelector"] = selector


def other_reference_in_the_job(draft: Draft) -> None:
    draft.job["containers"][0]["env"].append({"name": "MODEL_REFERENCE", "value": f"hf://owner/other:{'b' * 40}"})


ADAPTER = f"hf://owner/adapter:{'c' * 40}"


def adapter_beside_prepared_weights(draft: Draft) -> None:
    draft.add_adapter(ADAPTER)
    draft.download["STORAGE_INITIALIZER_PREPARE"] = "int8-cpu"


def two_secrets_at_one_path(draft: Draft) -> None:
    for name in ("a", "b"):
        draft["ServingRuntime"]["spec"]["volumes"].append({"name": name, "secret": {"secretName": name}})
        draft.container["volumeMounts"].append({"name": name, "mountPath": "/etc/keys"})


def volume_over_the_weights(draft: Draft) -> None:
    draft["ServingRuntime"]["spec"]["volumes"].append({"name": "cache", "emptyDir": {}})
    draft.container["volumeMounts"].append({"name": "cache", "mountPath": "/mnt/models"})


def other_namespace(draft: Draft) -> None:
    draft["PersistentVolumeClaim"]["metadata"]["namespace"] = "default"


def system_namespace(draft: Draft) -> None:
    for manifest in draft.objects:
        if "namespace" in manifest["metadata"]:
            manifest["metadata"]["namespace"] = "kserve"


def hidden_queue_proxy(draft: Draft) -> None:
    for rule in draft["NetworkPolicy/predictor"]["spec"]["ingress"]:
        rule["ports"] = [{"port": 8080}]


def unlimited_replicas(draft: Draft) -> None:
    del draft.predictor["maxReplicas"]


def tokens_of_two_sequences(draft: Draft) -> None:
    draft.settings.update(PREDICTOR_KV_CACHE_TOKENS="4096", PREDICTOR_MAX_MODEL_LEN="8192")


def prepare(draft: Draft) -> None:
    draft.download.update(STORAGE_INITIALIZER_PREPARE="int8-cpu", STORAGE_INITIALIZER_PREPARE_SKIP_MODULES="lm_head")


def prepare_for_nobody(draft: Draft) -> None:
    draft.download.update(STORAGE_INITIALIZER_PREPARE="int8-cpu")
    draft.settings.update(PREDICTOR_QUANTIZATION="4bit")


MISTAKES: dict[str, tuple[Mistake, str]] = {
    # Rules of the API server that no schema has
    "label": (
        lambda d: d["PersistentVolumeClaim"]["metadata"]["labels"].update(owner="the team"),
        "PersistentVolumeClaim/models: label owner is 'the team'",
    ),
    "label_key": (
        lambda d: d["Job"]["spec"]["template"]["metadata"]["labels"].update({"a/b/c": "x"}),
        "'a/b/c' is not the key of a label",
    ),
    "object_name": (
        lambda d: d["NetworkPolicy/default"]["metadata"].update(name="Default_Deny"),
        "its name is 'Default_Deny'",
    ),
    "pull_policy": (
        lambda d: d.container.update(imagePullPolicy="ifNotPresent"),
        "has imagePullPolicy 'ifNotPresent'; use Always, IfNotPresent, Never",
    ),
    "restart_policy": (lambda d: d.job.update(restartPolicy="OnFailure"), "podFailurePolicy, which requires"),
    "restart_policy_always": (lambda d: d.job.update(restartPolicy="Always"), "is Always, which a Job cannot have"),
    "failure_policy_container": (
        lambda d: d["Job"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"].update(containerName="main"),
        "its podFailurePolicy names container 'main'",
    ),
    "volume_twice": (
        lambda d: d["ServingRuntime"]["spec"]["volumes"].append({"name": "tmp", "emptyDir": {}}),
        "two volumes have the name 'tmp'",
    ),
    "mount_twice": (two_secrets_at_one_path, "mounts two volumes at /etc/keys"),
    "toleration_operator": (
        lambda d: d.predictor["tolerations"].append({"key": "team", "operator": "Is", "value": "a"}),
        "the toleration of 'team' has operator 'Is'",
    ),
    "toleration_value": (
        lambda d: d.predictor["tolerations"].append({"key": "team", "operator": "Exists", "value": "a"}),
        "has operator Exists and a value",
    ),
    "toleration_key": (
        lambda d: d.predictor["tolerations"].append({"operator": "Equal", "value": "a"}),
        "a toleration without a key has operator Equal",
    ),
    "toleration_effect": (
        lambda d: d.predictor["tolerations"].append({"key": "team", "effect": "noSchedule"}),
        "has effect 'noSchedule'",
    ),
    "toleration_seconds": (
        lambda d: d.predictor["tolerations"][0].update(tolerationSeconds=60),
        "has tolerationSeconds",
    ),
    "probe_successes": (
        lambda d: d.container["startupProbe"].update(successThreshold=2),
        "has a startupProbe with successThreshold 2",
    ),
    "probe_handlers": (
        lambda d: d.container["livenessProbe"].update(exec={"command": ["true"]}),
        "has a livenessProbe with exec and httpGet",
    ),
    "probe_https": (
        lambda d: d.container["readinessProbe"]["httpGet"].update(scheme="HTTPS"),
        "the readinessProbe uses HTTPS",
    ),
    "liveness_is_readiness": (
        lambda d: d.container["livenessProbe"]["httpGet"].update(path="/v2/models/llm/ready"),
        "the livenessProbe requests readiness",
    ),
    # Arguments and annotations
    "variable_in_arguments": (
        lambda d: d.model.update(args=["--dtype=$(DTYPE)"]),
        "uses $(DTYPE), and has no variable of that name",
    ),
    "shell_variable": (
        lambda d: d.job["containers"][0]["args"].append("--ignore=${PATTERNS}"),
        "uses ${PATTERNS}, which only a shell expands; write $(PATTERNS)",
    ),
    "annotation_name": (
        lambda d: d.annotations.update({"autoscaling.knative.dev/windows": "60s"}),
        "annotation autoscaling.knative.dev/windows is unknown to KServe and Knative; use autoscaling.knative.dev/w",
    ),
    "annotation_case": (
        lambda d: d.annotations.update({"serving.kserve.io/autoscalerclass": "hpa"}),
        "use serving.kserve.io/autoscalerClass",
    ),
    "initial_scale_of_pods": (
        lambda d: d.predictor.update(annotations={"autoscaling.knative.dev/initial-scale": "1"}),
        "is in spec.predictor, where KServe ignores it",
    ),
    "initial_scale_zero": (
        lambda d: d.annotations.update({"autoscaling.knative.dev/initial-scale": "0"}),
        "is 0, which KServe ignores unless",
    ),
    "scrape_port": (
        lambda d: d.annotations.update({"prometheus.io/port": "9090"}),
        "annotation prometheus.io/port is 9090, which container kserve-container does not open",
    ),
    "scrape_path": (lambda d: d.annotations.update({"prometheus.io/path": "/"}), "annotation prometheus.io/path is /"),
    # Namespaces and policies
    "other_namespace": (other_namespace, "PersistentVolumeClaim/models: it is in namespace default, and Inference"),
    "system_namespace": (system_namespace, "it is in namespace kserve, in which KServe's webhook mounts no weights"),
    "policy_port": (hidden_queue_proxy, "NetworkPolicy/predictor: it does not allow port 8012"),
    # Claims and scratch volumes
    "claim_of_one_pod": (
        lambda d: [
            d["PersistentVolumeClaim"]["spec"].update(accessModes=["ReadWriteOncePod"]),
            d.predictor.update(maxReplicas=1),
        ],
        "it is ReadWriteOncePod, so the Job and the predictor",
    ),
    "access_mode": (
        lambda d: d["PersistentVolumeClaim"]["spec"].update(accessModes=["ReadWriteAll"]),
        "it has access mode 'ReadWriteAll'",
    ),
    "block_volume": (lambda d: d["PersistentVolumeClaim"]["spec"].update(volumeMode="Block"), "volumeMode is Block"),
    "storage_unit": (
        lambda d: d["PersistentVolumeClaim"]["spec"]["resources"]["requests"].update(storage="50"),
        "it requests 50 bytes of storage; add the unit, as in 50Gi",
    ),
    "no_storage": (lambda d: d["PersistentVolumeClaim"]["spec"].update(resources={}), "it requests no storage"),
    "volume_over_the_weights": (volume_over_the_weights, "mounts volume cache at /mnt/models, the path of storageUri"),
    "shared_memory": (
        lambda d: d["ServingRuntime"]["spec"]["volumes"][1]["emptyDir"].update(sizeLimit="64Gi"),
        "volume shm may hold 64Gi, more than the memory limit 24Gi",
    ),
    # Units and devices
    "memory_unit": (
        lambda d: d.job["containers"][0]["resources"].update(
            requests={"cpu": "1", "memory": "4"}, limits={"cpu": "1", "memory": "4Gi"}
        ),
        "requests 4 bytes of memory; correct the unit, as in memory: 4Gi",
    ),
    "memory_in_thousandths": (
        lambda d: d.job["containers"][0]["resources"]["requests"].update(memory="512m"),
        "requests 0.512 bytes of memory",
    ),
    "cpu_unit": (
        lambda d: d.job["containers"][0]["resources"].update(limits={"cpu": 2000, "memory": "4Gi"}),
        "limits 2000 cores; add the unit, as in cpu: 2000m",
    ),
    "gpu_of_the_job": (
        lambda d: d.job["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": 1}),
        "warning: Job/model-download-",
    ),
    # Settings
    "cache_below_one_sequence": (tokens_of_two_sequences, "PREDICTOR_KV_CACHE_TOKENS is 4096, less than one sequence"),
    "api_keys_without_a_volume": (
        lambda d: d.settings.update(PREDICTOR_API_KEYS_FILE="/etc/keys/keys"),
        "and no volume is mounted there, so the predictor does not start",
    ),
    "grpc_in_knative": (
        lambda d: d.settings.update(PREDICTOR_ENABLE_GRPC="true"),
        "warning: InferenceService/llm: PREDICTOR_ENABLE_GRPC is true, and Knative routes to one port",
    ),
    "threads_over_limit": (
        lambda d: d.settings.update(PREDICTOR_NUM_THREADS="16"),
        "warning: InferenceService/llm: PREDICTOR_NUM_THREADS is 16, more than the limit of 4 CPUs",
    ),
    "offline_job": (lambda d: d.download.update(STORAGE_INITIALIZER_OFFLINE="true"), "the Job is offline"),
    "prepared_weights_of_other_layers": (prepare, "the Job skips layers lm_head and the predictor none"),
    "prepared_weights_unused": (
        prepare_for_nobody,
        "the Job prepares int8-cpu, and PREDICTOR_QUANTIZATION is 4bit, which does not use it; "
        "set PREDICTOR_QUANTIZATION=8bit",
    ),
    "prepared_4bit_weights_unused": (
        lambda d: d.download.update(STORAGE_INITIALIZER_PREPARE="int4-cpu"),
        "the Job prepares int4-cpu, and PREDICTOR_QUANTIZATION is 8bit, which does not use it; "
        "set PREDICTOR_QUANTIZATION=4bit",
    ),
    "remote_code_not_published": (
        lambda d: d.settings.update(PREDICTOR_TRUST_REMOTE_CODE="true"),
        "and the Job does not publish code",
    ),
    # KServe and Knative
    "runtime_disabled": (lambda d: d["ServingRuntime"]["spec"].update(disabled=True), "KServe does not select it"),
    "unlimited_replicas": (unlimited_replicas, "warning: InferenceService/llm: maxReplicas is not set"),
    # Fields and names
    "job_field": (lambda d: d.job.update(restartPolice="Never"), "'restartPolice' was unexpected"),
    "setting_key": (lambda d: d.settings.update(PREDICTOR_MAX_NUM_SEQ="8"), "use PREDICTOR_MAX_NUM_SEQS"),
    "setting_number": (
        lambda d: d.settings.update(PREDICTOR_MAX_QUEUED_REQUESTS="lots"),
        "PREDICTOR_MAX_QUEUED_REQUESTS is 'lots', so the predictor does not start: input should be a valid integer",
    ),
    "setting_boolean": (
        lambda d: d.download.update(STORAGE_INITIALIZER_OFFLINE="maybe"),
        "STORAGE_INITIALIZER_OFFLINE is 'maybe', so the storage initializer does not start",
    ),
    "setting_word": (
        lambda d: d.settings.update(PREDICTOR_QUANTIZATION="8bits"),
        "ConfigMap/predictor: PREDICTOR_QUANTIZATION is '8bits', so the predictor does not start: "
        "input should be 'auto', 'none', '8bit', '4bit' or 'fp8'; use 8bit. [kserve-llm]",
    ),
    "setting_in_the_pod": (
        lambda d: d.model["env"].append({"name": "PREDICTOR_DTYPE", "value": "fp16"}),
        "InferenceService/llm: PREDICTOR_DTYPE is 'fp16', so the predictor does not start: "
        "input should be 'auto', 'float32', 'bfloat16' or 'float16'; use float16.",
    ),
    "setting_lower_case_name": (lambda d: d.settings.update(predictor_device="kuda"), "use cuda."),
    "setting_without_prefix": (lambda d: d.settings.update(LOG_LEVEL="verbose"), "'INFO', 'WARNING' or 'ERROR'"),
    "setting_bound": (lambda d: d.settings.update(PREDICTOR_GRPC_PORT="70000"), "less than or equal to 65535"),
    "setting_pattern": (lambda d: d.settings.update(PREDICTOR_SERVED_MODEL_NAME="a/b"), "should match pattern"),
    "setting_empty": (
        lambda d: d.settings.update(PREDICTOR_MAX_QUEUED_REQUESTS=""),
        "PREDICTOR_MAX_QUEUED_REQUESTS is ''",
    ),
    "setting_of_the_job": (
        lambda d: d.download.update(STORAGE_INITIALIZER_PREPARE="int8"),
        "should be 'int8-cpu' or 'int4-cpu'; use int8-cpu",
    ),
    "setting_key_of_the_job": (
        lambda d: d.job["containers"][0]["env"].append({"name": "STORAGE_INITIALIZER_ATTEMPT", "value": "3"}),
        "not a setting of the storage initializer; use STORAGE_INITIALIZER_ATTEMPTS",
    ),
    "setting_umask": (lambda d: d.download.update(STORAGE_INITIALIZER_UMASK="0077"), "let the group read"),
    "setting_endpoint_with_password": (
        lambda d: d.download.update(HF_ENDPOINT="https://me:pass@hub"),
        "HF_ENDPOINT is invalid, so the storage initializer does not start: it contains a user or password",
    ),
    "setting_of_the_other_program": (
        lambda d: d.download.update(PREDICTOR_MAX_NUM_SEQS="8"),
        "PREDICTOR_MAX_NUM_SEQS is a setting of the predictor, and the storage initializer ignores it",
    ),
    "flag_value": (
        lambda d: d.model.update(args=["--quantization", "8bits"]),
        "--quantization is '8bits', so the predictor does not start: input should be 'auto', 'none', '8bit', "
        "'4bit' or 'fp8'; use 8bit.",
    ),
    "flag_name": (
        lambda d: d.model.update(args=["--max-model-length=8192"]),
        "the predictor rejects its arguments: Unknown flag: --max_model_length. Did you mean --max_model_len?",
    ),
    "flag_with_dashes": (lambda d: d.model.update(args=["--max-queued-requests=-1"]), "--max-queued-requests is '-1'"),
    "flag_overrides_a_variable": (lambda d: d.model.update(args=["--device=cpu"]), "PREDICTOR_DEVICE is cpu"),
    "flag_help": (lambda d: d.model.update(args=["--help"]), "the predictor prints its help and exits"),
    "flag_of_the_job": (
        lambda d: d.job["containers"][0]["args"].append("--prepare=int4"),
        "--prepare is 'int4', so the storage initializer does not start",
    ),
    "arguments_of_the_job": (
        lambda d: d.job["containers"][0].update(args=["$(MODEL_REFERENCE)"]),
        "the storage initializer rejects its arguments: Invalid command line: 1 arguments do not make pairs",
    ),
    "model_dir": (
        lambda d: d.settings.update(PREDICTOR_MODEL_DIR="/models"),
        "KServe mounts the claim at /mnt/models",
    ),
    "claim": (lambda d: d.model.update(storageUri="pvc://model"), "PersistentVolumeClaim 'model'"),
    "model_format": (lambda d: d.model.update(modelFormat={"name": "llm"}), "NoSupportingRuntime"),
    "protocol_version": (lambda d: d.model.update(protocolVersion="v1"), "does not support protocol v1"),
    "service_account": (lambda d: d.predictor.update(serviceAccountName="x"), "ServiceAccount 'x'"),
    "config_map": (
        lambda d: d.model["envFrom"].append({"configMapRef": {"name": "x"}}),
        "ConfigMap 'x'",
    ),
    "mount_without_volume": (
        lambda d: d.container["volumeMounts"].append({"name": "cache", "mountPath": "/cache"}),
        "mounts volume 'cache'",
    ),
    "probe_port": (
        lambda d: d.container["livenessProbe"]["httpGet"].update(port=9000),
        "livenessProbe uses port 9000",
    ),
    "probe_model": (
        lambda d: d.container["readinessProbe"]["httpGet"].update(path="/v2/models/x/ready"),
        "readinessProbe requests model 'x'",
    ),
    "policy_selector": (policy_of_another_service, "selects the pods of InferenceService 'x'"),
    "monitor_port": (
        lambda d: d["PodMonitor"]["spec"]["podMetricsEndpoints"][0].update(portNumber=9000),
        "scrapes port 9000",
    ),
    "host": (
        lambda d: d.settings.update(PREDICTOR_HOST="127.0.0.1"),
        "an address that probes and clients do not use",
    ),
    "http_port": (
        lambda d: d.settings.update(PREDICTOR_HTTP_PORT="9000"),
        "is 9000, and the",
    ),
    "image_without_tag": (
        lambda d: d.container.update(image="registry.example.com/predictor"),
        "without a registry",
    ),
    # The model
    "unpinned_reference": (lambda d: d.download.update(MODEL_REFERENCE="hf://owner/model:main"), "is not pinned"),
    "invalid_reference": (lambda d: d.download.update(MODEL_REFERENCE="owner/model"), "use hf://owner/model"),
    "unpinned_adapter": (
        lambda d: d.add_adapter("hf://owner/adapter"),
        "ADAPTER_REFERENCE hf://owner/adapter is not pinned",
    ),
    "invalid_adapter": (lambda d: d.add_adapter("owner/adapter"), "use hf://owner/adapter:<commit>"),
    "adapter_of_the_job_only": (
        lambda d: d.download.update(ADAPTER_REFERENCE=ADAPTER),
        f"the predictor merges adapter none and the Job downloads {ADAPTER}",
    ),
    "adapter_beside_prepared_weights": (
        adapter_beside_prepared_weights,
        "prepares quantized weights without the adapter",
    ),
    "claim_sub_path": (lambda d: d.model.update(storageUri="pvc://models/7b"), "mounts a sub-path"),
    "storage_uri_hf": (
        lambda d: d.model.update(storageUri="hf://owner/model"),
        "the model is downloaded to models",
    ),
    "no_storage_uri": (remove_storage_uri, "adds the agent of a multi-model server"),
    "storage_uri_scheme": (lambda d: d.model.update(storageUri="nfs://server/models"), "'nfs://server/models'"),
    "job_reference": (other_reference_in_the_job, "hf://owner/other"),
    # The volume
    "read_only_claim": (
        lambda d: d["PersistentVolumeClaim"]["spec"].update(accessModes=["ReadOnlyMany"]),
        "it is ReadOnlyMany, and Job/model-download-",
    ),
    "read_only_mount_of_the_job": (
        lambda d: d.job["containers"][0]["volumeMounts"][0].update(readOnly=True),
        "mounts claim models read-only and downloads to it",
    ),
    "read_only_volume_of_the_job": (
        lambda d: d.job["volumes"][0]["persistentVolumeClaim"].update(readOnly=True),
        "mounts claim models read-only and downloads to it",
    ),
    # Scaling
    "min_over_max_replicas": (
        lambda d: d.predictor.update(minReplicas=3),
        "minReplicas is 3 and maxReplicas is 2",
    ),
    "logger_mode": (lambda d: d.predictor.update(logger={"url": "http://x"}), "logger.mode is None"),
    "canary_percent": (lambda d: d.predictor.update(canaryTrafficPercent=101), "is 101"),
    "replicas_on_one_node_volume": (three_replicas_on_one_node, "ReadWriteOnce, which one node can mount"),
    "container_concurrency": (lambda d: d.predictor.update(containerConcurrency=100), "is 100"),
    "no_scale_target": (remove_scale_target, "scaleTarget is 100 by default"),
    "scale_metric": (lambda d: d.predictor.update(scaleMetric="cpu"), "scaleMetric is cpu"),
    "deployment_strategy": (lambda d: d.predictor.update(deploymentStrategy={}), "deploymentStrategy is set"),
    "window": (lambda d: d.annotations.update({"autoscaling.knative.dev/window": "2s"}), "window is 2s"),
    "retention_unit": (
        lambda d: d.annotations.update({"autoscaling.knative.dev/scale-to-zero-pod-retention-period": "13"}),
        "'13', which is not a duration",
    ),
    "min_scale": (
        lambda d: d.annotations.update({"autoscaling.knative.dev/min-scale": "1"}),
        "is ignored",
    ),
    "autoscaler_class": (
        lambda d: d.annotations.update({"serving.kserve.io/autoscalerClass": "kpa"}),
        "autoscalerClass 'kpa'",
    ),
    "no_deployment_mode": (remove_mode, "no deployment mode is set"),
    # Times
    "timeout_over_maximum": (timeout_over_the_maximum, KNATIVE_MAXIMUM),
    "request_timeout": (
        lambda d: d.settings.update(PREDICTOR_REQUEST_TIMEOUT_SECONDS="600"),
        "PREDICTOR_REQUEST_TIMEOUT_SECONDS is 600",
    ),
    "hold_time": (
        lambda d: d.settings.update(PREDICTOR_HOLD_WHILE_LOADING="590", PREDICTOR_READY_WHILE_LOADING="true"),
        "PREDICTOR_HOLD_WHILE_LOADING is 590 and PREDICTOR_REQUEST_TIMEOUT_SECONDS 590",
    ),
    "hold_without_readiness": (
        lambda d: d.settings.update(PREDICTOR_HOLD_WHILE_LOADING="60"),
        "warning: InferenceService/llm: PREDICTOR_HOLD_WHILE_LOADING has no effect",
    ),
    "readiness_without_hold": (
        lambda d: d.settings.update(PREDICTOR_READY_WHILE_LOADING="Yes"),
        "error: InferenceService/llm: PREDICTOR_READY_WHILE_LOADING is on without",
    ),
    "shutdown_grace": (
        lambda d: d.settings.update(PREDICTOR_SHUTDOWN_GRACE_SECONDS="900"),
        "the pod is killed after 600 s",
    ),
    "shutdown_delay": (
        lambda d: d.settings.update(PREDICTOR_SHUTDOWN_DELAY_SECONDS="1"),
        "are 601 together and the pod is killed after 600 s",
    ),
    "step_timeout": (
        lambda d: d.settings.update(PREDICTOR_STEP_TIMEOUT_SECONDS="500"),
        "a stuck predictor restarts after 500 s",
    ),
    "snapshot_wait": (
        lambda d: d.settings.update(PREDICTOR_SNAPSHOT_WAIT_SECONDS="3000"),
        "waiting for a snapshot (3000 s)",
    ),
    "progress_deadline": (remove_progress_deadline, "Knative fails the revision after 600 s"),
    # Streams
    "no_full_duplex": (remove_full_duplex, "warning: InferenceService/llm: annotation features.knative.dev/http-full"),
    "full_duplex_disabled": (
        lambda d: d.annotations.update({"features.knative.dev/http-full-duplex": "Disabled"}),
        "may cut streams under load",
    ),
    # Probes and pods
    "no_liveness_probe": (remove_liveness_probe, "has no livenessProbe"),
    "lifecycle": (
        lambda d: d.container.update(lifecycle={}),
        "has lifecycle, which Knative rejects",
    ),
    "termination_grace": (
        lambda d: d.predictor.update(terminationGracePeriodSeconds=30),
        "terminationGracePeriodSeconds is set",
    ),
    "second_port": (lambda d: d.container["ports"].append({"containerPort": 8081}), "2 container ports"),
    "reserved_variable": (
        lambda d: d.container["env"].append({"name": "PORT", "value": "8080"}),
        "sets PORT, which Knative reserves",
    ),
    "pythonpath": (lambda d: d.container["env"].append({"name": "PYTHONPATH", "value": "/x"}), "sets PYTHONPATH"),
    # GPUs and memory
    "no_toleration": (remove_tolerations, "no taint is tolerated, so GPU nodes"),
    "gpu_requests": (
        lambda d: d.model["resources"]["requests"].update({"nvidia.com/gpu": "2"}),
        "requests nvidia.com/gpu 2, which differs from its limit 1",
    ),
    "gpu_request_only": (remove_gpu_limit, "requests nvidia.com/gpu 1 without a limit"),
    "half_a_gpu": (half_a_gpu, "has nvidia.com/gpu 0.5, and Kubernetes allocates whole devices only"),
    "half_a_gpu_in_the_job": (
        lambda d: d.job["containers"][0]["resources"]["limits"].update({"amd.com/gpu": "500m"}),
        "has amd.com/gpu 500m, and Kubernetes allocates whole devices only",
    ),
    "fp8_without_gpu": (fp8_without_gpu, "PREDICTOR_QUANTIZATION is fp8 and no GPU is requested"),
    "int8_cache_on_a_gpu": (
        lambda d: d.settings.update(PREDICTOR_KV_CACHE_DTYPE="int8"),
        "PREDICTOR_KV_CACHE_DTYPE is int8 and a GPU is requested, so the predictor does not start; set it to auto",
    ),
    "device_auto": (lambda d: d.settings.update(PREDICTOR_DEVICE="auto"), "serves from its CPU"),
    "no_memory_limit": (remove_memory_limit, "has no request or no limit of memory"),
    "storage_over_limit": (
        lambda d: d.job["containers"][0]["resources"].update(
            requests={"cpu": "1", "memory": "1Gi", "ephemeral-storage": "2Gi"},
            limits={"cpu": "1", "memory": "1Gi", "ephemeral-storage": "1Gi"},
        ),
        "requests ephemeral-storage 2Gi, more than its limit 1Gi",
    ),
    "request_over_limit": (lambda d: d.model["resources"]["requests"].update(cpu="9"), "requests cpu 9"),
    # Security
    "hub_token": (add_hub_token, "the predictor has the Hub's token"),
    "hub_online": (
        lambda d: d.model["env"].append({"name": "HF_HUB_OFFLINE", "value": "0"}),
        "the predictor can access the Hub",
    ),
    "run_as_root": (lambda d: d.container["securityContext"].update(runAsUser=0), "may run as root"),
    "writable_root": (remove_read_only_root, "has a writable root"),
    "writable_weights": (
        lambda d: d.annotations.update({"storage.kserve.io/readonly": "false"}),
        "can change the weights",
    ),
    "egress": (
        lambda d: d["NetworkPolicy/predictor"]["spec"].update(egress=[{}]),
        "allows all egress of the predictor",
    ),
    "capabilities": (lambda d: d.container["securityContext"].update(capabilities={}), "keeps capabilities"),
    "privilege_escalation": (
        lambda d: d.job["containers"][0]["securityContext"].update(allowPrivilegeEscalation=True),
        "may gain privileges",
    ),
    "seccomp": (
        lambda d: d.job["securityContext"].update(seccompProfile={"type": "Unconfined"}),
        "has no seccomp profile",
    ),
    "hf_home": (
        lambda d: d.model["env"].append({"name": "HF_HOME", "value": "/root/hf"}),
        "HF_HOME is '/root/hf'",
    ),
    "service_account_token": (
        lambda d: d.job.update(automountServiceAccountToken=True),
        "mounts a service-account token",
    ),
    "control_plane_label": (
        lambda d: d["Namespace"]["metadata"]["labels"].update({"control-plane": "x"}),
        "has the label control-plane",
    ),
    "pod_security_label": (
        lambda d: d["Namespace"]["metadata"].update(labels={}),
        "does not enforce Pod Security restricted",
    ),
    "keys_file_sub_path": (
        lambda d: d.mount_keys(mountPath="/etc/kserve-llm/api-keys/keys", subPath="keys"),
        "is mounted with subPath, so a changed Secret takes effect after a restart only",
    ),
    "keys_file_config_map": (mount_keys_from_a_config_map, "the file of API keys is in ConfigMap predictor"),
    "secret_in_config_map": (lambda d: d.download.update({"HF_TOKEN": "hf_x"}), "contains HF_TOKEN"),
    "secret_in_overlay": (add_secret, "Secret mine is part of the overlay"),
}


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_checks_one_mistake_is_one_finding(draft: Drafts, mistake: Mistake, sentence: str) -> None:
    prod = draft("prod")
    mistake(prod)
    [finding] = prod.check()
    assert sentence in re.sub(r"(ConfigMap/[a-z-]+)-\w{10}\b", r"\1", str(finding))
    assert "\n" not in str(finding)
    assert str(finding).startswith(f"{finding.severity}: ")
    assert str(finding).endswith(f". [{finding.source}]")


@pytest.mark.parametrize(
    "change",
    [
        remove_gpu_request,
        one_gpu_in_other_notations,
        no_gpu,
        lambda d: d.predictor.update(tolerations=[{"key": "sku", "value": "gpu", "effect": "NoSchedule"}]),
        lambda d: d.predictor.update(tolerations=[{"operator": "Exists"}]),
        # A limit without a request is valid for every resource.
        lambda d: d.model["resources"].pop("requests"),
        lambda d: d.model["env"].append({"name": "EXTRA", "value": "x"}),
        lambda d: d.job["containers"][0].update(args=["$(MODEL_REFERENCE)", "/mnt/models", "--ignore=$$(NAME)"]),
        lambda d: (
            d.settings.update(PREDICTOR_TRUST_REMOTE_CODE="true") or d.download.update(STORAGE_ALLOW_PATTERNS="*")
        ),
        lambda d: d.annotations.update({"example.com/windows": "60s", "autoscaling.knative.dev/metric": "concurrency"}),
        lambda d: d.annotations.update({"serving.knative.dev/rolloutDuration": "60s"}),
        lambda d: d.model.update(args=["--served_model_name=$(K_SERVICE)"]),
        lambda d: d["PodMonitor"]["metadata"].update(namespace="monitoring"),
        lambda d: d["PersistentVolumeClaim"]["spec"].update(accessModes=["ReadOnlyMany", "ReadWriteMany"]),
        lambda d: d.settings.update(LOG_LEVEL="debug", PREDICTOR_TRUST_REMOTE_CODE="Off", PREDICTOR_DEVICE="cuda:1"),
        lambda d: d.settings.update(PREDICTOR_MODEL_DIR="/mnt/models", OTHER="x"),
        lambda d: d.download.update(STORAGE_INITIALIZER_PREPARE="", STORAGE_ALLOW_PATTERNS='["*.json"]'),
        # The value below overrides that of the ConfigMap.
        lambda d: [
            d.settings.update(PREDICTOR_DTYPE="int8"),
            d.model["env"].append({"name": "PREDICTOR_DTYPE", "value": "auto"}),
        ],
        lambda d: [d.settings.update(PREDICTOR_DEVICE="auto"), d.model.update(args=["--device", "cuda"])],
        lambda d: d.settings.update(PREDICTOR_HOLD_WHILE_LOADING="480", PREDICTOR_READY_WHILE_LOADING="true"),
        lambda d: [
            d.model["env"].append({"name": "TYPE", "valueFrom": {"secretKeyRef": {"name": "x", "key": "y"}}}),
            d.model.update(args=["--log-prompts", "--dtype=$(TYPE)"]),
        ],
        lambda d: d.model.update(command=["sh", "-c"], args=["exec other --port 1"]),
        Draft.mount_keys,
    ],
)
def test_checks_valid_change_is_no_finding(draft: Drafts, change: Mistake) -> None:
    prod = draft("prod")
    change(prod)
    assert prod.check() == []


def test_resources_only_tolerations_of_node_conditions_is_a_warning(draft: Drafts) -> None:
    prod = draft("prod")
    prod.predictor["tolerations"] = [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}]
    [finding] = prod.check()
    assert (finding.severity, "no taint is tolerated" in finding.problem) == ("warning", True)


def test_checks_invalid_name_is_also_a_finding_of_policy_and_monitor(draft: Drafts) -> None:
    prod = draft("prod")
    prod["InferenceService"]["metadata"]["name"] = "7b"
    findings = "\n".join(map(str, prod.check()))
    assert "its name is '7b'" in findings
    assert "NetworkPolicy/predictor: it selects the pods of InferenceService 'llm'" in findings
    assert "PodMonitor/predictor: it selects the pods of InferenceService 'llm'" in findings


def test_checks_missing_reference_is_two_findings(draft: Drafts) -> None:
    prod = draft("prod")
    remove_reference(prod)
    key, value = prod.check()
    assert "key 'MODEL_REFERENCE'" in str(key)
    assert "MODEL_REFERENCE of the predictor is not set" in str(value)


def test_schema_misspelled_field_of_a_custom_kind_is_a_finding(draft: Drafts, schemas: Schemas) -> None:
    prod = draft("prod")
    prod.model["storageURI"] = "pvc://models"
    [finding] = prod.check(schemas)
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
def test_checks_wrong_type_is_an_error_finding(draft: Drafts, mistake: Mistake) -> None:
    prod = draft("prod")
    mistake(prod)
    assert [finding for finding in prod.check() if finding.severity == "error"]


def test_schema_annotation_with_a_number_is_a_finding(draft: Drafts, schemas: Schemas) -> None:
    prod = draft("prod")
    prod["InferenceService"]["metadata"]["annotations"]["prometheus.io/port"] = 8080
    [finding] = prod.check(schemas)
    assert "$.metadata.annotations['prometheus.io/port']: 8080 is not of type 'string'" in str(finding)


def test_security_init_container_download_with_denied_egress_is_a_finding(draft: Drafts) -> None:
    prod = draft("prod")
    [container] = prod.job["containers"]
    prod.predictor["initContainers"] = [{**container, "securityContext": prod.container["securityContext"]}]
    prod.predictor["volumes"] = [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}]
    prod.objects = [manifest for manifest in prod.objects if manifest["kind"] != "Job"]
    [finding] = prod.check()
    assert "NetworkPolicy/default-deny: it denies egress of the predictor's pod" in str(finding)


def test_security_tracing_with_denied_egress_is_a_finding(draft: Drafts) -> None:
    prod = draft("prod")
    prod.settings["PREDICTOR_TRACING"] = "true"
    [finding] = prod.check()
    assert "NetworkPolicy/default-deny: it denies egress of the predictor's pod, and PREDICTOR_TRACING" in str(finding)
    prod["NetworkPolicy/predictor"]["spec"]["egress"] = [{"ports": [{"port": 4318}]}]
    assert prod.check() == []


SOURCES: dict[str, tuple[Mistake, Source]] = {
    "job_field": (lambda d: d.job.update(restartPolice="Never"), "API server"),
    "half_a_gpu": (half_a_gpu, "API server"),
    "run_as_root": (lambda d: d.container["securityContext"].update(runAsUser=0), "API server"),
    "logger_mode": (lambda d: d.predictor.update(logger={"url": "http://x"}), "KServe's webhook"),
    "autoscaler": (
        lambda d: d.annotations.update({"serving.kserve.io/autoscalerClass": "kpa"}),
        "KServe's webhook",
    ),
    "model_format": (lambda d: d.model.update(modelFormat={"name": "llm"}), "KServe's controller"),
    "storage_uri": (lambda d: d.model.update(storageUri="nfs://server/models"), "KServe's controller"),
    "lifecycle": (lambda d: d.container.update(lifecycle={}), "Knative's webhook"),
    "window": (lambda d: d.annotations.update({"autoscaling.knative.dev/window": "2s"}), "Knative's webhook"),
    "timeout": (timeout_over_the_maximum, "Knative's webhook"),
    "claim": (lambda d: d.model.update(storageUri="pvc://model"), "scheduler"),
    "config_map": (lambda d: d.model["envFrom"].append({"configMapRef": {"name": "x"}}), "kubelet"),
    "read_only_claim": (
        lambda d: d["PersistentVolumeClaim"]["spec"].update(accessModes=["ReadOnlyMany"]),
        "kubelet",
    ),
    "setting": (lambda d: d.settings.update(PREDICTOR_QUANTIZATION="8bits"), "kserve-llm"),
    "request_timeout": (lambda d: d.settings.update(PREDICTOR_REQUEST_TIMEOUT_SECONDS="600"), "kserve-llm"),
}


@pytest.mark.parametrize(("mistake", "source"), SOURCES.values(), ids=SOURCES)
def test_checks_finding_has_its_source(draft: Drafts, mistake: Mistake, source: Source) -> None:
    prod = draft("prod")
    mistake(prod)
    [finding] = prod.check()
    assert finding.source == source


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            "alice:alices-key-0123456789\nbob:short",
            ", line 2: invalid key, so the predictor does not start",
        ),
        ("alice:alices-key-0123456789 limit=5", ", line 1: invalid option after the key, so"),
        ("# none\n", " is empty, so the predictor does not start; write one name:key per line."),
    ],
)
@pytest.mark.parametrize("field", ["data", "stringData"])
def test_api_keys_malformed_line_of_a_secret_is_a_finding_without_the_key(
    draft: Drafts, lines: str, problem: str, field: str
) -> None:
    prod = draft("prod")
    prod.mount_keys({"secret": {"secretName": "team-keys", "items": [{"key": "list", "path": "keys"}]}})
    value = lines if field == "stringData" else base64.b64encode(lines.encode()).decode()
    metadata = {"name": "team-keys", "namespace": "kserve-llm-prod", "labels": {}}
    prod.objects.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, field: {"list": value}})
    in_overlay, malformed = prod.check()
    assert "Secret team-keys is part of the overlay" in str(in_overlay)
    assert f"Secret team-keys, key list{problem}" in str(malformed)
    assert "alices-key" not in str(malformed)


def test_settings_unpinned_reference_of_one_replica_is_a_warning(draft: Drafts) -> None:
    prod = draft("prod")
    prod.download["MODEL_REFERENCE"] = "hf://owner/model:main"
    [several] = prod.check()
    prod.predictor["maxReplicas"] = 1
    [one] = prod.check()
    assert (several.severity, one.severity) == ("error", "warning")
    assert "is not pinned, so a restart may serve different weights" in one.problem
    del prod.predictor["maxReplicas"]
    [unlimited] = [finding for finding in prod.check() if "not pinned" in finding.problem]
    assert unlimited.severity == "error"


def test_references_missing_runtime_is_one_finding(draft: Drafts) -> None:
    prod = draft("prod")
    prod.model["runtime"] = "kserve-lm"
    [finding] = prod.check()
    assert "ServingRuntime 'kserve-lm' is not in this overlay" in str(finding)


def test_references_query_of_another_model_is_a_finding(draft: Drafts) -> None:
    standard = draft("prod-standard")
    metric = {"metric": {"query": 'sum(a{model_name="llm"} + b{model_name="llm"})'}, "target": {"value": "24"}}
    standard.annotations["serving.kserve.io/autoscalerClass"] = "keda"
    standard.predictor["autoScaling"] = {"metrics": [{"type": "External", "external": metric}]}
    assert standard.check() == []
    standard.settings["PREDICTOR_SERVED_MODEL_NAME"] = "chat"
    standard.container["args"] = []
    [finding] = standard.check()
    assert "the query of autoScaling counts requests of model 'llm', and 'chat' is served" in str(finding)


def test_kserve_two_implementations_is_a_finding(draft: Drafts) -> None:
    prod = draft("prod")
    prod.predictor["containers"] = [{**prod.container, "name": "kserve-container"}]
    assert "2 implementations" in "\n".join(map(str, prod.check()))


HF, HTTPS = {"uri": "hf://a/b"}, {"uri": "https://x/y", "mountPath": "/srv/y"}
S3_STORAGE = {"path": "x", "parameters": {"type": "s3"}}


@pytest.mark.parametrize(
    ("predictor", "sentence"),
    [
        ({"storageUris": [{"uri": ""}]}, "an entry without a uri"),
        ({"storageUris": [{"uri": "hf://a/b", "mountPath": "/mnt/../x"}]}, "mountPath '/mnt/../x'"),
        ({"storageUris": [{"uri": "pvc://a"}, {"uri": "pvc://b"}]}, "two claims at one path"),
        ({"storageUris": [HF, HTTPS]}, "without a common parent (/mnt/models, /srv/y)"),
        ({"logger": {"mode": "all", "storage": S3_STORAGE}}, "logger.storage has no key"),
        ({"containers": [{"name": "transformer-container", "env": [{"name": "STORAGE_URI"}]}]}, "sets STORAGE_URI"),
        ({"workerSpec": {"containers": [{"name": "a"}, {"name": "b"}]}}, "several containers"),
        ({"workerSpec": {"containers": [{"name": "a", "env": [{"name": "PYTHONPATH"}]}]}}, "a sets PYTHONPATH"),
        ({"workerSpec": {"tensorParallelSize": 0}}, "tensorParallelSize is 0"),
        ({"workerSpec": {}}, "autoscalerClass: none"),
    ],
)
def test_kserve_denied_field_is_a_finding(draft: Drafts, predictor: Manifest, sentence: str) -> None:
    prod = draft("prod")
    prod.predictor.update(predictor)
    if "storageUris" in predictor:
        del prod.model["storageUri"]
    denied = [str(finding) for finding in kserve.check(prod.deployment)]
    assert [finding for finding in denied if sentence in finding], denied


def test_kserve_custom_container_with_unknown_protocol_is_a_finding(draft: Drafts) -> None:
    prod = draft("prod")
    del prod.predictor["model"]
    prod.predictor["containers"] = [{"name": "kserve-container", "env": [{"name": "PROTOCOL", "value": "grpc"}]}]
    [finding] = kserve.check(prod.deployment)
    assert "sets PROTOCOL to 'grpc'" in str(finding)


def test_offline_overlay_without_a_service_is_one_finding(draft: Drafts) -> None:
    prod = draft("prod")
    prod.objects = [manifest for manifest in prod.objects if manifest["kind"] != "InferenceService"]
    [finding] = prod.check()
    assert "the overlay has 0 of them" in str(finding)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda d: d.predictor.update(minReplicas=0), "minReplicas is 0"),
        (lambda d: d.predictor.update(scaleMetric="concurrency"), "scaleMetric is concurrency"),
        (lambda d: d.predictor.update(canaryTrafficPercent=10), "only Knative mode supports"),
        (
            lambda d: d.predictor.update(terminationGracePeriodSeconds=30),
            "exceeds terminationGracePeriodSeconds",
        ),
        (
            lambda d: d.settings.update(PREDICTOR_HOLD_WHILE_LOADING="60", PREDICTOR_READY_WHILE_LOADING="on"),
            "warning: InferenceService/llm: PREDICTOR_READY_WHILE_LOADING is on, and a rollout stops the old replica",
        ),
        (
            lambda d: d.settings.update(PREDICTOR_SHUTDOWN_DELAY_SECONDS="30"),
            "exceeds terminationGracePeriodSeconds (620 s)",
        ),
        (
            lambda d: d.settings.update(PREDICTOR_SHUTDOWN_DELAY_SECONDS="5"),
            "warning: InferenceService/llm: PREDICTOR_SHUTDOWN_DELAY_SECONDS is 5, and a deleted pod",
        ),
        (
            lambda d: d.settings.update(PREDICTOR_SNAPSHOT_WAIT_SECONDS="600"),
            "startupProbe leaves 1200 s to load, and the Deployment reports ProgressDeadlineExceeded after 600 s",
        ),
        (lambda d: d["Ingress"]["metadata"].update(annotations={}), "ends requests after 60 s"),
        (
            lambda d: d["Ingress"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"].update(
                port={"number": 8080}
            ),
            "sends requests to port 8080 of Service llm-predictor, which KServe opens at 80",
        ),
        (lambda d: d.predictor.pop("securityContext"), "the predictor's pod has no fsGroup and the Job's has 1000"),
        (
            lambda d: d.predictor["securityContext"].update(fsGroup=2000),
            "the predictor's pod has fsGroup 2000 and the Job's has 1000",
        ),
        (
            lambda d: d.predictor["deploymentStrategy"]["rollingUpdate"].update(maxSurge=0),
            "maxSurge and maxUnavailable are both 0",
        ),
        (lambda d: d.predictor["deploymentStrategy"].update(type="Recreate"), "is Recreate and has rollingUpdate"),
        (
            lambda d: d.annotations.update({"autoscaling.knative.dev/window": "60s"}),
            "annotation autoscaling.knative.dev/window has no effect in Standard mode",
        ),
        (lambda d: d["Ingress"]["spec"]["rules"][0]["http"]["paths"][0].update(backend={}), "Service None"),
    ],
)
def test_checks_mistake_in_standard_mode_is_a_finding(draft: Drafts, mistake: Mistake, sentence: str) -> None:
    standard = draft("prod-standard")
    mistake(standard)
    findings = [str(finding) for finding in standard.check() if "was expected" not in finding.problem]
    assert any(sentence in finding for finding in findings), findings


def test_references_ingress_in_knative_mode_is_a_finding(draft: Drafts) -> None:
    standard = draft("prod-standard")
    standard.annotations["serving.kserve.io/deploymentMode"] = "Knative"
    assert "bypasses Knative's gateway" in "\n".join(map(str, standard.check()))


def test_resources_model_larger_than_memory_is_a_finding(draft: Drafts) -> None:
    dev = draft("dev")
    dev["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"] = "20Gi"
    model = resources.Model(3584, 18944, 28, 28, 4, 128, 152064, tied=False, dtype="bfloat16")
    [finding] = dev.check(model=model)
    assert "needs 18.7 GiB (weights 14.2 GiB, KV cache 3.5 GiB), and the memory limit is 4.0 GiB" in str(finding)
    dev.settings["PREDICTOR_QUANTIZATION"] = "8bit"
    [finding] = dev.check(model=model)
    assert "weights 8.1 GiB, KV cache 3.5 GiB" in str(finding)
    dev.settings["PREDICTOR_KV_CACHE_DTYPE"] = "int8"
    [finding] = dev.check(model=model)
    assert "weights 8.1 GiB, KV cache 1.9 GiB" in str(finding)


def test_volumes_claim_smaller_than_the_checkpoint_is_a_finding(draft: Drafts) -> None:
    prod = draft("prod")
    model = resources.Model(3584, 18944, 28, 28, 4, 128, 152064, tied=False, dtype="bfloat16")
    prod["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"] = "14Gi"
    [finding] = prod.check(model=model)
    assert "PersistentVolumeClaim/models: it requests 14.0 GiB, and the checkpoint has 14.2 GiB" in str(finding)


def test_settings_context_beyond_the_model_is_a_finding(draft: Drafts, tmp_path: Path) -> None:
    prod = draft("prod")
    config = json.loads((ROOT / "kustomize/overlays/prod/model-config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    model = resources.read(tmp_path / "config.json")
    prod.settings["PREDICTOR_MAX_MODEL_LEN"] = "40000"
    [finding] = prod.check(model=model)
    assert "PREDICTOR_MAX_MODEL_LEN is 40000, and the model has 32768 positions" in str(finding)


def test_volumes_local_volume_in_knative_mode_is_a_warning(draft: Drafts) -> None:
    dev = draft("dev")
    spec = {"capacity": {"storage": "2Gi"}, "accessModes": ["ReadWriteOnce"], "local": {"path": "/mnt/disks/1"}}
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "disk"}, "spec": spec}
    dev.objects.append(volume)
    [finding] = dev.check()
    assert (finding.severity, finding.source) == ("warning", "kubelet")
    assert "no fsGroup and the Job's has 1000; on a volume that the predictor mounts first" in finding.problem


def test_timeouts_progress_deadline_may_be_an_annotation_of_the_predictor(draft: Drafts) -> None:
    prod = draft("prod")
    key = "serving.knative.dev/progress-deadline"
    prod.predictor["annotations"] = {key: prod.annotations.pop(key)}
    assert prod.check() == []


@pytest.mark.parametrize(
    ("overlay", "change", "replicas"),
    [
        ("prod", lambda _: None, (2, 4)),
        ("dev", lambda _: None, (2, 2)),
        ("prod", unlimited_replicas, (2, None)),
        ("prod-standard", lambda _: None, (2, 3)),
        ("prod-standard", lambda d: d.predictor.pop("deploymentStrategy"), (2, 3)),
        ("prod-standard", lambda d: d.predictor.update(deploymentStrategy={"type": "Recreate"}), (1, 2)),
        (
            "prod-standard",
            lambda d: d.predictor.update(deploymentStrategy={"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}),
            (1, 2),
        ),
    ],
)
def test_resources_rollout_counts_old_and_new_replicas(
    draft: Drafts, overlay: str, change: Mistake, replicas: tuple[int, int | None]
) -> None:
    changed = draft(overlay)
    change(changed)
    assert resources.rollout_replicas(changed.deployment) == replicas


def test_resources_model_larger_than_a_gpu_slice_is_a_finding(draft: Drafts) -> None:
    prod = draft("prod")
    for kind in ("requests", "limits"):
        prod.model["resources"][kind] |= {"nvidia.com/mig-1g.5gb": "1"}
        del prod.model["resources"][kind]["nvidia.com/gpu"]
    model = resources.Model(3584, 18944, 28, 28, 4, 128, 152064, tied=False, dtype="bfloat16")
    [finding] = prod.check(model=model)
    assert (
        "each GPU needs 9.2 GiB (weights 8.1 GiB, KV cache of one sequence 0.1 GiB), and has 4.7 GiB" in finding.problem
    )
