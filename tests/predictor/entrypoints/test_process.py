"""The predictor as a process: how it starts, fails and ends."""

import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from devtools import processes
from devtools.processes import ROOT

DEMO_MODEL = str(ROOT / "demo" / "model")


def failure(*arguments: str) -> tuple[int, str]:
    """Exit code and last line of a predictor that cannot start."""
    command = [sys.executable, "-m", "predictor", "--http_port", str(processes.free_port()), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr.strip().splitlines()[-1]


def test_names_an_unknown_flag() -> None:
    assert failure("--modeldir", "/x") == (2, "error: Unknown flag: --modeldir. Did you mean --model_dir?")


def test_names_a_missing_directory() -> None:
    code, line = failure("--model_dir", "/nowhere/at/all")
    assert code == 1
    assert line == ("error: /nowhere/at/all is not a directory; point --model_dir to a snapshot or a volume's root.")


def test_names_what_a_directory_lacks(weights: Path) -> None:
    (weights / "model.safetensors").unlink()
    code, line = failure("--model_dir", str(weights))
    assert (code, line.startswith(f"error: {weights} has no *.safetensors")) == (1, True)


def test_names_a_busy_port() -> None:
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        code, line = failure("--model_dir", DEMO_MODEL, "--http_port", port)
    assert code == 1
    assert line == f"error: Port {port} cannot be opened: Address already in use. Choose another with --http_port."


def test_the_port_is_open_while_the_snapshot_is_awaited_and_503_says_so(tmp_path: Path) -> None:
    port = processes.free_port()
    reference = ["--model_reference", "hf://demo/arithmetic", "--snapshot_wait_seconds", "600"]
    began = time.monotonic()
    process = processes.start(
        [
            "predictor",
            "--served_model_name",
            "demo",
            "--model_dir",
            str(tmp_path),
            "--http_port",
            str(port),
            *reference,
        ],
        stderr=subprocess.PIPE,
    )
    try:
        response = None
        deadline = time.monotonic() + 180
        while response is None and time.monotonic() < deadline:
            try:
                response = httpx.get(f"http://127.0.0.1:{port}/v2/models/demo/ready", trust_env=False)
            except httpx.TransportError:
                time.sleep(0.1)
        assert response is not None
        assert response.status_code == 503
        assert response.json() == {"error": "Model demo is not ready: waiting for the snapshot."}
        assert "Retry-After" in response.headers
        live = httpx.get(f"http://127.0.0.1:{port}/v2/health/live", trust_env=False)
        assert live.status_code == 200
        told = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        [imports] = re.findall(r'load_phase_seconds{.*phase="imports".*} (\S+)', told)
        assert 0 < float(imports) < time.monotonic() - began + 0.02, "no longer than it was there, but for a tick"
        body = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["1+1="]}]}
        asked = httpx.post(f"http://127.0.0.1:{port}/v2/models/demo/infer", json=body, trust_env=False)
        assert asked.status_code == 503
    finally:
        assert processes.stop(process) == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish_and_exits_zero(sent: signal.Signals, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log, ThreadPoolExecutor() as threads:
        arguments = ["--model_dir", DEMO_MODEL]
        with processes.predictor(arguments, model_name="demo", port=processes.free_port(), stderr=log) as server:
            body = {
                "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [4], "data": ["Once upon"] * 4}],
                "parameters": {"max_tokens": 400, "temperature": 9.0, "top_k": 300},
            }
            url = f"{server.url}/v2/models/demo/infer"
            running = threads.submit(httpx.post, url, json=body, timeout=120, trust_env=False)
            time.sleep(0.5)
            server.process.send_signal(sent)
            assert running.result().status_code == 200
            assert server.process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("phase", ["starting", "loading weights", "warming up", "ready"])
def test_a_signal_at_any_phase_of_the_start_ends_the_process(phase: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        flags = [
            "--served_model_name",
            "demo",
            "--model_dir",
            DEMO_MODEL,
            "--http_port",
            str(port := processes.free_port()),
        ]
        process = processes.start(["predictor", *flags], stderr=log)
        try:
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline:
                try:
                    response = httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", trust_env=False)
                except httpx.TransportError:
                    continue
                if phase == "starting" or phase in response.text or response.is_success:
                    break
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            processes.stop(process)
    assert "Traceback" not in (tmp_path / "log").read_text()
