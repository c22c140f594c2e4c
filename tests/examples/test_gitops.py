"""docs/how-to/gitops.md and examples/gitops, rendered from a release: an exported archive, and a repository with a tag.

git replaces https://github.com/OWNER/REPO, the documented address, by that repository.
"""

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from devtools.kubectls import PACKAGES
from devtools.paths import ROOT
from preflight.deployment import Manifest
from tests.kustomize.conftest import GOLDEN, kubectl_with

EXAMPLE = ROOT / "examples/gitops"
PAGE = ROOT / "docs/how-to/gitops.md"
RELEASE = "https://github.com/OWNER/REPO"
IDENTITY = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")


class Release(NamedTuple):
    archive: Path
    """The unpacked archive."""
    environment: Mapping[str, str]
    """With it git clones the documented address from the repository."""


def run(*command: str, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def export(directory: Path) -> None:
    """Unpack an archive of the tracked files as they are in the working tree."""
    index = directory.with_suffix(".index")
    shutil.copy(ROOT / run("git", "rev-parse", "--git-path", "index", cwd=ROOT).strip(), index)
    own_index = {"GIT_INDEX_FILE": str(index)}
    run("git", "add", "--update", cwd=ROOT, environment=own_index)
    tree = run("git", "write-tree", cwd=ROOT, environment=own_index).strip()
    archive = directory.with_suffix(".tar")
    run("git", "archive", f"--output={archive}", tree, cwd=ROOT)
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The release v0.1.0."""
    if shutil.which("kubectl") is None or shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("kubectl, git and a checkout are required")
    directory = tmp_path_factory.mktemp("release") / "v0.1.0"
    export(directory)
    repository = directory.with_name("repository")
    shutil.copytree(directory, repository)
    run("git", "init", "--quiet", cwd=repository)
    run("git", "add", "--force", ".", cwd=repository)
    run("git", *IDENTITY, "commit", "--quiet", "--message", "release", cwd=repository)
    run("git", "tag", "v0.1.0", cwd=repository)
    environment = {"GIT_CONFIG_COUNT": "2"}
    for index, address in enumerate((RELEASE, f"{RELEASE}.git")):  # The second is kustomize 4's.
        environment[f"GIT_CONFIG_KEY_{index}"] = f"url.file://{repository}.insteadOf"
        environment[f"GIT_CONFIG_VALUE_{index}"] = address
    return Release(directory, environment)


def render(target: Path | str, environment: Mapping[str, str] | None = None, kubectl: Path = Path("kubectl")) -> str:
    return run(str(kubectl), "kustomize", str(target), cwd=ROOT, environment=environment)


def deployed(rendered: str) -> dict[str, Any]:
    """The objects by kind, without the predictor's ConfigMap and ServiceAccount."""
    return {
        item["kind"]: item
        for item in yaml.safe_load_all(rendered)
        if not item["metadata"]["name"].startswith("predictor")
    }


def documents(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((EXAMPLE / name).read_text()))


def build(folder: Path, components: list[str], patches: list[Manifest], images: list[Manifest]) -> str:
    """Render `folder` with components, patches and images added to its kustomization.yaml, as Argo CD and Flux do."""
    copy = folder.with_name(f"{folder.name}-built")
    shutil.copytree(folder, copy)
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    kustomization["components"] += components
    kustomization["patches"] = [*kustomization.get("patches", []), *patches]
    kustomization["images"] = images
    (copy / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    try:
        return render(copy)
    finally:
        shutil.rmtree(copy)


def image_of(text: str) -> Manifest:
    """Return Argo CD's NAME=NEW_NAME:TAG in kustomize's form."""
    name, new_name, tag = re.split("[=:]", text)
    return {"name": name, "newName": new_name, "newTag": tag}


def assert_serves_another_model(rendered: str, text: str) -> None:
    """Assert what component gitops and the change of the model have in common in every form."""
    objects = deployed(rendered)
    job, config = objects["Job"], objects["ConfigMap"]
    reference = config["data"]["MODEL_REFERENCE"]
    assert reference in text
    assert re.fullmatch("hf://Qwen/Qwen2.5-0.5B-Instruct:[0-9a-f]{40}", reference)
    assert job["metadata"]["name"] == config["metadata"]["name"]
    [source] = objects["InferenceService"]["spec"]["predictor"]["model"]["env"]
    assert source["valueFrom"]["configMapKeyRef"]["name"] == config["metadata"]["name"]
    assert "ttlSecondsAfterFinished" not in job["spec"]
    [predictor] = objects["ServingRuntime"]["spec"]["containers"]
    [downloader] = job["spec"]["template"]["spec"]["containers"]
    assert predictor["image"] == "ghcr.io/OWNER/kserve-llm-predictor:0.1.0"
    assert (
        downloader["image"] == config["data"]["DOWNLOAD_IMAGE"] == "ghcr.io/OWNER/kserve-llm-storage-initializer:0.1.0"
    )
    for kind in ("PersistentVolumeClaim", "Namespace"):
        assert objects[kind]["metadata"]["annotations"] == {
            "argocd.argoproj.io/sync-options": "Delete=false,Prune=false",
            "kustomize.toolkit.fluxcd.io/prune": "disabled",
        }


@pytest.mark.parametrize("overlay", ["dev", "prod-standard"])
def test_overlay_on_an_exported_archive_renders_the_same(release: Release, overlay: str, tmp_path: Path) -> None:
    above = tmp_path.resolve()
    base = os.path.relpath(release.archive.resolve() / "kustomize/overlays" / overlay, above)
    (above / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base]}))
    assert render(above) == (GOLDEN / f"{overlay}.yaml").read_text()


