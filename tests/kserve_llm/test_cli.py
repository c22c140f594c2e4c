"""The command `kserve-llm` as its users run it, against a Hub on loopback."""

import errno
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT
from kserve_llm import cli
from tests.predictor.servers import HANG_SECONDS

MODEL = "demo/arithmetic"
SMALL_LOAD = ("--levels", "2", "--requests", "3", "--input_tokens", "8", "--output-tokens", "4", "--repetitions", "1")
PORT_FIX = "Stop the server there, or choose another one with --port."


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
        with socket.socket() as other:
            assert other.connect_ex(("127.0.0.2", port)) == errno.ECONNREFUSED
        taken = run(environment, "serve", MODEL, "--port", str(port))
        assert (taken.returncode, taken.stderr.splitlines()) == (2, [f"error: Port {port} is in use. {PORT_FIX}"])
        measured = run(environment, "bench", url, *SMALL_LOAD)
        assert measured.returncode == 0, measured.stderr
        assert measured.stdout.splitlines()[-1].split()[:3] == [url, "2", "3"]
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, log
        assert "ready" in log.splitlines()
        assert not [line for line in log.splitlines() if line.startswith(("loading", "warming")) and line.endswith(".")]
    finally:
        # The predictor ends with it.
        process.terminate()


def test_serve_of_a_missing_model_ends_with_the_reason_of_the_initializer(environment: dict[str, str]) -> None:
    result = run(environment, "serve", "demo/none")
    assert result.returncode == 2
    assert "demo/none" in result.stderr.splitlines()[-1]


def test_bench_serves_a_model_for_the_time_of_the_measurement(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = run(environment, "bench", str(DEMO_MODEL), *SMALL_LOAD, "--json", str(file), "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].split()[:3] == [DEMO_MODEL.name, "2", "3"]
    content = json.loads(file.read_text())
    assert content["settings"].items() >= {"input_tokens": 8, "output_tokens": 4, "repetitions": 1}.items()
    [level] = content["measurements"]
    assert (level["concurrency"], level["median"]["requests"], level["median"]["output_tokens"]) == (2, 3, 12)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_bench_of_a_model_ends_with_its_server_at_a_signal(environment: dict[str, str], number: signal.Signals) -> None:
    command = [sys.executable, "-m", "kserve_llm", "bench", str(DEMO_MODEL), "--requests", "1000000"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while "TTFT" not in process.stderr.readline():
            assert process.poll() is None
        [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        lines = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert "Stopped." in lines
    assert not [line for line in lines if "aborting" in line]
    assert not Path(f"/proc/{child}").exists()


def test_bench_without_a_server_is_one_sentence(environment: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{processes.free_port()}"
    result = run(environment, "bench", url)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {url}/v1/models lists no model")
    assert len(result.stderr.splitlines()) == 1


def test_bench_of_a_running_server_refuses_flags_of_the_predictor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "http://127.0.0.1:1", "--quantization", "8bit"]) == 2
    assert "has no flag --quantization" in capsys.readouterr().err


def test_fetch_on_a_terminal_shows_a_bar_and_none_in_a_log(environment: dict[str, str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "kserve_llm", "fetch", MODEL, "--cache"]
    log = subprocess.run([*words, tmp_path / "one"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "fetched " in log.stderr
    assert "█" not in log.stderr
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 100))
    process = subprocess.Popen([*words, tmp_path / "two"], cwd=ROOT, env=environment, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    # Reading fails when the last process of the terminal has ended.
    with suppress(OSError):
        while block := os.read(terminal, 4096):
            shown += block
    os.close(terminal)
    assert process.wait() == 0
    assert "fetched: 100%|█" in shown.decode()


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"kserve-llm {importlib.metadata.version('kserve-llm')}\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["serve", "a/b/c"], "'hf://a/b/c' is not a reference. Expected hf://owner/model"),
        (["fetch", "nowhere"], "'hf://nowhere' is not a reference"),
        (["serve", "--quantization", "8bit", "a/b"], "Write the model before --quantization.\n"),
    ],
)
def test_malformed_model_is_named(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["serve", "--port", "99999"], "argument --port: 99999 is not a port, from 1 to 65535"),
        (["serve", "--port", "http"], "argument --port: http is not a port"),
        (["bench", "--requests", "many"], "argument --requests: many is not a positive number"),
    ],
)
def test_malformed_number_is_named(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([words[0], str(DEMO_MODEL), *words[1:]])
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(("command", "fix"), [("serve", "Write --port instead."), ("bench", "Leave it out: any free")])
def test_port_of_the_predictor_is_not_passed_on(command: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(DEMO_MODEL), "--http-port=9000"]) == 2
    assert f"kserve-llm {command} has no flag --http_port. {fix}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["list", "gc"])
def test_cache_that_does_not_exist_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--cache", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'cache'} does not exist. Run `kserve-llm fetch OWNER/MODEL` first.\n"
    )
    assert not (tmp_path / "cache").exists()


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.REQUIREMENTS, "preflight", "a_package_that_is_missing")
    assert cli.main(["check", "kustomize/overlays/dev"]) == 2
    assert "Run: pip install 'kserve-llm[preflight]'" in capsys.readouterr().err


def test_completion_has_commands_and_flags_of_the_predictor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "(serve bench fetch verify list gc check completion)" in script
    assert " --max_num_seqs " in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_check_runs_preflight(environment: dict[str, str]) -> None:
    result = run(environment, "check", "kustomize/overlays/dev", "--json")
    assert '"findings"' in result.stdout, result.stderr
