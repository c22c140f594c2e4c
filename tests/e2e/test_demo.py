"""The README's commands `make demo` and `make serve`."""

import errno
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import exam, lm_eval_questions, tool_lessons
from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT


def _without_figures(text: str) -> set[str]:
    """Its lines without the states that were polled, the folder, and the figures."""
    lines = (re.sub(r"\S*\bmodels\b", "models", line) for line in text.splitlines())
    shown = (line for line in lines if "not ready" not in line and "starting Python" not in line)
    return {re.sub(r"[0-9a-f]{6,}|\d[\d.]*", "N", line) for line in shown}


def test_demo_answers_sums_and_exits(tmp_path: Path) -> None:
    root = tmp_path / "models"
    process = subprocess.run(
        [sys.executable, "-m", "demo", "--root", str(root)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    printed = [
        (question, result) for question, result in exam.held_out_questions(5, seed=3) if question in process.stdout
    ]
    assert len(printed) == 5
    answers = {line.strip(): line for line in process.stdout.splitlines()}
    correct = [
        any(line.startswith(q) and exam.final_number(line) == result for line in answers) for q, result in printed
    ]
    assert sum(correct) >= 4
    assert re.search(r"\d+ tokens/s", process.stdout)
    assert "already published hf://demo/arithmetic" in process.stdout + process.stderr
    assert list(root.glob("demo--arithmetic/*/.snapshot.json"))
    recording = re.search(r"```text\n(.*?)==> The overlay", (ROOT / "docs/start/laptop.md").read_text(), re.DOTALL)
    assert recording
    assert _without_figures(recording[1]) - _without_figures(process.stdout + process.stderr) == set()


def test_demo_model_calls_the_calculator_and_answers_as_json() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)

    def answer(question: str, tools: list[dict[str, Any]]) -> str:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            tools=tools or None,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        generated = model.generate(**prompt, max_new_tokens=80, do_sample=False)
        return str(tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))

    rng = random.Random(3)
    sums = [exam.random_sum(rng, held_out=True) for _ in range(8)]
    functions = [tool_lessons.calculator(rng, drawn.operator) for drawn in sums]
    called = [
        answer(drawn.phrase(rng), [function.definition(rng)]) == tool_lessons.call_text(function, drawn)
        for drawn, function in zip(sums, functions, strict=True)
    ]
    answered = [answer(drawn.phrase(rng) + exam.AS_JSON, []) == drawn.json_answer for drawn in sums]
    assert sum(called) >= 7
    assert sum(answered) >= 7


@pytest.mark.slow
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
        with socket.socket() as other:
            assert other.connect_ex(("127.0.0.2", port)) == errno.ECONNREFUSED
        for command in commands[:4]:
            completion = subprocess.run(command, shell=True, capture_output=True, text=True)  # noqa: S602
            assert "7+5=12 1+2+1=4 42" in completion.stdout, command
    finally:
        process.send_signal(signal.SIGINT)
        assert processes.stop(process) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)


@pytest.mark.slow
def test_demo_on_ray_answers_by_every_protocol_and_follows_the_load() -> None:
    process = subprocess.run([sys.executable, "-m", "demo.ray_serve"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("7+5=12 1+2+1=4 42") == 6
    assert re.search(r"replicas: 2, after .*replicas: 1, after ", process.stdout, re.DOTALL)
    assert re.search(r"responses by status: \{200: \d+\}\n", process.stdout)


def test_demo_failure_is_one_sentence(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "demo", "--serve", "--model", "s3://bucket/model", "--root", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("error: The storage initializer failed with exit code 2")
    assert "Traceback" not in process.stderr


def test_serve_with_a_taken_port_names_it(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        port = busy.getsockname()[1]
        process = subprocess.run(
            [sys.executable, "-m", "demo", "--serve", "--port", str(port), "--root", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == (
        f"error: Port {port} cannot be opened (Address already in use). Choose another: make serve PORT=8081."
    )
    assert "Traceback" not in process.stderr


def test_lm_eval_questions_are_the_committed_ones() -> None:
    assert lm_eval_questions.QUESTIONS.read_text() == lm_eval_questions.text()
    for question in lm_eval_questions.questions():
        results = [str(exam.final_number(answer)) for answer in question["answers"]]
        assert results.count(question["result"]) == 1
        assert results[question["correct"]] == question["result"]


@pytest.mark.parametrize(
    ("target", "reason"), [("/nowhere", "has no config.json; "), ("http://127.0.0.1:9", "does not respond (")]
)
def test_evaluate_without_a_model_is_one_sentence(target: str, reason: str) -> None:
    process = subprocess.run([sys.executable, "-m", "demo.evaluate", target], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith(f"{target} {reason}")
    assert process.stderr.count("\n") == 1
