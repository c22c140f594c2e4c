"""The directory format that the two packages share: what one publishes, the other finds."""

import json
from pathlib import Path

import pytest

from demo import processes
from demo.processes import ROOT
from predictor import snapshot

DEMO_MODEL = ROOT / "demo" / "model"


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with the demo model from a hub, and once more from a directory with a blank in its name."""
    root = tmp_path_factory.mktemp("volume")
    directory = tmp_path_factory.mktemp("source") / "my model"
    directory.symlink_to(DEMO_MODEL)
    with processes.local_hub({"demo/arithmetic": DEMO_MODEL}) as hub_url:
        processes.initialize("hf://demo/arithmetic", root, hub_url)
    processes.initialize(directory.as_uri(), root, None)
    return root


@pytest.mark.parametrize(
    "reference", ["hf://demo/arithmetic", "hf://demo/arithmetic:main", "hf://demo/arithmetic@main"]
)
def test_the_predictor_finds_what_the_storage_initializer_published(volume: Path, reference: str) -> None:
    found = snapshot.find(volume, reference)
    assert (found.directory / "model.safetensors").read_bytes() == (DEMO_MODEL / "model.safetensors").read_bytes()
    record = json.loads((found.directory / snapshot.RECORD).read_text())
    assert record["commit"] == found.commit == found.directory.name
    assert snapshot.find(volume, f"hf://demo/arithmetic:{found.commit}") == found
    assert snapshot.find(found.directory, None) == found


def test_the_predictor_finds_a_published_directory(volume: Path) -> None:
    found = snapshot.find(volume, "file:///anywhere/my%20model")
    assert found.directory.parent.name == "file--my%20model"
