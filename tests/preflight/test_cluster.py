"""What preflight asks a cluster, over HTTP, and what it makes of the answers."""

import re

import pytest

from preflight.checks.knative import flags
from preflight.cluster import checks as judge
from preflight.cluster.client import Connection
from preflight.findings import CannotLook

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
CONTROLLER = "/apis/apps/v1/namespaces/kserve/deployments/kserve-controller-manager"
NODES = "/api/v1/nodes"
HUB_SECRET = "/api/v1/namespaces/kserve-llm-prod-multi-gpu/secrets/hf-secret"  # noqa: S105
SERVICE = "/apis/serving.kserve.io/v1beta1/namespaces/kserve-llm-prod/inferenceservices/llm"
VERSION = dict.fromkeys(
    ("buildDate", "compiler", "gitCommit", "gitTreeState", "gitVersion", "goVersion", "platform"), "x"
)
"""What the client insists on besides the numbers."""


def definition(group, version, kind):
    return {"spec": {"group": group, "names": {"kind": kind}, "versions": [{"name": version, "served": True}]}}


def node(gpus=4, resource="nvidia.com/gpu", taint="nvidia.com/gpu", labels=None):
    return {
        "metadata": {"name": "gpu-1", "labels": {"nvidia.com/gpu.present": "true"} if labels is None else labels},
        "spec": {"taints": [{"key": taint, "effect": "NoSchedule"}]},
        "status": {"allocatable": {"cpu": "32", resource: str(gpus)}},
    }


@pytest.fixture
def fit(cluster, rendered):
    """A cluster that has all that prod and prod-multi-gpu need."""
    cluster.config_map("config-features", dict.fromkeys(flags(rendered("prod")), "enabled"))
    cluster.config_map("config-defaults", {"max-revision-timeout-seconds": "600"})
    image = "kserve/kserve-controller:v0.20.0"
    fast = {"metadata": {"name": "fast", "annotations": {}}, "provisioner": "ebs.csi.aws.com"}
    shared = {
        "metadata": {"name": "shared", "annotations": {judge.DEFAULT_CLASS: "true"}},
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
                definition("monitoring.coreos.com", "v1", "PrometheusRule"),
                definition("monitoring.coreos.com", "v1", "PodMonitor"),
            ]
        },
        CLASSES: {"items": [fast, shared]},
        NODES: {"items": [node()]},
        HUB_SECRET: {"metadata": {"name": "hf-secret"}, "data": {"HF_TOKEN": "eA=="}},
    }
    return cluster


@pytest.fixture
def look(rendered):
    """What preflight says of an overlay on the cluster."""
    return lambda name="prod": [str(finding) for finding in judge.check(rendered(name), Connection("here"))]


@pytest.mark.usefixtures("fit")
def test_a_cluster_that_has_everything(look):
    assert look("prod") == look("prod-multi-gpu") == []
    assert judge.max_timeout_seconds(Connection("here")) == 600


def test_a_flag_that_is_off(fit, look):
    fit.config_map(
        "config-features", {"kubernetes.podspec-affinity": "Enabled", "kubernetes.podspec-tolerations": "disabled"}
    )
    selector, tolerations = look()
    assert "flag kubernetes.podspec-nodeselector is not enabled" in selector
    assert "flag kubernetes.podspec-tolerations is not enabled" in tolerations


def test_standard_mode_needs_no_flag(fit, look):
    fit.config_map("config-features", {})
    [finding] = look("prod-standard")
    assert "Secret llm-tls is not in namespace kserve-llm-prod-standard; create it with key tls.crt." in finding


def test_a_cap_that_an_administrator_raised(fit):
    fit.config_map("config-defaults", {"max-revision-timeout-seconds": "1800"})
    assert judge.max_timeout_seconds(Connection("here")) == 1800


def test_a_cluster_without_knative(fit, look):
    del fit.answers["/api/v1/namespaces/knative-serving/configmaps/config-features"]
    fit.answers[DEFINITIONS]["items"].pop(2)
    findings = look()
    assert "error: InferenceService/llm: the cluster has no Knative Serving" in findings[0]
    assert len(findings) == 1 + 3


