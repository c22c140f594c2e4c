"""Publication of an adapter next to a model."""

from pathlib import Path

import pytest

from devtools.local_hub import LocalHub
from tests.storage_initializer.conftest import Run, problems, safetensors

ADAPTER = {"ADAPTER_REFERENCE": "hf://demo/words"}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The directory of an adapter, before it is on the Hub as demo/words."""
    directory = tmp_path / "words"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(safetensors(2000))
    for name in ("adapter_model.bin", "optimizer.pt", "README.md", "tokenizer.json", "handler.py"):
        (directory / name).write_text("of the training")
    return directory


def test_adapter_is_published_before_the_model_with_its_own_files_only(
    run: Run, hub: LocalHub, adapter: Path, volume: Path
) -> None:
    hub.add("demo/words", adapter)
    env = {**ADAPTER, "STORAGE_ALLOW_PATTERNS": "*.json,*.safetensors"}
    result = run("hf://demo/arithmetic", volume, env=env)
    assert result.code == 0, result.stderr
    commit = hub.commit("demo/words")
    directory = volume / "demo--words" / commit
    first, second = result.stdout.splitlines()
    assert first.startswith(f"published hf://demo/words@{commit[:12]} at {directory}: 2 files, ")
    assert second.startswith("published hf://demo/arithmetic@")
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        ".snapshot.json",
    }
    assert problems(directory) == []
    again = run("hf://demo/arithmetic", volume, env=env)
    assert again.stdout.splitlines()[0].startswith("already published hf://demo/words@")


@pytest.mark.parametrize(
    ("removed", "reason"),
    [
        (
            ("adapter_model.safetensors",),
            "demo/words:main is not a usable adapter: it has no adapter_model.safetensors. Its weights are pickled",
        ),
        (("adapter_config.json", "adapter_model.bin"), "it has no adapter_config.json. Use a PEFT adapter"),
    ],
    ids=["pickle", "config"],
)
def test_incomplete_adapter_ends_the_run_before_the_model(
    run: Run, hub: LocalHub, adapter: Path, volume: Path, removed: tuple[str, ...], reason: str
) -> None:
    for name in removed:
        (adapter / name).unlink()
    hub.add("demo/words", adapter)
    result = run("hf://demo/arithmetic", volume, env=ADAPTER)
    assert result.code == 2
    assert reason in result.reason
    assert result.stdout == ""
    assert not (volume / "demo--arithmetic").exists()


def test_absent_or_malformed_adapter_is_permanent(run: Run, volume: Path) -> None:
    absent = run("hf://demo/arithmetic", volume, env=ADAPTER)
    assert (absent.code, absent.stdout) == (2, "")
    assert "hf://demo/words" in absent.reason
    malformed = run("hf://demo/arithmetic", volume, env={"ADAPTER_REFERENCE": "words"})
    assert malformed.code == 2
    assert "'words' is not a reference" in malformed.reason