@pytest.mark.parametrize(
    ("target", "overlay"),
    [
        ("github.com/OWNER/REPO/kustomize/overlays/dev?ref=v0.1.0", "dev"),
        (f"{RELEASE}//kustomize/overlays/prod?ref=v0.1.0", "prod"),
    ],
)
def test_released_overlay_as_a_remote_base_is_the_same(release: Release, target: str, overlay: str) -> None:
    assert render(target, release.environment) == (GOLDEN / f"{overlay}.yaml").read_text()


def test_page_shows_the_address_of_the_remote_base() -> None:
    assert "kubectl apply -k 'github.com/OWNER/REPO/kustomize/overlays/dev?ref=v0.1.0'" in PAGE.read_text()


def test_example_overlay_serves_its_model_and_keeps_job_and_claim(release: Release) -> None:
    text = (EXAMPLE / "overlay/kustomization.yaml").read_text()
    assert text.count(f"{RELEASE}//") == text.count("?ref=v0.1.0") == 2
    assert_serves_another_model(render(EXAMPLE / "overlay", release.environment), text)


@pytest.mark.slow
@pytest.mark.parametrize("version", PACKAGES)
def test_example_overlay_is_the_same_with_every_kustomize(release: Release, version: str) -> None:
    overlay = EXAMPLE / "overlay"
    rendered = render(overlay, release.environment, kubectl_with(version))
    assert rendered == render(overlay, release.environment)


def test_application_from_the_release_serves_its_model(release: Release) -> None:
    [application] = documents("argocd-from-release.yaml")
    source = application["spec"]["source"]
    assert (source["repoURL"], source["targetRevision"]) == (RELEASE, "v0.1.0")
    kustomize = source["kustomize"]
    images = [image_of(text) for text in kustomize["images"]]
    built = build(release.archive / source["path"], kustomize["components"], kustomize["patches"], images)
    assert_serves_another_model(built, (EXAMPLE / "argocd-from-release.yaml").read_text())
    assert deployed(built)["Namespace"]["metadata"]["name"] == application["spec"]["destination"]["namespace"]


def test_flux_from_the_release_serves_its_model(release: Release) -> None:
    repository, kustomization = documents("flux-from-release.yaml")
    assert (repository["spec"]["url"], repository["spec"]["ref"]) == (RELEASE, {"tag": "v0.1.0"})
    spec = kustomization["spec"]
    built = build(release.archive / spec["path"], spec["components"], spec["patches"], spec["images"])
    assert_serves_another_model(built, (EXAMPLE / "flux-from-release.yaml").read_text())


