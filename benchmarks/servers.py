"""Servers with an OpenAI API, started on a model directory."""

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import httpx

from devtools import processes
from devtools.paths import ROOT
from kserve_llm.bench import CONNECT_SECONDS, Server, find
from kserve_llm.errors import BenchmarkError

START_SECONDS = 600
"""Longest time to load a model."""
_POLL_SECONDS = 0.05


@contextmanager
def predictor(name: str, model_dir: Path, flags: Sequence[str]) -> Iterator[Server]:
    """Run the predictor and yield it when it is ready.

    Raises:
        DemoError: it exited, or was not ready in time.
    """
    with processes.predictor(
        [
            "--model_dir",
            str(model_dir.resolve()),
            "--log_level",
            "WARNING",
            "--self_check_interval_seconds",
            "0",
            # Random weights repeat themselves more than real ones, so that guesses would be right too often.
            "--speculation",
            "none",
            *flags,
        ],
        model_name="model",
        port=processes.free_port(),
        timeout_seconds=START_SECONDS,
    ) as running:
        yield Server(name, f"{running.url}/v1", running.model_name, process_id=running.process.pid)


@contextmanager
def sequential(model_dir: Path, dtype: str, device: str = "auto") -> Iterator[Server]:
    """Run the sequential baseline and yield it when it is ready.

    Raises:
        BenchmarkError: it exited, or was not ready in time.
    """
    port = processes.free_port()
    flags = ["--model_dir", str(model_dir.resolve()), "--device", device, "--dtype", dtype, "--port", str(port)]
    process = processes.start(["benchmarks.sequential", *flags])
    try:
        _wait(process, port)
        yield find("sequential", f"http://127.0.0.1:{port}/v1")
    finally:
        processes.stop(process)


@contextmanager
def peer(command: str, model_dir: Path) -> Iterator[Server]:
    """Run another OpenAI server and yield it when it lists its model.

    Args:
        command: shell command with the placeholders `{model_dir}` and `{port}`.
        model_dir: value of `{model_dir}`.

    Raises:
        BenchmarkError: it exited, or was not ready in time.
    """
    port = processes.free_port()
    words = shlex.split(command.format(model_dir=model_dir.resolve(), port=port))
    program = next((word for word in words if "=" not in word and word != "env"), words[0])
    with command_server(Path(program).name, words, port) as server:
        yield server


@contextmanager
def command_server(
    name: str,
    words: Sequence[str],
    port: int,
    environment: Mapping[str, str] | None = None,
    log: IO[str] | None = None,
) -> Iterator[Server]:
    """Run a command that serves OpenAI's API at `port` of loopback, and yield it when it lists its model.

    Args:
        name: name in the results.
        words: the command.
        port: port that the command listens on.
        environment: further environment variables.
        log: file for its output. Default: standard output is dropped, standard error kept.

    Raises:
        BenchmarkError: it exited, or was not ready in time.
    """
    process = subprocess.Popen(
        words,
        stdout=log or subprocess.DEVNULL,
        stderr=log,
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        text=True,
    )
    try:
        _wait(process, port)
        yield replace(find(name, f"http://127.0.0.1:{port}/v1"), process_id=process.pid)
    finally:
        processes.stop(process)


def _wait(process: "subprocess.Popen[str]", port: int) -> None:
    """Wait until the server lists its models.

    Raises:
        BenchmarkError: it exited, or was not ready in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while not _lists_models(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"`{shlex.join(map(str, process.args))}` did not start; see its output.")  # type: ignore[arg-type]
        time.sleep(_POLL_SECONDS)


def _lists_models(port: int) -> bool:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return False
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=CONNECT_SECONDS, trust_env=False).is_success
    except httpx.TransportError:
        return False
