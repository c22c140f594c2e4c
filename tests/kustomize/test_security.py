"""Security of the rendered pods, policies and Secrets, beyond Pod Security `restricted`."""

import re

from devtools.paths import ROOT
from preflight.checks import references, security
from tests.kustomize.conftest import PROD, Render, Rendered, component_folder

VISIBLE = {"api-keys": {"predictor-api-keys"}}
"""Components that mount a Secret into the predictor."""
QUEUE_PROXY_PORT = 9091
"""Metrics port of Knative's queue-proxy, named http-usermetric."""


def test_security_checks_have_no_finding(deployment: Rendered) -> None:
    assert [str(finding) for finding in security.check(deployment)] == []


def test_predictor_security_context_is_on_the_container(deployment: Rendered) -> None:
    # Knative refuses a pod's securityContext by default, and KServe's runtime has none. Standard mode has fsGroup.
    group = None if deployment.is_knative else {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"}
    assert deployment.predictor.get("securityContext") == group
    assert deployment.server["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_root_is_writable_only_with_component_pod_security(deployment: Rendered) -> None:
    writable = deployment.path.name == "pod-security"
    assert deployment.server["securityContext"]["readOnlyRootFilesystem"] is not writable
    assert deployment.download["securityContext"]["readOnlyRootFilesystem"] is True


def test_job_writes_as_the_user_of_the_predictor(deployment: Rendered) -> None:
    for job in deployment.jobs:
        context, reader = job.spec["securityContext"], deployment.server["securityContext"]
        assert (context["runAsUser"], context["fsGroup"]) == (reader["runAsUser"], reader["runAsGroup"])
        if not deployment.is_knative:
            assert deployment.predictor["securityContext"]["fsGroup"] == context["fsGroup"]


def test_weights_are_mounted_read_only(deployment: Rendered) -> None:
    # KServe mounts a pvc:// read-only unless this annotation says otherwise.
    assert "storage.kserve.io/readonly" not in deployment.annotations
    assert "/mnt/models" not in [mount["mountPath"] for mount in deployment.server["volumeMounts"]]


def test_pods_have_service_links_disabled(deployment: Rendered) -> None:
    assert [pod.spec["enableServiceLinks"] for pod in deployment.pods] == [False] * len(deployment.pods)


def test_predictor_mounts_no_secret_except_its_api_keys(deployment: Rendered) -> None:
    serving = {**deployment.predictor_pod.spec, "initContainers": []}
    secrets = set(re.findall(r"'secretName': '([^']+)'", repr(serving)))
    assert "secretKeyRef" not in repr(serving)
    assert "secretRef" not in repr(serving)
    assert secrets == VISIBLE.get(deployment.path.name, set())


def test_hub_token_is_required_only_with_component_hf_token(deployment: Rendered, render: Render) -> None:
    needed = {item.name for item in references.secrets(deployment) if not item.optional}
    assert ("hf-secret" in needed) == (deployment.path.name in ("hf-token", "prod-multi-gpu"))
    [token] = [item for item in render(component_folder("hf-token")).download["env"] if item["name"] == "HF_TOKEN"]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "hf-secret", "key": "HF_TOKEN"}}


def test_readme_has_the_command_that_creates_the_hub_secret() -> None:
    readme = (ROOT / component_folder("hf-token") / "README.md").read_text()
    assert "secret generic hf-secret" in readme
    assert "--from-literal=HF_TOKEN=" in readme


def test_network_policies_deny_egress_except_dns_and_https_of_the_job(render: Render) -> None:
    policies = {item["metadata"]["name"]: item["spec"] for item in render(PROD).all("NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert policies["predictor"]["policyTypes"] == ["Ingress"]
    assert all(rule["from"] and rule["ports"] for rule in policies["predictor"]["ingress"])
    assert "ingress" not in policies["model-download"]
    ports = [port["port"] for rule in policies["model-download"]["egress"] for port in rule["ports"]]
    assert set(ports) == {53, 443, 3128}


def test_network_policy_ingress_ports_are_open(render: Render) -> None:
    prod = render(PROD)
    policy = prod.find("NetworkPolicy", "predictor")
    assert policy
    [gateways, prometheus] = policy["spec"]["ingress"]
    [port] = [port["containerPort"] for port in prod.server["ports"]]
    endpoint, _ = prod.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert port in [item["port"] for item in gateways["ports"]]
    assert port == endpoint["portNumber"]
    assert [item["port"] for item in prometheus["ports"]] == [port, QUEUE_PROXY_PORT]
    assert prod.annotations["prometheus.io/port"] == str(port)
