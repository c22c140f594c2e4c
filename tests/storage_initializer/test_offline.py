"""Without a Hub: what is on the volume is good enough, and nothing else is waited for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.local_hub import LocalHub, Response
from devtools.paths import ROOT
from tests.storage_initializer.conftest import Run, make_model

UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("flags", "env"),
    [(["--offline"], {}), ([], {"STORAGE_INITIALIZER_OFFLINE": "true"}), ([], {"HF_HUB_OFFLINE": "1"})],
)
def test_offline_branch_resolves_to_last_commit(
    run: Run, hub: LocalHub, volume: Path, tmp_path: Path, flags: list[str], env: dict[str, str]
) -> None:
    run("hf://demo/arithmetic", volume)
    last = hub.commit("demo/arithmetic")
    hub.add("demo/arithmetic", make_model(tmp_path / "newer", seed=1))
    hub.forget()
    result = run(*flags, "hf://demo/arithmetic", volume, env=env)
    assert result.code == 0, result.stderr
    assert result.stdout.startswith(f"already published hf://demo/arithmetic@{last[:12]}")
    assert f"offline: using commit {last} of hf://demo/arithmetic:main, which may be outdated" in result.stderr
    assert hub.requests == []


def test_offline_unpublished_reference_is_rejected(run: Run, hub: LocalHub, volume: Path) -> None:
    branch = run("--offline", "hf://demo/arithmetic", volume)
    assert branch.code == 2
    assert "was never resolved on" in branch.reason
    commit = run("--offline", f"hf://demo/arithmetic:{hub.commit('demo/arithmetic')}", volume)
    assert commit.code == 2
    assert f"is not published on {volume}. Run once without --offline" in commit.reason
    assert hub.requests == []


def test_unreachable_hub_uses_published_snapshot(run: Run, hub: LocalHub, volume: Path) -> None:
    run("hf://demo/arithmetic", volume)
    result = run("hf://demo/arithmetic", volume, env=UNREACHABLE)
    assert result.code == 0, result.stderr
    assert "nothing to do" in result.stdout
    assert f"using commit {hub.commit('demo/arithmetic')}" in result.stderr


def test_failing_hub_with_published_snapshot_is_not_retried(run: Run, hub: LocalHub, volume: Path) -> None:
    run("hf://demo/arithmetic", volume)
    hub.forget()
    hub.fault = lambda _request, _response: Response(503)
    assert run("hf://demo/arithmetic", volume).code == 0
    assert [request.kind for request in hub.requests] == ["info"]


def test_ref_without_snapshot_is_no_fallback(run: Run, hub: LocalHub, volume: Path) -> None:
    run("hf://demo/arithmetic", volume)
    shutil.rmtree(volume / "demo--arithmetic" / hub.commit("demo/arithmetic"))
    assert run("hf://demo/arithmetic", volume, env=UNREACHABLE).code == 1
    assert run("--offline", "hf://demo/arithmetic", volume).code == 2


def test_published_commit_imports_no_large_library(run: Run, hub: LocalHub, volume: Path) -> None:
    reference = f"hf://demo/arithmetic:{hub.commit('demo/arithmetic')}"
    run(reference, volume)
    script = (
        "import sys; from storage_initializer.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, *{m.partition('.')[0] for m in sys.modules} "
        "& {'huggingface_hub', 'httpx2', 'hf_xet', 'tenacity', 'torch', 'transformers', 'tqdm'})"
    )
    command = [sys.executable, "-c", script, reference, str(volume)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
