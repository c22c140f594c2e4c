"""examples/gitops: its overlay, rendered from a repository that holds an export of the overlays, and its objects."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools.paths import ROOT

EXAMPLE = ROOT / "examples/gitops"
RELEASE = "https://github.com/OWNER/REPO"


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the tag v0.1.0 and nothing but what the overlays need."""
    if shutil.which("kubectl") is None or shutil.which("git") is None:
        pytest.skip("kubectl and git are required")
    directory = tmp_path_factory.mktemp("release")
    for name in ("kustomize", "manifests"):
        shutil.copytree(ROOT / name, directory / name)
    run("git", "init", "--quiet", cwd=directory)
    run("git", "add", ".", cwd=directory)
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    run("git", *identity, "commit", "--quiet", "--message", "release", cwd=directory)
    run("git", "tag", "v0.1.0", cwd=directory)
    return directory


def test_released_overlay_as_a_remote_base_is_the_same(release: Path) -> None:
    base = f"file://{release}//kustomize/overlays/prod?ref=v0.1.0"
    assert run("kubectl", "kustomize", base, cwd=release) == (ROOT / "tests/kustomize/golden/prod.yaml").read_text()


def test_example_overlay_serves_its_model_and_keeps_job_and_claim(release: Path, tmp_path: Path) -> None:
    text = (EXAMPLE / "overlay/kustomization.yaml").read_text()
    assert text.count(f"{RELEASE}//") == text.count("?ref=v0.1.0") == 2
    (tmp_path / "kustomization.yaml").write_text(text.replace(RELEASE, f"file://{release}"))
    rendered = list(yaml.safe_load_all(run("kubectl", "kustomize", ".", cwd=tmp_path)))
    objects: dict[str, Any] = {
        item["kind"]: item for item in rendered if not item["metadata"]["name"].startswith("predictor")
    }
    job = objects["Job"]
    assert objects["ConfigMap"]["data"]["MODEL_REFERENCE"] in text
    assert job["metadata"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    assert "ttlSecondsAfterFinished" not in job["spec"]
    for kind in ("PersistentVolumeClaim", "Namespace"):
        assert objects[kind]["metadata"]["annotations"] == {
            "argocd.argoproj.io/sync-options": "Delete=false,Prune=false",
            "kustomize.toolkit.fluxcd.io/prune": "disabled",
        }


def test_application_and_flux_apply_the_overlay_in_its_namespace() -> None:
    overlay = yaml.safe_load((ROOT / "kustomize/overlays/dev/kustomization.yaml").read_text())
    application = yaml.safe_load((EXAMPLE / "argocd-application.yaml").read_text())
    repository, kustomization = yaml.safe_load_all((EXAMPLE / "flux.yaml").read_text())
    assert application["spec"]["destination"]["namespace"] == overlay["namespace"]
    for path in (application["spec"]["source"]["path"], kustomization["spec"]["path"]):
        assert (EXAMPLE / path / "kustomization.yaml").is_file()
    assert kustomization["spec"]["sourceRef"] == {"kind": repository["kind"], "name": repository["metadata"]["name"]}
