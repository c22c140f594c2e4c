"""Overlay rayservice: the RayService, its applications and what it shares with the other overlays."""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from devtools.paths import ROOT
from predictor.entrypoints.ray_settings import RaySettings
from preflight import quantities, ray
from preflight.checks.schema import Schemas
from preflight.deployment import Manifest
from tests.kustomize.conftest import PROD, RAY, Preflight, Render, Rendered, RenderWith, component_folder

REQUIREMENTS = ROOT / "images/predictor/requirements-ray.txt"


@pytest.fixture(scope="module")
def rayservice(render: Render) -> Rendered:
    return render(RAY)


@pytest.fixture
def config(rayservice: Rendered) -> Manifest:
    """`rayClusterConfig`."""
    config: Manifest = rayservice.service["spec"]["rayClusterConfig"]
    return config


def test_rayservice_matches_its_schema_and_misspelled_fields_do_not(rayservice: Rendered, schemas: Schemas) -> None:
    assert schemas.problems(rayservice.service) == []
    spec = rayservice.service["spec"]
    [problem] = schemas.problems({**rayservice.service, "spec": {**spec, "serveConfigV3": ""}}) or []
    assert "serveConfigV3" in problem


def test_rayservice_has_the_claim_the_job_and_the_settings_of_prod(rayservice: Rendered, render: Render) -> None:
    prod = render(PROD)
    assert rayservice.one("Job")["spec"] == prod.one("Job")["spec"]
    assert rayservice.one("PersistentVolumeClaim")["spec"] == prod.one("PersistentVolumeClaim")["spec"]
    assert rayservice.claim == prod.claim == "models"
    for pod in rayservice.ray_pods:
        environment = rayservice.environment(pod.spec["containers"][0])
        assert environment["MODEL_REFERENCE"] == prod.settings["MODEL_REFERENCE"]
        assert environment["PREDICTOR_QUANTIZATION"] == "8bit"


def test_rayservice_contains_no_object_of_kserve(rayservice: Rendered) -> None:
    assert not [manifest["kind"] for manifest in rayservice.objects if "kserve" in manifest["apiVersion"]]
    assert "serving.kserve.io" not in repr([manifest.get("spec") for manifest in rayservice.objects])


def test_every_application_has_a_worker_group_of_its_own(rayservice: Rendered) -> None:
    gpu, cpu = ray.applications(rayservice)
    assert [application.groups[0].name for application in (gpu, cpu)] == ["gpu", "cpu"]
    assert [application.settings["PREDICTOR_DEVICE"] for application in (gpu, cpu)] == ["cuda", "cpu"]
    for application in (gpu, cpu):
        [group, *others] = application.groups
        assert not others
        assert group.max_replicas == application.max_replicas
        assert group.replicas(application.option("num_cpus"), application.option("num_gpus")) == 1


