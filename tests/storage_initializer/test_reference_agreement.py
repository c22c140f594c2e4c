"""One reference, three programs: all of them accept it and mean the same snapshot, or all of them reject it."""

from pathlib import Path

import pytest

from devtools.local_hub import LocalHub
from predictor.errors import InvalidSettings
from predictor.models import snapshot
from preflight.checks import settings as settings_check
from preflight.deployment import Deployment
from tests.storage_initializer.conftest import Run, make_model


def preflight_accepts(reference: str) -> bool:
    environment = [{"name": "MODEL_REFERENCE", "value": reference}]
    download = {"name": "download", "args": ["$(MODEL_REFERENCE)", "/mnt/models"], "env": environment}
    job = {"kind": "Job", "metadata": {"name": "download"}, "spec": {"template": {"spec": {"containers": [download]}}}}
    service = {
        "kind": "InferenceService",
        "metadata": {"name": "llm"},
        "spec": {"predictor": {"model": {"env": environment}}},
    }
    return not list(settings_check.check(Deployment((service, job))))


@pytest.mark.parametrize(
    ("reference", "slug"),
    [
        ("hf://demo/arithmetic:COMMIT", "demo--arithmetic"),
        ("hf://demo/arithmetic@COMMIT", "demo--arithmetic"),
        ("file://DIR/a%2Fb", "file--b"),
        ("file://DIR/a/b/..", "file--a"),
        ("file://DIR/a//", "file--a"),
        ("file://DIR/a/./b", "file--b"),
        ("file://DIR/my%20model", "file--my%20model"),
        ("file://DIR/m%c3%b6del", "file--m%C3%B6del"),
    ],
)
def test_published_reference_is_found_by_predictor_and_preflight(
    run: Run, hub: LocalHub, volume: Path, tmp_path: Path, reference: str, slug: str
) -> None:
    for name in ("a", "a/b", "my model", "mödel"):
        directory = tmp_path / "source" / name
        directory.mkdir(parents=True)
        for file in make_model(tmp_path / "models" / name.replace("/", "-")).iterdir():
            file.rename(directory / file.name)
    commit = hub.commit("demo/arithmetic")
    reference = reference.replace("COMMIT", commit.upper()).replace("DIR", str(tmp_path / "source"))
    result = run(reference, volume)
    assert result.code == 0, result.stderr
    [published] = (path for path in volume.glob("*--*/*") if path.name != "refs")
    assert published.parent.name == slug
    assert snapshot.find(volume, reference) == snapshot.Snapshot(published, published.name)
    assert preflight_accepts(reference)


@pytest.mark.parametrize(
    "reference",
    [
        "hf://o--x/m",
        "hf://ö/m",
        "hf://owner",
        "hf://a/b/c",
        "hf://demo/arithmetic:a..b",
        "hf://demo/arithmetic:",
        "file:///",
        "file:///a/..",
        "file://relative",
        "file:///%ff",
        "s3://bucket/key",
        "owner/model",
    ],
)
def test_malformed_reference_is_rejected_by_all_programs(run: Run, volume: Path, reference: str) -> None:
    result = run(reference, volume)
    assert result.code == 2
    assert "Expected hf://owner/model" in result.reason
    volume.mkdir()
    with pytest.raises(InvalidSettings, match="Expected hf://owner/model"):
        snapshot.find(volume, reference)
    assert not preflight_accepts(reference)
