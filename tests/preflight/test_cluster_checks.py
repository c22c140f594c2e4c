"""Checks against a fake API server, over HTTP."""

import base64
import re
from collections.abc import Callable
from typing import Any

import pytest

from preflight import gpus
from preflight.checks.knative import flags
from preflight.cluster import checks
from preflight.cluster.client import Connection
from preflight.deployment import Deployment
from preflight.findings import CheckError
from tests.preflight.conftest import Draft, FakeCluster

Check = Callable[..., list[str]]

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
CONTROLLER = "/apis/apps/v1/namespaces/kserve/deployments/kserve-controller-manager"
NODES = "/api/v1/nodes"
HUB_SECRET = "/api/v1/namespaces/kserve-llm-prod-multi-gpu/secrets/hf-secret"  # noqa: S105
SERVICE = "/apis/serving.kserve.io/v1beta1/namespaces/kserve-llm-prod/inferenceservices/llm"
VERSION = dict.fromkeys(
    ("buildDate", "compiler", "gitCommit", "gitTreeState", "gitVersion", "goVersion", "platform"), "x"
)
"""Fields that the client requires in addition to the numbers."""


def definition(group: str, version: str, kind: str) -> Any:
    return {"spec": {"group": group, "names": {"kind": kind}, "versions": [{"name": version, "served": True}]}}


LABELS = {"nvidia.com/gpu.present": "true", "nvidia.com/gpu.memory": "81559"}
"""Labels that GPU feature discovery sets on a node with GPUs of 80 GB."""


def node(
    gpus: int = 4,
    resource: str = "nvidia.com/gpu",
    taint: str = "nvidia.com/gpu",
    labels: dict[str, str] | None = None,
    memory: str = "200Gi",
) -> Any:
    return {
        "metadata": {"name": "gpu-1", "labels": LABELS if labels is None else labels},
        "spec": {"taints": [{"key": taint, "effect": "NoSchedule"}]},
        "status": {"allocatable": {"cpu": "32", "memory": memory, resource: str(gpus)}},
    }


CPU_NODE = {
    "metadata": {"name": "cpu-1", "labels": {}},
    "spec": {},
    "status": {"allocatable": {"cpu": "4", "memory": "8Gi"}},
}


@pytest.fixture
def suitable(cluster: FakeCluster, rendered: Callable[[str], Deployment]) -> FakeCluster:
    """A cluster with all prerequisites of prod and prod-multi-gpu."""
    cluster.config_map("config-features", dict.fromkeys(flags(rendered("prod")), "enabled"))
    cluster.config_map("config-defaults", {"max-revision-timeout-seconds": "600"})
    image = "kserve/kserve-controller:v0.20.0"
    fast = {"metadata": {"name": "fast", "annotations": {}}, "provisioner": "ebs.csi.aws.com"}
    shared = {
        "metadata": {"name": "shared", "annotations": {checks.DEFAULT_CLASS: "true"}},
        "provisioner": "nfs.csi.k8s.io",
    }
    cluster.answers |= {
        "/version/": VERSION | {"major": "1", "minor": "33+"},
        CONTROLLER: {"spec": {"template": {"spec": {"containers": [{"image": "proxy:v1"}, {"image": image}]}}}},
        DEFINITIONS: {
            "items": [
                definition("serving.kserve.io", "v1beta1", "InferenceService"),
                definition("serving.kserve.io", "v1alpha1", "ServingRuntime"),
                definition("serving.knative.dev", "v1", "Service"),
                definition("ray.io", "v1", "RayService"),
                definition("monitoring.coreos.com", "v1", "PrometheusRule"),
                definition("monitoring.coreos.com", "v1", "PodMonitor"),
            ]
        },
        CLASSES: {"items": [fast, shared]},
        NODES: {"items": [node(), node(), node(taint="node.kubernetes.io/unused", labels={}), CPU_NODE]},
        "/api/v1/namespaces/kserve-llm-prod-multi-gpu": {"metadata": {"name": "kserve-llm-prod-multi-gpu"}},
        HUB_SECRET: {"metadata": {"name": "hf-secret"}, "data": {"HF_TOKEN": "eA=="}},
    }
    return cluster


@pytest.fixture
def check(rendered: Callable[[str], Deployment]) -> Check:
    """Returns the findings of an overlay on the cluster."""
    return lambda name="prod": [str(finding) for finding in checks.check(rendered(name), Connection("here"))]