def test_applications_have_valid_settings_of_the_program(rayservice: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
    for application in ray.applications(rayservice):
        monkeypatch.setattr("os.environ", application.environment(application.server))
        parsed = RaySettings(**application.arguments_of_builder)
        assert parsed.served_model_name == "llm"
        assert parsed.model_reference == application.settings["MODEL_REFERENCE"]
        assert parsed.shutdown_grace_seconds >= parsed.request_timeout_seconds


def test_workers_mount_the_claim_read_only(rayservice: Rendered) -> None:
    workers = rayservice.ray_pods[1:]
    assert len(workers) == 2
    for pod in workers:
        [mount] = [mount for mount in pod.spec["containers"][0]["volumeMounts"] if mount["mountPath"] == "/mnt/models"]
        assert mount["readOnly"] is True
        assert pod.claims == ["models"]


def test_head_runs_no_replica_and_only_it_has_a_token(rayservice: Rendered, config: Manifest) -> None:
    assert config["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    tokens = [pod.spec["automountServiceAccountToken"] for pod in rayservice.ray_pods]
    assert tokens == [True, False, False]
    assert rayservice.ray_pods[0].claims == []


def test_autoscaler_container_of_kuberay_is_restricted_too(config: Manifest) -> None:
    options = config["autoscalerOptions"]
    container = config["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert options["securityContext"] == container["securityContext"]
    assert "/tmp" in [mount["mountPath"] for mount in options["volumeMounts"]]  # noqa: S108 - a mount path


def test_object_store_fits_in_shared_memory(rayservice: Rendered, config: Manifest) -> None:
    groups = [config["headGroupSpec"], *config["workerGroupSpecs"]]
    for group, pod in zip(groups, rayservice.ray_pods, strict=True):
        [shm] = [volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "shm"]
        assert shm["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) < quantities.number(shm["sizeLimit"])


def test_ray_version_is_the_one_of_the_image(config: Manifest) -> None:
    [locked] = re.findall(r"^ray(?:\[\w+\])?==([\d.]+)", REQUIREMENTS.read_text(), re.MULTILINE)
    assert config["rayVersion"] == locked


def test_every_image_has_a_tag_and_is_the_one_of_target_ray(rayservice: Rendered) -> None:
    containers = [container for pod in rayservice.ray_pods for container in pod.containers]
    assert {container["image"] for container in containers} == {"ghcr.io/example/kserve-llm-predictor-ray:0.1.0"}
    assert {container["imagePullPolicy"] for container in containers} == {"IfNotPresent"}


def test_policy_allows_ray_between_its_pods_and_nothing_else_without_ports(rayservice: Rendered) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in rayservice.all("NetworkPolicy")}
    assert set(policies) == {"default-deny", "model-download", "ray", "ray-head"}
    selector = policies["ray"]["podSelector"]
    [own, *others] = policies["ray"]["ingress"]
    assert own == {"from": [{"podSelector": selector}]}
    assert all(rule["from"] and rule["ports"] for rule in others)
    # The dashboard runs code: KubeRay alone reaches it.
    [kuberay] = [rule for rule in others if {"port": 8265} in rule["ports"]]
    [expression] = kuberay["from"][0]["namespaceSelector"]["matchExpressions"]
    assert expression["values"] == ["kuberay-operator", "kuberay-system"]
    labels = [pod["template"]["metadata"]["labels"] for pod in templates(rayservice)]
    assert all(selector["matchLabels"].items() <= each.items() for each in labels)


def templates(rayservice: Rendered) -> list[Manifest]:
    config = rayservice.service["spec"]["rayClusterConfig"]
    return [config["headGroupSpec"], *config["workerGroupSpecs"]]


def test_pod_monitor_scrapes_ray_and_the_replicas(rayservice: Rendered) -> None:
    [monitor] = rayservice.all("PodMonitor")
    scraped = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    ports = {port["name"]: port["containerPort"] for port in rayservice.server["ports"]}
    applications = ray.applications(rayservice)
    assert [ports[name] for name in scraped] == [8080, applications[0].arguments_of_builder["metrics_port"]]
    assert {application.arguments_of_builder["metrics_port"] for application in applications} == {8081}


def test_readme_table_of_applications_equals_the_manifest(rayservice: Rendered) -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| `(/\w*)` \| (\d) to (\d) \|", rayservice.readme, re.MULTILINE)
    written = [
        (
            application.written["name"],
            application.written["route_prefix"],
            str(application.arguments_of_builder["min_replicas"]),
            str(application.arguments_of_builder["max_replicas"]),
        )
        for application in ray.applications(rayservice)
    ]
    assert rows == written


@pytest.mark.parametrize("component", ["hf-token", "offline-mirror", "pull-secret", "gitops", "adapter"])
def test_components_of_the_job_and_the_settings_apply_too(
    render_with: RenderWith, preflight_findings: Preflight, component: str
) -> None:
    added = render_with(RAY, component_folder(component))
    assert preflight_findings(added) == []


def test_serve_config_is_valid_for_ray(rayservice: Rendered) -> None:
    schema = pytest.importorskip("ray.serve.schema")
    config = yaml.safe_load(rayservice.service["spec"]["serveConfigV2"])
    parsed = schema.ServeDeploySchema(**config)
    assert [application.name for application in parsed.applications] == ["llm", "llm-cpu"]
    # Ray ignores unknown fields.
    assert set(config) <= set(schema.ServeDeploySchema.model_fields)
    assert set(config["http_options"]) <= set(schema.HTTPOptionsSchema.model_fields)
    for application in config["applications"]:
        assert set(application) <= set(schema.ServeApplicationSchema.model_fields)


def test_pre_stop_drains_the_node_and_waits_until_the_replica_has_ended(rayservice: Rendered, tmp_path: Path) -> None:
    # The command is tried with Ray in tests/predictor/entrypoints/test_ray_cluster.py.
    command = tmp_path / "ray"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    program, option, script = rayservice.server["lifecycle"]["preStop"]["exec"]["command"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        words = [program, option, script.replace("8081", str(port)).replace("sleep 1;", "sleep 0.1;")]
        running = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        # The loop connects twice, so it has waited.
        for _ in range(2):
            server.accept()[0].close()
        assert running.poll() is None
    output, _ = running.communicate()
    assert running.returncode == 0
    [deadline] = re.findall(r"^drain-node .*--deadline-remaining-seconds (\d+)$", output, re.MULTILINE)
    assert all(int(deadline) < pod.spec["terminationGracePeriodSeconds"] for pod in rayservice.ray_pods[1:])
    assert int(deadline) > int(rayservice.settings["PREDICTOR_SHUTDOWN_GRACE_SECONDS"])