def test_a_kind_that_is_not_there(fit, look):
    fit.answers[DEFINITIONS]["items"].pop()
    [finding] = look()
    assert finding.startswith("error: PodMonitor/predictor: the cluster has no monitoring.coreos.com/v1 PodMonitor")


def test_a_version_that_is_no_longer_served(fit, look):
    fit.answers[DEFINITIONS]["items"][0]["spec"]["versions"][0]["served"] = False
    [finding] = look()
    assert "has no serving.kserve.io/v1beta1 InferenceService" in finding


def test_versions_that_are_older(fit, look):
    fit.answers["/version/"]["minor"] = "31"
    fit.answers[CONTROLLER]["spec"]["template"]["spec"]["containers"][1]["image"] = "kserve/kserve-controller:v0.15.2"
    fit.config_map("config-features", dict.fromkeys(flags_of_prod(), "enabled"), version="1.15.2")
    assert [finding.partition(", and")[0] for finding in look()] == [
        "warning: InferenceService/llm: the cluster has Kubernetes 1.31",
        "warning: InferenceService/llm: the cluster has Knative 1.15.2",
        "warning: InferenceService/llm: the cluster has KServe v0.15.2",
    ]


def flags_of_prod():
    return ["kubernetes.podspec-nodeselector", "kubernetes.podspec-tolerations", "kubernetes.podspec-affinity"]


def test_a_default_class_that_one_node_can_mount(fit, look):
    fit.answers[CLASSES]["items"][1]["provisioner"] = "rancher.io/local-path"
    [finding] = look()
    assert finding.startswith(
        "error: PersistentVolumeClaim/models: it is ReadWriteMany, and volumes of storage class shared"
    )
    # One replica on one node.
    assert look("dev") == []


def test_no_default_class(fit, look):
    fit.answers[CLASSES]["items"].pop()
    [finding] = look()
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
def test_a_gpu_that_no_node_gives(fit, look, nodes, sentence):
    fit.answers[NODES] = {"items": nodes}
    [finding] = look()
    assert finding.startswith("warning: ")
    assert sentence in finding


def test_one_node_that_takes_the_pod_is_enough(fit, look):
    fit.answers[NODES] = {"items": [node(taint="team"), node(labels={}), node()]}
    assert look() == []


def test_too_few_gpus_on_a_node(fit, look):
    fit.answers[NODES] = {"items": [node(gpus=2), node(gpus=2)]}
    [finding] = look("prod-multi-gpu")
    assert "no node has 4 of nvidia.com/gpu" in finding


def test_a_secret_that_is_not_there(fit, look):
    del fit.answers[HUB_SECRET]
    [finding] = look("prod-multi-gpu")
    assert "Secret hf-secret is not in namespace kserve-llm-prod-multi-gpu; create it with key HF_TOKEN." in finding


def test_a_secret_with_another_key(fit, look):
    fit.answers[HUB_SECRET]["data"] = {"token": "eA=="}
    [finding] = look("prod-multi-gpu")
    assert "Secret hf-secret has token and not HF_TOKEN; add that key." in finding


def test_a_mode_that_cannot_be_changed(fit, look):
    fit.answers[SERVICE] = {"status": {"deploymentMode": "Standard"}}
    [finding] = look()
    assert "it runs in Standard mode, and that cannot be changed to Knative" in finding


def test_what_may_not_be_read_is_a_warning_and_the_rest_goes_on(fit, look):
    fit.forbidden |= {NODES, HUB_SECRET}
    nodes, secret = look("prod-multi-gpu")
    assert nodes.startswith("warning: InferenceService/llm: the nodes' GPUs could not be checked; you may not read")
    assert secret.startswith("warning: InferenceService/llm: Secrets could not be checked; you may not read hf-secret")


@pytest.mark.usefixtures("cluster")
def test_a_context_that_does_not_exist():
    with pytest.raises(CannotLook, match="no cluster to ask"):
        Connection("elsewhere")


def test_a_cluster_that_does_not_answer(cluster, look):
    # Port 1 of loopback: nobody listens there.
    cluster.kubeconfig.write_text(re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:1", cluster.kubeconfig.read_text()))
    with pytest.raises(CannotLook, match="the cluster does not answer"):
        look()
