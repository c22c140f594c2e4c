"""The pod that KServe merges from runtime and service, and the Knative flags that it needs."""

from typing import Any

import pytest

from preflight.checks import knative
from preflight.deployment import Deployment, Manifest


def service(model: Manifest, **predictor: Any) -> Manifest:
    spec = {"predictor": {"model": {"runtime": "r", **model}, **predictor}}
    return {"kind": "InferenceService", "metadata": {"name": "llm"}, "spec": spec}


def runtime(**container: Any) -> Manifest:
    containers = [{"name": "kserve-container", **container}]
    volumes = [{"name": "tmp", "emptyDir": {}}]
    spec = {"containers": containers, "volumes": volumes, "supportedModelFormats": [{"name": "x"}]}
    return {"kind": "ServingRuntime", "metadata": {"name": "r"}, "spec": spec}


def test_deployment_merges_the_service_over_the_runtime() -> None:
    below = runtime(
        args=["--served_model_name={{.Name}}"],
        env=[{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
        resources={"limits": {"cpu": "1"}},
        readinessProbe={"httpGet": {"path": "/v2/models/{{ .Name }}/ready"}},
    )
    above = service(
        {
            "args": ["--x"],
            "env": [{"name": "B", "value": "3"}],
            "resources": {"limits": {"memory": "1Gi"}},
            "storageUri": "pvc://m",
        },
        volumes=[{"name": "more", "emptyDir": {}}],
        maxReplicas=2,
    )
    deployment = Deployment((below, above))
    assert deployment.server["args"] == ["--served_model_name=llm", "--x"]
    assert deployment.environment(deployment.server) == {"A": "1", "B": "3"}
    assert deployment.server["resources"] == {"limits": {"cpu": "1", "memory": "1Gi"}}
    assert deployment.server["readinessProbe"]["httpGet"]["path"] == "/v2/models/llm/ready"
    assert [volume["name"] for volume in deployment.predictor_pod.spec["volumes"]] == ["tmp", "more"]
    # KServe's own fields are not part of the pod.
    assert not {"maxReplicas", "storageUri", "supportedModelFormats"} & set(deployment.predictor_pod.spec) | (
        {"storageUri", "runtime"} & set(deployment.server)
    )


@pytest.mark.parametrize(
    ("pod", "flag"),
    [
        ({"priorityClassName": "high"}, "kubernetes.podspec-priorityclassname"),
        ({"securityContext": {"fsGroup": 1}}, "kubernetes.podspec-securitycontext"),
        ({"initContainers": [{"name": "x"}]}, "kubernetes.podspec-init-containers"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "kubernetes.podspec-volumes-hostpath"),
        ({"storageUris": [{"uri": "hf://a/b"}]}, "kubernetes.podspec-init-containers"),
    ],
)
def test_flags_pod_field_needs_its_flag(pod: Manifest, flag: str) -> None:
    assert knative.flags(Deployment((runtime(), service({}, **pod)))) == {flag}


def test_flags_writable_claim_needs_two_flags() -> None:
    volumes: list[Manifest] = [{"name": "x", "persistentVolumeClaim": {"claimName": "m"}}]
    assert knative.flags(Deployment((runtime(), service({}, volumes=volumes)))) == {
        knative.CLAIM,
        knative.CLAIM_WRITE,
    }
    volumes[0]["persistentVolumeClaim"]["readOnly"] = True
    assert knative.flags(Deployment((runtime(), service({}, volumes=volumes)))) == {knative.CLAIM}


def test_flags_field_reference_of_the_runtime_needs_its_flag() -> None:
    env = [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    assert knative.flags(Deployment((runtime(env=env), service({})))) == {knative.FIELD_REFERENCE}


def test_settings_flag_overrides_its_variable() -> None:
    env = [{"name": "PREDICTOR_DEVICE", "value": "cuda"}, {"name": "PREDICTOR_HTTP_PORT", "value": "1"}]
    assert Deployment((runtime(env=env), service({}))).settings == {
        "PREDICTOR_DEVICE": "cuda",
        "PREDICTOR_HTTP_PORT": "1",
    }
    args = ["--device=cpu", "--http-port", "$(PREDICTOR_HTTP_PORT)", "--tracing"]
    assert Deployment((runtime(env=env, args=args), service({}))).settings == {
        "PREDICTOR_DEVICE": "cpu",
        "PREDICTOR_HTTP_PORT": "1",
    }
