"""InferenceServices that use cluster-wide objects only, with the pods that KServe makes of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT
from predictor.models import snapshot
from predictor.settings import Settings
from preflight.checks.schema import Schemas
from preflight.deployment import Manifest
from snapshot_format.record import RECORD
from snapshot_format.reference import parse
from tests.kustomize.conftest import (
    CLUSTER_RUNTIME,
    STORAGE_CONTAINER,
    Render,
    documented_service,
    with_cluster_runtime,
)

VOLUME = "kserve-provision-location"
"""KServe's name of the volume with the weights."""
SOURCE_URI = "metadata.annotations['internal.serving.kserve.io/storage-initializer-sourceuri']"
"""KServe's annotation of the pod."""
EXAMPLES = sorted((ROOT / "examples/kserve-runtimes").glob("*.yaml"))


def storage_uri(service: Manifest) -> str:
    """Return the URI as KServe reads it: of `model`, or of the custom container's variable."""
    predictor = service["spec"]["predictor"]
    if "model" in predictor:
        return str(predictor["model"]["storageUri"])
    [container] = predictor["containers"]
    return next(str(variable["value"]) for variable in container["env"] if variable["name"] == "STORAGE_URI")


@pytest.fixture
def runtimes(render: Render) -> dict[str, Manifest]:
    return {runtime["metadata"]["name"]: runtime for runtime in render(CLUSTER_RUNTIME).all("ClusterServingRuntime")}


def pod_of(service: Manifest, runtime: Manifest) -> dict[str, Any]:
    return with_cluster_runtime(service, runtime).predictor_pod.spec


def test_documented_service_has_eight_lines_and_matches_the_schema(schemas: Schemas) -> None:
    text, service = documented_service()
    assert len(text.splitlines()) == 8
    assert schemas.problems(service) == []


def test_model_format_selects_exactly_one_runtime(runtimes: dict[str, Manifest]) -> None:
    name = documented_service()[1]["spec"]["predictor"]["model"]["modelFormat"]["name"]
    selected = [
        runtime
        for runtime, manifest in runtimes.items()
        for model_format in manifest["spec"]["supportedModelFormats"]
        if model_format["name"] == name and model_format["autoSelect"]
    ]
    assert selected == ["kserve-llm-cpu"]
    assert set(runtimes) == {"kserve-llm-cpu", "kserve-llm-gpu"}


@pytest.mark.parametrize("runtime", ["kserve-llm-cpu", "kserve-llm-gpu"])
def test_pod_mounts_the_claim_under_the_name_that_kserve_reuses(runtimes: dict[str, Manifest], runtime: str) -> None:
    pod = pod_of(documented_service()[1], runtimes[runtime])
    [container] = pod["containers"]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == VOLUME]
    assert volume["persistentVolumeClaim"] == {"claimName": "models"}
    [mount] = [mount for mount in container["volumeMounts"] if mount["name"] == VOLUME]
    assert mount["readOnly"]
    assert Path(mount["mountPath"]) == Settings.model_fields["model_dir"].default
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["MODEL_REFERENCE"]["valueFrom"] == {"fieldRef": {"fieldPath": SOURCE_URI}}
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) is (runtime == "kserve-llm-gpu")
    assert (variables.get("PREDICTOR_DEVICE", {}).get("value") == "cuda") is (runtime == "kserve-llm-gpu")


def test_two_models_of_a_namespace_share_the_claim_and_nothing_else(runtimes: dict[str, Manifest]) -> None:
    service = documented_service()[1]
    other = {**service, "metadata": {"name": "other"}}
    pods = [pod_of(item, runtimes["kserve-llm-cpu"]) for item in (service, other)]
    arguments = [pod["containers"][0]["args"] for pod in pods]
    assert arguments == [["--served_model_name=my-model"], ["--served_model_name=other"]]


def test_storage_container_accepts_every_documented_reference(render: Render) -> None:
    container = render(STORAGE_CONTAINER).one("ClusterStorageContainer")
    [uri_format] = container["spec"]["supportedUriFormats"]
    services = [documented_service()[1], *(yaml.safe_load(path.read_text()) for path in EXAMPLES)]
    assert len(services) == 3
    for service in services:
        assert service["spec"]["predictor"]["storageContainerName"] == container["metadata"]["name"]
        assert re.search(uri_format["regex"], storage_uri(service))


@pytest.fixture(scope="module")
def commit_and_volume(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A volume that the storage initializer has filled with the arguments that KServe gives it, and the commit."""
    root = tmp_path_factory.mktemp("models")
    with processes.local_hub({"demo/arithmetic": DEMO_MODEL}) as hub_url:
        processes.initialize("hf://demo/arithmetic", root, hub_url)
        [commit] = [path.parent.name for path in root.glob(f"demo--arithmetic/*/{RECORD}")]
        volume = tmp_path_factory.mktemp("pinned")
        processes.initialize(f"hf://demo/arithmetic@{commit}", volume, hub_url)
    return commit, volume


def test_predictor_finds_the_snapshot_by_the_annotation(commit_and_volume: tuple[str, Path]) -> None:
    commit, volume = commit_and_volume
    found = snapshot.find(volume, f"hf://demo/arithmetic@{commit}")
    assert found.commit == commit


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_other_runtimes_read_the_published_directory(
    example: Path, commit_and_volume: tuple[str, Path], schemas: Schemas
) -> None:
    commit, volume = commit_and_volume
    service = yaml.safe_load(example.read_text())
    assert schemas.problems(service) == []
    predictor = service["spec"]["predictor"]
    container = predictor.get("model") or predictor["containers"][0]
    assert [item["name"] for item in container["volumeMounts"]] == [item["name"] for item in predictor["volumes"]]
    [mount] = container["volumeMounts"]
    assert (mount["name"], mount["readOnly"]) == (VOLUME, True)
    # The demo model in place of the example's.
    reference = parse(storage_uri(service))
    [path] = re.findall(rf"=({mount['mountPath']}/\S+)", "\n".join(container["args"]))
    assert Path(path).relative_to(mount["mountPath"]).parts == (reference.slug, reference.revision)
    directory = volume / "demo--arithmetic" / commit
    assert (directory / "config.json").read_bytes() == (DEMO_MODEL / "config.json").read_bytes()
    assert (directory / "model.safetensors").is_file()
