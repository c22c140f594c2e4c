"""Each mistake in a RayService is one finding that names it."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from preflight.checks import resources
from preflight.deployment import Manifest
from tests.preflight.conftest import OVERLAYS, Draft

Drafts = Callable[[str], Draft]
Mistake = Callable[["RayDraft"], object]

QWEN = resources.read(OVERLAYS / "rayservice/model-config.json")


class RayDraft(Draft):
    """A copy of overlay rayservice that a test may change."""

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self["RayService"]["spec"]
        return spec

    @property
    def head(self) -> Manifest:
        head: Manifest = self.spec["rayClusterConfig"]["headGroupSpec"]
        return head

    def group(self, index: int) -> Manifest:
        """Return a worker group: 0 has GPUs, 1 has none."""
        group: Manifest = self.spec["rayClusterConfig"]["workerGroupSpecs"][index]
        return group

    def worker(self, index: int) -> Manifest:
        """Return the container of a worker group."""
        container: Manifest = self.group(index)["template"]["spec"]["containers"][0]
        return container

    def serve(self, change: Callable[[Any], object]) -> "RayDraft":
        """Change serveConfigV2."""
        config = yaml.safe_load(self.spec["serveConfigV2"])
        change(config)
        self.spec["serveConfigV2"] = yaml.safe_dump(config)
        return self

    def arguments(self, index: int = 0, **values: object) -> "RayDraft":
        """Change `args` of an application."""
        return self.serve(lambda config: config["applications"][index]["args"].update(values))

    def limit(self, index: int, **quantities: str) -> "RayDraft":
        """Change requests and limits of a worker group."""
        for kind in ("requests", "limits"):
            self.worker(index)["resources"][kind].update(quantities)
        return self


@pytest.fixture
def rayservice(draft: Drafts) -> RayDraft:
    return RayDraft(draft("rayservice").deployment)


def override(**options: object) -> Mistake:
    """Return a mistake in `deployments` of the first application, which overrides `args`."""
    entry = {"name": "predictor", **options}
    return lambda d: d.serve(lambda config: config["applications"][0].update(deployments=[entry]))


def use_a_slice(draft: RayDraft) -> None:
    for amounts in draft.worker(0)["resources"].values():
        amounts["nvidia.com/mig-3g.40gb"] = amounts.pop("nvidia.com/gpu")


GPU = "RayService/llm, application llm: "
CPU = "RayService/llm, application llm-cpu: "
MISTAKES: dict[str, tuple[Mistake, str]] = {
    # serveConfigV2
    "no_config": (lambda d: d.spec.pop("serveConfigV2"), "RayService/llm: serveConfigV2: it has no applications"),
    "not_yaml": (lambda d: d.spec.update(serveConfigV2="a: ["), "RayService/llm: serveConfigV2: it is not YAML"),
    "import_path": (
        lambda d: d.serve(lambda config: config["applications"][0].update(import_path="predictor:app")),
        GPU + "import_path is 'predictor:app'; use predictor.entrypoints.ray_serve:app",
    ),
    "two_routes": (
        lambda d: d.serve(lambda config: config["applications"][1].update(route_prefix="/")),
        "RayService/llm: two applications have route_prefix '/'",
    ),
    "two_names": (
        lambda d: d.serve(lambda config: config["applications"][1].update(name="llm")),
        "RayService/llm: two applications have name 'llm'",
    ),
    "deployment_name": (
        lambda d: d.serve(lambda config: config["applications"][0].update(deployments=[{"name": "Replica"}])),
        GPU + "deployments has 'Replica', and the application's only one is 'predictor'",
    ),
    # Settings
    "unknown_argument": (
        lambda d: d.arguments(max_num_seq=8),
        GPU + "max_num_seq is not a setting of the predictor; use max_num_seqs. [kserve-llm]",
    ),
    "invalid_argument": (
        lambda d: d.arguments(1, max_num_seqs=0),
        CPU + "max_num_seqs is 0, so the predictor does not start: input should be greater than or equal to 1",
    ),
    "invalid_option": (
        lambda d: d.arguments(num_cpus="many"),
        GPU + "num_cpus is 'many', so the predictor does not start: input should be a valid number",
    ),
    "unknown_variable": (
        lambda d: d.settings.update(PREDICTOR_MAX_REPLICA="3"),
        "PREDICTOR_MAX_REPLICA is not a setting of the predictor; use PREDICTOR_MAX_REPLICAS",
    ),
    "grpc": (
        lambda d: d.arguments(enable_grpc=True),
        GPU + "enable_grpc: not possible with Ray Serve: Serve's proxy has no route for it; use HTTP. [kserve-llm]",
    ),
    "two_numbers": (
        lambda d: d.arguments(num_replicas=2),
        GPU + "num_replicas: max_replicas sets the number by load; set one of them.",
    ),
    "device": (
        lambda d: d.arguments(device="auto"),
        GPU + "a GPU is requested and PREDICTOR_DEVICE is auto",
    ),
    "device_without_gpu": (
        lambda d: d.arguments(1, device="cuda"),
        CPU + "PREDICTOR_DEVICE is cuda and no GPU is requested",
    ),
    "unpinned_reference": (
        lambda d: d.download.update(MODEL_REFERENCE="hf://Qwen/Qwen2.5-7B-Instruct"),
        # Of both applications, and so of the object.
        "RayService/llm: MODEL_REFERENCE hf://Qwen/Qwen2.5-7B-Instruct is not pinned, so two replicas may serve "
        "different weights",
    ),
    # Replicas and worker groups
    "gpus_of_no_group": (
        lambda d: d.arguments(num_gpus=2, tensor_parallel_size="auto"),
        GPU + "a replica needs 4 CPUs and 2 GPUs, which no pod of a worker group has (gpu: 4 and 1, cpu: 8 and 0)",
    ),
    "cpus_of_no_group": (lambda d: d.arguments(1, num_cpus=9), CPU + "a replica needs 9 CPUs and 0 GPUs, which no pod"),
    "options_override_arguments": (
        override(ray_actor_options={"num_cpus": 16, "num_gpus": 1}),
        GPU + "a replica needs 16 CPUs and 1 GPUs, which no pod",
    ),
    "too_many_replicas": (
        lambda d: d.arguments(max_replicas=3),
        GPU + "it has up to 3 replicas, and worker group gpu has room for 2; raise maxReplicas",
    ),
    "too_many_replicas_by_autoscaling_config": (
        override(autoscaling_config={"min_replicas": 1, "max_replicas": 5}),
        GPU + "it has up to 5 replicas, and worker group gpu has room for 2",
    ),
    "min_over_max": (lambda d: d.arguments(min_replicas=3), GPU + "min_replicas is 3 and max_replicas 2"),
    "two_replicas_in_a_pod": (
        lambda d: d.arguments(1, num_cpus=4.5).limit(1, cpu="9"),
        CPU + "2 replicas fit in a pod of worker group cpu, and share its memory limit; set num_cpus to 9",
    ),
    "metrics_port": (
        lambda d: d.arguments(metrics_port=9100),
        GPU + "metrics_port is 9100, which container gpu-worker does not open",
    ),
    # Times
    "grace": (
        lambda d: d.arguments(shutdown_grace_seconds=30),
        GPU + "PREDICTOR_SHUTDOWN_GRACE_SECONDS is 30 and PREDICTOR_REQUEST_TIMEOUT_SECONDS 590, so Serve kills",
    ),
    "graceful_shutdown": (
        override(graceful_shutdown_timeout_s=20),
        GPU + "graceful_shutdown_timeout_s is 20 and PREDICTOR_REQUEST_TIMEOUT_SECONDS 590, so Serve kills replicas",
    ),
    "proxy_timeout": (
        lambda d: d.serve(lambda config: config["http_options"].update(request_timeout_s=60)).arguments(
            1, request_timeout_seconds=30
        ),
        GPU + "http_options.request_timeout_s is 60 and PREDICTOR_REQUEST_TIMEOUT_SECONDS 590, so Serve's proxy times",
    ),
    "deletion_delay": (
        lambda d: d.spec.pop("rayClusterDeletionDelaySeconds"),
        "RayService/llm: rayClusterDeletionDelaySeconds is 60 and PREDICTOR_REQUEST_TIMEOUT_SECONDS 590, so an upgrade",
    ),
    "no_pre_stop": (
        lambda d: d.worker(0).pop("lifecycle"),
        GPU + "container gpu-worker has no preStop that drains the node, so a deleted pod ends its running requests",
    ),
    "termination_grace": (
        lambda d: d.group(1)["template"]["spec"].pop("terminationGracePeriodSeconds"),
        CPU + "terminationGracePeriodSeconds of worker group cpu is 30 and PREDICTOR_SHUTDOWN_GRACE_SECONDS 600, so a",
    ),
    # The head and the pods
    "replicas_on_the_head": (
        lambda d: d.head["rayStartParams"].pop("num-cpus"),
        "RayService/llm: the head accepts replicas, whose load and memory can end the whole cluster; set headGroup",
    ),
    "head_without_token": (
        lambda d: d.head["template"]["spec"].update(automountServiceAccountToken=False),
        "the head has no service-account token, so no worker is added",
    ),
    "worker_with_token": (
        lambda d: d.group(0)["template"]["spec"].update(automountServiceAccountToken=True),
        "RayService/llm: its pod mounts a service-account token",
    ),
    "usage_reports": (
        lambda d: d.head["template"]["spec"]["containers"][0]["env"].pop(),
        "RayService/llm: Ray reports its use to its vendor; set RAY_USAGE_STATS_ENABLED=0 on the head",
    ),
    "writable_weights": (
        lambda d: d.worker(0)["volumeMounts"][0].pop("readOnly"),
        "RayService/llm: container gpu-worker mounts the weights writable; set readOnly: true",
    ),
    "root": (
        lambda d: d.group(1)["template"]["spec"]["securityContext"].update(runAsUser=0),
        "RayService/llm: container cpu-worker may run as root",
    ),
    "writable_root": (
        lambda d: d.worker(0)["securityContext"].pop("readOnlyRootFilesystem"),
        "container gpu-worker has a writable root",
    ),
    "hub_online": (
        lambda d: d.worker(1)["env"].append({"name": "HF_HUB_OFFLINE", "value": "0"}),
        "the predictor can access the Hub",
    ),
    "image_without_tag": (
        lambda d: d.worker(1).update(image="kserve-llm-predictor-ray"),
        "the image of container cpu-worker is 'kserve-llm-predictor-ray', without a registry or without a tag",
    ),
    "no_readiness_probe": (lambda d: d.worker(0).pop("readinessProbe"), "container gpu-worker has no readinessProbe"),
    "probe_port": (
        lambda d: d.worker(1)["livenessProbe"]["httpGet"].update(port=9000),
        "the livenessProbe uses port 9000, which container cpu-worker does not open",
    ),
    "missing_claim": (
        lambda d: d.group(0)["template"]["spec"]["volumes"][0]["persistentVolumeClaim"].update(claimName="weights"),
        "PersistentVolumeClaim 'weights', which is not in this overlay",
    ),
    "volume_twice": (
        lambda d: d.group(1)["template"]["spec"]["volumes"].append({"name": "tmp", "emptyDir": {}}),
        "RayService/llm: two volumes have the name 'tmp'",
    ),
    "request_over_limit": (
        lambda d: d.worker(1)["resources"]["requests"].update(cpu="9"),
        "container cpu-worker requests cpu 9, more than its limit 8",
    ),
    "no_toleration": (
        lambda d: d.group(0)["template"]["spec"].pop("tolerations"),
        GPU + "a GPU is requested and no taint is tolerated",
    ),
    "claim_of_one_node": (
        lambda d: d["PersistentVolumeClaim"]["spec"].update(accessModes=["ReadWriteOnce"]),
        "PersistentVolumeClaim/models: it is ReadWriteOnce, which one node can mount, and maxReplicas is 2",
    ),
    # Policy and monitor
    "policy_selector": (
        lambda d: d["NetworkPolicy/ray"]["spec"]["podSelector"]["matchLabels"].update({"kserve-llm/rayservice": "x"}),
        "NetworkPolicy/ray: it selects the pods of RayService 'x', which is not in this overlay",
    ),
    "policy_port": (
        lambda d: [rule.update(ports=[{"port": 8080}]) for rule in d["NetworkPolicy/ray"]["spec"]["ingress"]],
        "NetworkPolicy/ray: it does not allow port 8000, to which the gateway sends requests",
    ),
    "monitor_port": (
        lambda d: d["PodMonitor"]["spec"]["podMetricsEndpoints"][1].update(port="metrics-port"),
        "PodMonitor/ray: it scrapes port metrics-port, which container gpu-worker does not open",
    ),
}


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_ray_one_mistake_is_one_finding(rayservice: RayDraft, mistake: Mistake, sentence: str) -> None:
    mistake(rayservice)
    [finding] = rayservice.check(model=QWEN)
    assert sentence in str(finding)
    assert "\n" not in str(finding)


def test_ray_overlay_has_no_finding(rayservice: RayDraft) -> None:
    assert rayservice.check(model=QWEN) == []


@pytest.mark.parametrize(
    "change",
    [
        # Values of YAML and texts, and options in `deployments` that repeat what follows from args.
        lambda d: d.arguments(max_num_seqs="16", log_prompts=True, request_timeout_seconds=30.5),
        override(graceful_shutdown_timeout_s=700, ray_actor_options={"num_cpus": 4, "num_gpus": 1}),
        # Ray's own order: `resources` of the group, rayStartParams, limits.
        lambda d: d.group(1).update(resources={"CPU": "8"}),
        lambda d: d.settings.update(PREDICTOR_UPSCALE_DELAY_S="60"),
        # KubeRay counts slices of GPUs too.
        use_a_slice,
        lambda d: d.serve(lambda config: config["http_options"].update(request_timeout_s=600)),
        lambda d: d.spec.update(upgradeStrategy={"type": "None"}, rayClusterDeletionDelaySeconds=0),
    ],
)
def test_ray_valid_change_is_no_finding(rayservice: RayDraft, change: Mistake) -> None:
    change(rayservice)
    assert rayservice.check(model=QWEN) == []


def test_ray_worker_without_the_claim_is_a_finding(rayservice: RayDraft) -> None:
    for index in (0, 1):
        rayservice.worker(index)["volumeMounts"].pop(0)
    findings = [finding.problem for finding in rayservice.check()]
    assert findings == [f"container {name} mounts no claim at /mnt/models" for name in ("gpu-worker", "cpu-worker")]


def test_ray_name_beyond_the_limit_of_kuberay_is_a_finding(rayservice: RayDraft) -> None:
    rayservice["RayService"]["metadata"]["name"] = "llm" * 16
    assert "its name has 48 characters, and KubeRay allows 47" in [finding.problem for finding in rayservice.check()]


def test_ray_four_gpus_of_a_replica_are_checked_as_ranks(rayservice: RayDraft) -> None:
    rayservice.limit(0, **{"nvidia.com/gpu": "4"})
    rayservice.arguments(num_gpus=4, tensor_parallel_size="auto", quantization="none")
    assert rayservice.check(model=QWEN) == []
    rayservice.arguments(quantization="8bit")
    [finding] = rayservice.check(model=QWEN)
    assert "PREDICTOR_QUANTIZATION is 8bit, which on a GPU is not divided among 4 ranks" in str(finding)
    rayservice.arguments(quantization="none", tensor_parallel_size=2)
    assert "num_gpus: 4 GPUs, but tensor_parallel_size is 2" in str(rayservice.check(model=QWEN))


def test_ray_memory_of_a_group_without_gpus_is_that_of_its_application(rayservice: RayDraft) -> None:
    rayservice.limit(1, memory="8Gi")
    [finding] = rayservice.check(model=QWEN)
    assert str(finding).startswith(f"error: {CPU}the model needs ")
    assert "and the memory limit is 8.0 GiB" in str(finding)


def test_ray_rollout_counts_two_clusters_with_all_workers(rayservice: RayDraft) -> None:
    assert resources.rollout_sum(rayservice.deployment) == ["4 nvidia.com/gpu", "53 cpu", "137.0 GiB of memory"]
    config = rayservice["RayService"]["spec"]["rayClusterConfig"]
    del config["autoscalerOptions"]["resources"]
    assert resources.rollout_sum(rayservice.deployment)[1:] == ["53 cpu", "137.0 GiB of memory"]
    config["enableInTreeAutoscaling"] = False
    assert resources.rollout_sum(rayservice.deployment)[1:] == ["52 cpu", "136.0 GiB of memory"]


@pytest.mark.parametrize("kinds", [("InferenceService", "RayService"), ("RayService", "RayService")])
def test_ray_second_service_in_an_overlay_is_a_finding(rayservice: RayDraft, kinds: tuple[str, str]) -> None:
    rayservice["RayService"]["kind"] = kinds[1]
    rayservice.objects.append({"apiVersion": "x/v1", "kind": kinds[0], "metadata": {"name": "second", "labels": {}}})
    [finding] = rayservice.check()
    assert "the overlay has 2 of them; deploy exactly one, or one RayService, with each overlay" in str(finding)