def test_application_and_flux_apply_the_overlay_in_its_namespace() -> None:
    overlay = yaml.safe_load((ROOT / "kustomize/overlays/dev/kustomization.yaml").read_text())
    [application] = documents("argocd-application.yaml")
    _, kustomization = documents("flux.yaml")
    assert application["spec"]["destination"]["namespace"] == overlay["namespace"]
    for path in (application["spec"]["source"]["path"], kustomization["spec"]["path"]):
        assert (EXAMPLE / path / "kustomization.yaml").is_file()


def test_platform_applications_apply_the_same_cluster_wide_objects(release: Release) -> None:
    [applications] = documents("argocd-platform.yaml")
    [generator] = applications["spec"]["generators"]
    source = applications["spec"]["template"]["spec"]["source"]
    paths = [source["path"].replace("{{.path}}", element["path"]) for element in generator["list"]["elements"]]
    assert paths == [manifest["spec"]["path"].removeprefix("./") for manifest in documents("flux-platform.yaml")]
    kinds = {item["kind"] for path in paths for item in yaml.safe_load_all(render(release.archive / path))}
    assert {"ClusterServingRuntime", "ClusterStorageContainer", "ValidatingAdmissionPolicy"} <= kinds


def test_flux_kustomizations_have_a_source_and_wait_longer_than_the_startup_probe() -> None:
    repositories = {
        manifest["metadata"]["name"]
        for name in ("flux.yaml", "flux-from-release.yaml")
        for manifest in documents(name)
        if manifest["kind"] == "GitRepository"
    }
    runtime = yaml.safe_load((ROOT / "manifests/serving/serving-runtime.yaml").read_text())
    probe = runtime["spec"]["containers"][0]["startupProbe"]
    for name in ("flux.yaml", "flux-from-release.yaml", "flux-platform.yaml"):
        for spec in (item["spec"] for item in documents(name) if item["kind"] == "Kustomization"):
            assert spec["sourceRef"]["kind"] == "GitRepository"
            assert spec["sourceRef"]["name"] in repositories
            assert spec["wait"]
            if "overlay" in spec["path"]:
                minutes = int(spec["timeout"].removesuffix("m"))
                assert minutes * 60 > probe["periodSeconds"] * probe["failureThreshold"]


def in_lua(value: Any) -> str:
    """Return JSON as an expression of Lua."""
    if isinstance(value, dict):
        return "{" + ",".join(f"[{in_lua(key)}]={in_lua(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ",".join(map(in_lua, value)) + "}"
    return json.dumps(value)


@pytest.mark.parametrize(
    ("conditions", "observed", "status"),
    [
        (None, None, "Progressing"),
        ({"Ready": "Unknown"}, 2, "Progressing"),
        ({"Ready": "True", "Stopped": "False"}, 2, "Healthy"),
        ({"Ready": "True", "Stopped": "False"}, 1, "Progressing"),
        ({"Ready": "False", "Stopped": "False"}, 2, "Degraded"),
        ({"Ready": "False", "Stopped": "True"}, 2, "Suspended"),
    ],
)
def test_health_check_of_the_page_has_the_status_of_the_service(
    conditions: dict[str, str] | None, observed: int | None, status: str
) -> None:
    lua = shutil.which("lua5.1")
    if lua is None:
        pytest.skip("lua5.1 is not installed; Argo CD's checks are in Lua 5.1")
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    [code] = yaml.safe_load(text)["data"].values()
    service: Manifest = {"metadata": {"generation": 2}}
    if conditions is not None:
        listed = [{"type": kind, "status": value} for kind, value in conditions.items()]
        service["status"] = {"observedGeneration": observed, "conditions": listed}
    script = f"local function check(obj) {code} end\nprint(check({in_lua(service)}).status)"
    assert run(lua, "-e", script, cwd=ROOT).strip() == status
