"""What the README's commands run: the whole, from a hub to an answer."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from demo import exam
from devtools import processes
from devtools.processes import ROOT


def test_demo_answers_sums_and_exits(tmp_path: Path) -> None:
    root = tmp_path / "models"
    ended = subprocess.run(
        [sys.executable, "-m", "demo", "--root", str(root)], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    shown = [(question, result) for question, result in exam.held_out_questions(5, seed=3) if question in ended.stdout]
    assert len(shown) == 5
    answers = {line.strip(): line for line in ended.stdout.splitlines()}
    right = [any(line.startswith(q) and exam.final_number(line) == result for line in answers) for q, result in shown]
    assert sum(right) >= 4
    assert re.search(r"\d+ tokens/s", ended.stdout)
    assert "already published hf://demo/arithmetic" in ended.stdout + ended.stderr
    assert list(root.glob("demo--arithmetic/*/.snapshot.json"))


def test_serve_prints_working_commands_until_interrupted(tmp_path: Path) -> None:
    port = processes.free_port()
    process = processes.start(
        ["demo", "--serve", "--port", str(port), "--root", str(tmp_path / "models")], stdout=subprocess.PIPE
    )
    try:
        commands = []
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("curl"):
                commands.append(line)
            if "health/ready" in line:
                break
        assert len(commands) == 6
        for command in commands[:4]:
            asked = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)  # noqa: S602
            assert "7+5=12 1+2+1=4 42" in asked.stdout, command
    finally:
        process.send_signal(signal.SIGINT)
        assert processes.stop(process) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)


def test_demo_failure_is_one_sentence(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "demo", "--serve", "--model", "s3://bucket/model", "--root", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: The storage initializer ended with exit code 2")
    assert "Traceback" not in ended.stderr


def test_serve_with_a_taken_port_names_it(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        port = busy.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "demo", "--serve", "--port", str(port), "--root", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"error: Port {port} cannot be opened (Address already in use). Choose another: make serve PORT=8081."
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("target", "why"), [("/nowhere", "has no config.json; "), ("http://127.0.0.1:9", "does not respond (")]
)
def test_evaluate_without_a_model_is_one_sentence(target: str, why: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "demo.evaluate", target], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"{target} {why}")
    assert ended.stderr.count("\n") == 1
