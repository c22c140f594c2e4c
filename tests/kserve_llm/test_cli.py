"""The command `kserve-llm` as its users run it, against a Hub on loopback."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT
from kserve_llm import cli
from tests.predictor.servers import HANG_SECONDS

MODEL = "demo/arithmetic"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables of commands: a Hub with the demo model, an empty cache, and a token that the Hub does not need."""
    with processes.local_hub({MODEL: DEMO_MODEL}) as url:
        cache = tmp_path_factory.mktemp("cache") / "models"
        yield {**os.environ, "HF_ENDPOINT": url, cli.CACHE_VARIABLE: str(cache), "HF_TOKEN": "hf_of_the_user"}


def run(environment: Mapping[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kserve_llm", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_model_is_fetched_verified_listed_and_removed(environment: dict[str, str], tmp_path: Path) -> None:
    variables = {**environment, cli.CACHE_VARIABLE: str(tmp_path / "cache")}
    missing = run(variables, "verify", MODEL)
    assert missing.returncode == 2
    assert f"Run `kserve-llm fetch hf://{MODEL}:main` first." in missing.stderr
    fetched = run(variables, "fetch", MODEL)
    assert fetched.returncode == 0, fetched.stderr
    assert f"published hf://{MODEL}" in fetched.stdout
    assert "verified" in run(variables, "verify", f"hf://{MODEL}").stdout
    [snapshot] = (tmp_path / "cache" / "demo--arithmetic").glob("?" * 40)
    assert "names and sizes" in run(variables, "verify", str(snapshot), "--fast").stdout
    assert "1 snapshots" in run(variables, "list").stdout
    assert "would remove" in run(variables, "gc", "--force", "--keep", "0", "--dry-run").stdout


def test_serve_fetches_and_serves_until_a_signal(environment: dict[str, str]) -> None:
    port = processes.free_port()
    command = [sys.executable, "-m", "kserve_llm", "serve", MODEL, "--port", str(port), "--max-num-seqs", "3"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        url = f"http://127.0.0.1:{port}"
        output = "".join(lines)
        assert f"{url}/ " in output
        assert f"{url}/v1  base URL of OpenAI clients; model arithmetic" in output
        [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        variables = Path(f"/proc/{child}/environ").read_bytes()
        assert b"HF_ENDPOINT" in variables
        assert b"HF_TOKEN" not in variables
        body = {"model": "arithmetic", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=HANG_SECONDS, trust_env=False).json()
        assert answer["choices"][0]["message"]["content"].endswith("42")
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, log
        assert "ready" in log.splitlines()
    finally:
        # The predictor ends with it.
        process.terminate()


def test_serve_of_a_missing_model_ends_with_the_reason_of_the_initializer(environment: dict[str, str]) -> None:
    result = run(environment, "serve", "demo/none")
    assert result.returncode == 2
    assert "demo/none" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["serve", "a/b/c"], "'hf://a/b/c' is not a reference. Expected hf://owner/model"),
        (["fetch", "nowhere"], "'hf://nowhere' is not a reference"),
    ],
)
def test_malformed_model_is_named(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert error in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.REQUIREMENTS, "preflight", "a_package_that_is_missing")
    assert cli.main(["check", "kustomize/overlays/dev"]) == 2
    assert "Run: pip install 'kserve-llm[preflight]'" in capsys.readouterr().err


def test_completion_has_commands_and_flags_of_the_predictor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "(serve fetch verify list gc check completion)" in script
    assert " --max_num_seqs " in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_check_runs_preflight(environment: dict[str, str]) -> None:
    result = run(environment, "check", "kustomize/overlays/dev", "--json")
    assert '"findings"' in result.stdout, result.stderr
