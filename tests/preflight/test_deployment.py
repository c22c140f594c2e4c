"""How preflight reads: amounts, and the pod that KServe makes of two objects."""

import pytest

from preflight import quantities
from preflight.checks import knative
from preflight.deployment import Deployment


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("13m", 780), ("1h30m", 5400), ("500ms", 0.5)])
def test_reads_durations(text, expected):
    assert quantities.seconds(text) == expected


@pytest.mark.parametrize("text", ["13", "", "1 m", "m", 60, None])
def test_refuses_what_is_no_duration(text):
    with pytest.raises(ValueError, match="is not a duration"):
        quantities.seconds(text)


@pytest.mark.parametrize(("text", "expected"), [("500m", 0.5), ("2", 2), ("1Gi", 2**30), ("5G", 5e9)])
def test_reads_quantities(text, expected):
    assert quantities.number(text) == expected


def service(model, **predictor):
    spec = {"predictor": {"model": {"runtime": "r", **model}, **predictor}}
    return {"kind": "InferenceService", "metadata": {"name": "llm"}, "spec": spec}


def runtime(**container):
    containers = [{"name": "kserve-container", **container}]
    volumes = [{"name": "tmp", "emptyDir": {}}]
    spec = {"containers": containers, "volumes": volumes, "supportedModelFormats": [{"name": "x"}]}
    return {"kind": "ServingRuntime", "metadata": {"name": "r"}, "spec": spec}


def test_the_service_is_merged_over_the_runtime():
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
    read = Deployment((below, above))
    assert read.server["args"] == ["--served_model_name=llm", "--x"]
    assert read.environment(read.server) == {"A": "1", "B": "3"}
    assert read.server["resources"] == {"limits": {"cpu": "1", "memory": "1Gi"}}
    assert read.server["readinessProbe"]["httpGet"]["path"] == "/v2/models/llm/ready"
    assert [volume["name"] for volume in read.predictor_pod.spec["volumes"]] == ["tmp", "more"]
    # What is KServe's own is no part of the pod.
    assert not {"maxReplicas", "storageUri", "supportedModelFormats"} & set(read.predictor_pod.spec) | (
        {"storageUri", "runtime"} & set(read.server)
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
def test_knows_the_flag_of_a_field(pod, flag):
    assert knative.flags(Deployment((runtime(), service({}, **pod)))) == {flag}


def test_a_claim_that_is_not_read_only_needs_two_flags():
    volumes = [{"name": "x", "persistentVolumeClaim": {"claimName": "m"}}]
    assert knative.flags(Deployment((runtime(), service({}, volumes=volumes)))) == {
        knative.CLAIM,
        knative.CLAIM_WRITE,
    }
    volumes[0]["persistentVolumeClaim"]["readOnly"] = True
    assert knative.flags(Deployment((runtime(), service({}, volumes=volumes)))) == {knative.CLAIM}


def test_a_field_reference_needs_a_flag_wherever_it_stands():
    env = [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    assert knative.flags(Deployment((runtime(env=env), service({})))) == {knative.FIELD_REFERENCE}
