"""Overlays with namePrefix and nameSuffix."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from devtools.paths import ROOT
from preflight.deployment import Manifest
from tests.kustomize.conftest import COMPONENTS, IMAGES, PINNED, RAY, RENAMING, Preflight, Rendered, kustomize

STANDARD = Path("kustomize/overlays/prod-standard")
KEDA = Path("kustomize/components/autoscaling-keda")
INFERENCE_POOL = Path("kustomize/components/inference-pool")

Rename = Callable[..., Rendered]


@pytest.fixture
def rename(tmp_path: Path) -> Rename:
    """Renders a folder with another name, with or without the transformer."""

    def render(folder: Path, *components: Path, prefix: str = "team-", suffix: str = "-b", transform: bool) -> Rendered:
        above = tmp_path.resolve()
        kustomization: Manifest = {
            "resources": [os.path.relpath(ROOT / folder, above)],
            "components": [os.path.relpath(ROOT / component, above) for component in components],
            "namePrefix": prefix,
            "nameSuffix": suffix,
            "transformers": [os.path.relpath(ROOT / RENAMING, above)] if transform else [],
            "configMapGenerator": [
                {"name": "model-download", "behavior": "merge", "literals": [f"MODEL_REFERENCE={PINNED}"]}
            ],
        }
        (above / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return Rendered(kustomize(above), folder)

    return render


def test_renamed_overlay_has_no_finding(overlay: Rendered, rename: Rename, preflight_findings: Preflight) -> None:
    # A RayService has its names in fields that kustomize updates, and the transformer needs an InferenceService.
    renamed = rename(overlay.path, transform=overlay.path != RAY)
    assert renamed.name == "team-llm-b"
    assert preflight_findings(renamed) == []


@pytest.mark.slow
@pytest.mark.parametrize("folder", COMPONENTS, ids=str)
def test_renamed_component_has_no_new_finding(
    folder: Path, render: Callable[[Path], Rendered], rename: Rename, preflight_findings: Preflight
) -> None:
    renamed = rename(Path("kustomize/base"), *dict.fromkeys([folder, IMAGES]), transform=True)
    findings = [finding for finding in preflight_findings(renamed) if "the query of autoScaling" not in finding]
    assert len(findings) == len(preflight_findings(render(folder)))
    assert renamed.name == "team-llm-b"


def test_two_names_in_one_namespace_share_no_object(rename: Rename) -> None:
    first = rename(STANDARD, prefix="first-", suffix="", transform=True)
    second = rename(STANDARD, prefix="second-", suffix="", transform=True)

    def names(rendered: Rendered) -> set[tuple[str, str]]:
        return {(manifest["kind"], manifest["metadata"]["name"]) for manifest in rendered.objects}

    assert {kind for kind, _ in names(first) & names(second)} == {"Namespace"}
    assert (first.claim, second.claim) == ("first-models", "second-models")
    ports = first.one("Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert ports["name"] == "first-llm-predictor"


@pytest.mark.parametrize(("prefix", "suffix"), [("team-", ""), ("", "-b"), ("team-", "-b")])
def test_renamed_without_the_transformer_is_one_finding(
    rename: Rename, preflight_findings: Preflight, prefix: str, suffix: str
) -> None:
    [finding] = preflight_findings(rename(STANDARD, prefix=prefix, suffix=suffix, transform=False))
    assert finding == (
        f"error: InferenceService/{prefix}llm{suffix}: namePrefix or nameSuffix renamed "
        f"models to {prefix}models{suffix}, but not in storageUri, "
        f"llm-predictor to {prefix}llm{suffix}-predictor, but not in Ingress/{prefix}llm-public{suffix}; "
        "add `transformers: [../../renaming]`, which is kustomize/renaming, to the kustomization that renames. "
        "[kserve-llm]"
    )


def test_renamed_inference_pool_keeps_its_references(rename: Rename, preflight_findings: Preflight) -> None:
    renamed = rename(Path("kustomize/base"), INFERENCE_POOL, IMAGES, transform=True)
    assert preflight_findings(renamed) == []
    pool = renamed.one("InferencePool")
    assert pool["metadata"]["name"] == "team-llm-b"
    assert pool["spec"]["endpointPickerRef"]["name"] == "team-endpoint-picker-b"
    [picker] = renamed.one("Deployment")["spec"]["template"]["spec"]["containers"]
    assert picker["args"][:2] == ["--pool-name", "team-llm-b"]


def test_renamed_keda_query_is_one_finding(rename: Rename, preflight_findings: Preflight) -> None:
    [finding] = preflight_findings(rename(Path("kustomize/base"), KEDA, IMAGES, transform=True))
    assert "counts requests of model 'llm', and 'team-llm-b' is served" in finding