@pytest.mark.usefixtures("suitable")
def test_cluster_with_all_prerequisites_has_no_finding(check: Check) -> None:
    assert check("prod") == check("prod-multi-gpu") == []
    assert checks.max_timeout_seconds(Connection("here")) == 600


def test_flags_disabled_flag_is_a_finding(suitable: FakeCluster, check: Check) -> None:
    suitable.config_map(
        "config-features", {"kubernetes.podspec-affinity": "Enabled", "kubernetes.podspec-tolerations": "disabled"}
    )
    selector, tolerations = check()
    assert "flag kubernetes.podspec-nodeselector is not enabled" in selector
    assert "flag kubernetes.podspec-tolerations is not enabled" in tolerations


def test_flags_standard_mode_needs_none(suitable: FakeCluster, check: Check) -> None:
    suitable.config_map("config-features", {})
    [finding] = check("prod-standard")
    assert finding == (
        "error: Ingress/llm-public: it needs Secret llm-tls, which is not in namespace kserve-llm-prod-standard; "
        "create it with key tls.crt. [kserve-llm]"
    )


def test_max_timeout_seconds_reads_the_config_map(suitable: FakeCluster) -> None:
    suitable.config_map("config-defaults", {"max-revision-timeout-seconds": "1800"})
    assert checks.max_timeout_seconds(Connection("here")) == 1800


def test_kinds_missing_knative_is_a_finding(suitable: FakeCluster, check: Check) -> None:
    del suitable.answers["/api/v1/namespaces/knative-serving/configmaps/config-features"]
    suitable.answers[DEFINITIONS]["items"].pop(2)
    findings = check()
    assert "error: InferenceService/llm: Knative Serving is not installed" in findings[0]
    assert len(findings) == 1 + 3


