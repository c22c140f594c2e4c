"""Pod Security `restricted` is preflight's to check on every rendering; here is what this tree promises beyond it."""

import re

from preflight.checks import references, security

VISIBLE = {"api-keys": {"predictor-api-keys"}}
"""Components after which the predictor sees a Secret."""
QUEUE_PROXY_PORT = 9091
"""Where Knative's queue-proxy tells its own metrics; it calls the port http-usermetric."""


def test_no_pod_of_any_rendering_is_less_than_restricted(deployment):
    for finding in security.check(deployment):
        raise AssertionError(str(finding))


def test_the_predictor_is_restricted_by_its_container_alone(deployment):
    # Knative refuses a pod's securityContext by default, and KServe's runtime has none.
    assert "securityContext" not in deployment.predictor
    assert deployment.server["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_only_the_component_for_it_makes_the_root_writable(deployment):
    writable = deployment.path.name == "pod-security"
    assert deployment.server["securityContext"]["readOnlyRootFilesystem"] is not writable
    assert deployment.download["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_job_writes_as_the_user_who_reads(deployment):
    for job in deployment.jobs:
        context, reader = job.spec["securityContext"], deployment.server["securityContext"]
        assert (context["runAsUser"], context["fsGroup"]) == (reader["runAsUser"], reader["runAsGroup"])


def test_the_weights_are_read_only_for_whoever_serves_them(deployment):
    # KServe mounts a pvc:// read-only unless this annotation says otherwise.
    assert "storage.kserve.io/readonly" not in deployment.annotations
    assert "/mnt/models" not in [mount["mountPath"] for mount in deployment.server["volumeMounts"]]


def test_no_pod_hears_of_the_services_of_its_namespace(deployment):
    assert [pod.spec["enableServiceLinks"] for pod in deployment.pods] == [False] * len(deployment.pods)


def test_the_predictor_sees_no_secret_but_that_of_its_own_keys(deployment):
    serving = {**deployment.predictor_pod.spec, "initContainers": []}
    named = set(re.findall(r"'secretName': '([^']+)'", repr(serving)))
    assert "secretKeyRef" not in repr(serving)
    assert "secretRef" not in repr(serving)
    assert named == VISIBLE.get(deployment.path.name, set())


def test_only_the_component_for_it_gives_the_download_a_token_that_must_be_there(deployment, render, tree):
    needed = {each.name for each in references.secrets(deployment) if not each.optional}
    assert ("hf-secret" in needed) == (deployment.path.name in ("hf-token", "prod-multi-gpu"))
    [token] = [each for each in render(tree.component("hf-token")).download["env"] if each["name"] == "HF_TOKEN"]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "hf-secret", "key": "HF_TOKEN"}}


def test_the_readme_says_how_to_make_the_secret_of_the_hub(tree):
    readme = (tree.kustomize / "README.md").read_text()
    assert "secret generic hf-secret" in readme
    assert "--from-literal=HF_TOKEN=" in readme


def test_nothing_gets_out_of_the_predictor_and_only_names_and_https_out_of_the_job(render, tree):
    policies = {each["metadata"]["name"]: each["spec"] for each in render(tree.prod).all("NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert policies["predictor"]["policyTypes"] == ["Ingress"]
    assert all(rule["from"] and rule["ports"] for rule in policies["predictor"]["ingress"])
    assert "ingress" not in policies["model-download"]
    ports = [port["port"] for rule in policies["model-download"]["egress"] for port in rule["ports"]]
    assert set(ports) == {53, 443, 3128}


def test_whoever_is_let_in_finds_an_open_port(render, tree):
    prod = render(tree.prod)
    [gateways, prometheus] = prod.find("NetworkPolicy", "predictor")["spec"]["ingress"]
    [port] = [port["containerPort"] for port in prod.server["ports"]]
    endpoint, _ = prod.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert port in [each["port"] for each in gateways["ports"]]
    assert port == endpoint["portNumber"]
    assert [each["port"] for each in prometheus["ports"]] == [port, QUEUE_PROXY_PORT]
    assert prod.annotations["prometheus.io/port"] == str(port)