def test_kinds_missing_kind_is_a_finding(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[DEFINITIONS]["items"].pop()
    [finding] = check()
    assert finding.startswith(
        "error: PodMonitor/predictor: the cluster does not serve monitoring.coreos.com/v1 PodMonitor"
    )


def test_kinds_unserved_version_is_a_finding(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[DEFINITIONS]["items"][0]["spec"]["versions"][0]["served"] = False
    [finding] = check()
    assert "does not serve serving.kserve.io/v1beta1 InferenceService" in finding


def test_versions_older_version_is_a_warning(suitable: FakeCluster, check: Check) -> None:
    suitable.answers["/version/"]["minor"] = "31"
    suitable.answers[CONTROLLER]["spec"]["template"]["spec"]["containers"][1]["image"] = (
        "kserve/kserve-controller:v0.15.2"
    )
    suitable.config_map("config-features", dict.fromkeys(prod_flags(), "enabled"), version="1.15.2")
    assert [finding.partition(", and")[0] for finding in check()] == [
        "warning: InferenceService/llm: the cluster has Kubernetes 1.31",
        "warning: InferenceService/llm: the cluster has Knative 1.15.2",
        "warning: InferenceService/llm: the cluster has KServe v0.15.2",
    ]


def prod_flags() -> list[str]:
    return ["kubernetes.podspec-nodeselector", "kubernetes.podspec-tolerations", "kubernetes.podspec-affinity"]


def test_storage_one_node_default_class_is_a_finding(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[CLASSES]["items"][1]["provisioner"] = "rancher.io/local-path"
    [finding] = check()
    assert finding.startswith(
        "error: PersistentVolumeClaim/models: it is ReadWriteMany, and volumes of storage class shared"
    )
    # One replica on one node.
    suitable.answers["/api/v1/namespaces/kserve-llm-dev"] = {"metadata": {"name": "kserve-llm-dev"}}
    assert check("dev") == []


def test_storage_missing_default_class_is_a_finding(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[CLASSES]["items"].pop()
    [finding] = check()
    assert "the cluster has no default storage class; set storageClassName to one of fast." in finding


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ([], "no node has 1 of nvidia.com/gpu; nodes offer no NVIDIA GPU"),
        ([node(resource="nvidia.com/mig-3g.40gb")], "nodes offer nvidia.com/mig-3g.40gb"),
        ([node(labels={})], "no node with nvidia.com/gpu has the labels of nodeSelector"),
        ([node(taint="team")], "has a taint that is not tolerated; tolerate team"),
    ],
)
def test_gpus_unschedulable_pod_is_a_warning(
    suitable: FakeCluster, check: Check, nodes: list[Any], sentence: str
) -> None:
    suitable.answers[NODES] = {"items": nodes}
    [finding] = check()
    assert finding.startswith("warning: ")
    assert sentence in finding


def test_gpus_one_suitable_node_is_enough(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[NODES] = {"items": [node(taint="team"), node(labels={}), node()]}
    assert check() == []


def test_nodes_of_a_ray_service_are_checked_for_each_application(suitable: FakeCluster, check: Check) -> None:
    namespace = {"metadata": {"name": "kserve-llm-rayservice"}}
    suitable.answers["/api/v1/namespaces/kserve-llm-rayservice"] = namespace
    cpus = {**CPU_NODE, "status": {"allocatable": {"cpu": "16", "memory": "64Gi"}}}
    suitable.answers[NODES] = {"items": [node(), cpus]}
    assert check("rayservice") == []
    suitable.answers[NODES] = {"items": [cpus]}
    [finding] = check("rayservice")
    assert finding.startswith("warning: RayService/llm, application llm: no node has 1 of nvidia.com/gpu; ")
    suitable.answers[NODES] = {"items": [node(), CPU_NODE]}
    [finding] = check("rayservice")
    assert finding.startswith("warning: RayService/llm, application llm-cpu: ")


def test_gpus_too_few_on_every_node_is_a_warning(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[NODES] = {"items": [node(gpus=2), node(gpus=2)]}
    [finding] = check("prod-multi-gpu")
    assert "no node has 4 of nvidia.com/gpu" in finding


@pytest.mark.parametrize(
    ("operator", "values", "is_accepted"),
    [
        ("Gt", ["76000"], True),
        ("Gt", ["81559"], False),
        ("Lt", ["90000"], True),
        ("In", ["46068", "81559"], True),
        ("In", ["46068"], False),
        ("NotIn", ["81559"], False),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
    ],
)
def test_nodes_required_affinity_matches_labels_as_the_scheduler_does(
    suitable: FakeCluster, draft: Callable[[str], Draft], operator: str, values: list[str], is_accepted: bool
) -> None:
    suitable.answers[NODES] = {"items": [node(gpus=8)]}
    multi = draft("prod-multi-gpu")
    [term] = gpus.required_node_terms(multi.predictor)
    term["matchExpressions"] = [{"key": "nvidia.com/gpu.memory", "operator": operator, "values": values}]
    findings = [finding.problem for finding in checks.check(multi.deployment, Connection("here"))]
    assert findings == ([] if is_accepted else ["no node with nvidia.com/gpu matches the required nodeAffinity"])


def test_nodes_without_memory_for_a_replica_is_a_warning(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[NODES] = {"items": [node(memory="15Gi"), CPU_NODE]}
    [finding] = check()
    assert finding.startswith(
        "warning: InferenceService/llm: no node with nvidia.com/gpu that accepts the pod has 16.0 GiB of memory; "
    )


@pytest.mark.parametrize(("nodes", "room"), [([node(gpus=1)], 1), ([node(gpus=1, memory="40Gi"), node(taint="x")], 1)])
def test_nodes_without_room_for_a_rollout_is_a_warning(
    suitable: FakeCluster, check: Check, nodes: list[Any], room: int
) -> None:
    suitable.answers[NODES] = {"items": nodes}
    [finding] = check()
    assert f"run together during a rollout, and the nodes have room for {room}; add a node" in finding
    suitable.answers[NODES] = {"items": [*nodes, node(gpus=1)]}
    assert check() == []


def test_nodes_rollout_counts_memory(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[NODES] = {"items": [node(gpus=8, memory="31Gi")]}
    [finding] = check()
    assert "the nodes have room for 1" in finding


def test_namespace_missing_or_being_deleted_is_a_finding(
    suitable: FakeCluster, rendered: Callable[[str], Deployment]
) -> None:
    prod = rendered("prod")
    path = "/api/v1/namespaces/kserve-llm-prod"
    suitable.answers[path] = {"metadata": {"name": "x", "deletionTimestamp": "2026-11-24T04:00:13Z"}}
    [finding] = checks.check(prod, Connection("here"))
    assert str(finding).startswith("error: Namespace/kserve-llm-prod: it is being deleted, and accepts no new objects")
    del suitable.answers[path]
    assert list(checks.check(prod, Connection("here"))) == []
    without = Deployment(tuple(manifest for manifest in prod.objects if manifest["kind"] != "Namespace"))
    [finding] = checks.check(without, Connection("here"))
    assert str(finding).startswith("error: Namespace/kserve-llm-prod: the cluster does not have it; create it")


def test_local_volumes_in_knative_mode_are_a_warning(
    suitable: FakeCluster, rendered: Callable[[str], Deployment]
) -> None:
    disks = {"metadata": {"name": "disks"}, "provisioner": "kubernetes.io/no-provisioner"}
    suitable.answers[CLASSES]["items"].append(disks)

    def check(overlay: str, mode: str) -> list[str]:
        draft = Draft(rendered(overlay))
        draft["PersistentVolumeClaim"]["spec"] |= {"storageClassName": "disks", "accessModes": ["ReadWriteOnce"]}
        draft.annotations["serving.kserve.io/deploymentMode"] = mode
        findings = checks.check(draft.deployment, Connection("here"))
        return [str(finding) for finding in findings if "local volumes" in finding.problem]

    [finding] = check("dev", "Knative")
    assert finding.startswith("warning: PersistentVolumeClaim/models: its storage class disks has local volumes; ")
    assert finding.endswith("chown the volume's directory as component local-storage shows. [kubelet]")
    assert check("prod-standard", "Standard") == []


def test_storage_claim_of_an_existing_volume_is_no_finding(
    suitable: FakeCluster, rendered: Callable[[str], Deployment]
) -> None:
    prod = Draft(rendered("prod"))
    prod["PersistentVolumeClaim"]["spec"] |= {"storageClassName": "", "volumeName": "nfs-1"}
    suitable.answers[CLASSES]["items"].pop()
    assert list(checks.check(prod.deployment, Connection("here"))) == []


def test_secrets_missing_secret_is_a_finding(suitable: FakeCluster, check: Check) -> None:
    del suitable.answers[HUB_SECRET]
    [finding] = check("prod-multi-gpu")
    assert finding.startswith("error: Job/model-download-")
    assert finding.endswith(
        "it needs Secret hf-secret, which is not in namespace kserve-llm-prod-multi-gpu; "
        "create it with key HF_TOKEN. [kubelet]"
    )


def test_secrets_missing_key_is_a_finding(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[HUB_SECRET]["data"] = {"token": "eA=="}
    [finding] = check("prod-multi-gpu")
    assert "it needs key HF_TOKEN of Secret hf-secret, which has token; add that key." in finding


def test_secrets_malformed_line_of_the_api_keys_is_a_finding(
    suitable: FakeCluster, draft: Callable[[str], Draft]
) -> None:
    prod = draft("prod")
    prod.mount_keys()
    secret = "/api/v1/namespaces/kserve-llm-prod/secrets/predictor-api-keys"  # noqa: S105
    lines = "alice:alices-key-0123456789 weight=2\nalice:another-key-0123456789"
    suitable.answers[secret] = {"metadata": {"name": "x"}, "data": {"keys": base64.b64encode(lines.encode()).decode()}}
    [finding] = checks.check(prod.deployment, Connection("here"))
    assert str(finding) == (
        "error: InferenceService/llm: Secret predictor-api-keys, key keys, line 2: duplicate name or key, "
        "so the predictor does not start; give every name its own key. [kserve-llm]"
    )
    suitable.answers[secret]["data"]["keys"] = base64.b64encode(lines.splitlines()[0].encode()).decode()
    assert list(checks.check(prod.deployment, Connection("here"))) == []


def test_mode_change_is_a_finding(suitable: FakeCluster, check: Check) -> None:
    suitable.answers[SERVICE] = {"status": {"deploymentMode": "Standard"}}
    [finding] = check()
    assert "it runs in Standard mode, which cannot be changed to Knative" in finding


def test_check_permission_denied_is_a_warning_and_others_run(suitable: FakeCluster, check: Check) -> None:
    suitable.forbidden |= {NODES, HUB_SECRET}
    nodes, secret = check("prod-multi-gpu")
    assert nodes.startswith("warning: InferenceService/llm: nodes could not be checked; Permission denied: ")
    assert secret.startswith(
        "warning: InferenceService/llm: Secrets could not be checked; Permission denied: hf-secret"
    )


@pytest.mark.usefixtures("cluster")
def test_connection_missing_context_raises() -> None:
    with pytest.raises(CheckError, match="No cluster configured"):
        Connection("elsewhere")


def test_connection_without_a_server_raises(cluster: FakeCluster, check: Check) -> None:
    # Port 1 of loopback has no listener.
    cluster.kubeconfig.write_text(re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:1", cluster.kubeconfig.read_text()))
    with pytest.raises(CheckError, match="cluster does not respond"):
        check()
