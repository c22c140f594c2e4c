"""The three programs of the demo as processes: started, waited for, stopped. The tests run them the same way."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 30


class DemoError(Exception):
    """A step failed; the message is one sentence for whoever runs the demo."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """A predictor process that serves `model_name` at `url`."""

    process: "subprocess.Popen[str]"
    url: str
    model_name: str


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_hub(repositories: Mapping[str, Path]) -> Iterator[str]:
    """A Hub on loopback that serves local folders, by owner/name; gives its URL."""
    folders = [f"{name}={folder}" for name, folder in repositories.items()]
    process = start(["devtools.local_hub", "--port", "0", *folders], stdout=subprocess.PIPE)
    try:
        url = process.stdout.readline().strip() if process.stdout else ""
        if not url.startswith("http"):
            raise DemoError(f"The local hub did not start (exit code {process.wait()}).")
        yield url
    finally:
        stop(process)


def initialize(reference: str, root: Path, hub_url: str | None, *flags: str) -> float:
    """Run the storage initializer to its end; gives the seconds that it took.

    Raises:
        DemoError: it failed; it has said why.
    """
    started = time.monotonic()
    environment = {"HF_ENDPOINT": hub_url} if hub_url else {}
    exit_code = start(["storage_initializer", *flags, reference, str(root)], environment).wait()
    if exit_code:
        raise DemoError(f"The storage initializer ended with exit code {exit_code}; its last line says why.")
    return time.monotonic() - started


@contextmanager
def predictor(
    arguments: Sequence[str],
    *,
    model_name: str,
    port: int,
    stderr: IO[str] | int | None = None,
    on_wait: Callable[[str], object] | None = None,
    timeout_seconds: float = 120,
) -> Iterator[Predictor]:
    """A predictor that is ready; stopped by SIGTERM at the end.

    Args:
        arguments: flags beside the name and the port.
        model_name: name in the URLs.
        port: HTTP port on loopback.
        stderr: where its log goes; default: ours.
        on_wait: told each new reason for not being ready.
        timeout_seconds: how long to wait for readiness.

    Raises:
        DemoError: the port is taken, it ended, or was not ready in time.
    """
    _check_free(port)
    flags = ["--served_model_name", model_name, "--http_port", str(port), *arguments]
    process = start(["predictor", *flags], stderr=stderr)
    started = Predictor(process, f"http://127.0.0.1:{port}", model_name)
    try:
        _wait_ready(started, on_wait, timeout_seconds)
        yield started
    finally:
        stop(process)


def start(
    module: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    stdout: int | None = None,
    stderr: IO[str] | int | None = None,
) -> "subprocess.Popen[str]":
    """`python -m …` from the root of the repository, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=stdout,
        stderr=stderr,
        text=True,
    )


def stop(process: "subprocess.Popen[str]") -> int:
    """SIGTERM, then wait; SIGKILL if that is not enough. Gives the exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    return process.returncode


def _check_free(port: int) -> None:
    """Before the predictor finds out for itself, whoever has the port would be asked whether it is ready."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            reason = error.strerror
            raise DemoError(f"Port {port} cannot be opened ({reason}); choose another: make serve PORT=8081.") from None


def _wait_ready(server: Predictor, on_wait: Callable[[str], object] | None, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    told = None
    with httpx.Client(base_url=server.url, timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                raise DemoError(f"The predictor ended with exit code {server.process.returncode}; its log says why.")
            try:
                response = client.get(f"/v2/models/{server.model_name}/ready")
            except httpx.TransportError:
                reason = "starting Python"
            else:
                if response.is_success:
                    return
                reason = response.json()["error"]
            if reason != told and on_wait:
                on_wait(reason)
            told = reason
            time.sleep(0.1)
    raise DemoError(f"The predictor was not ready within {timeout_seconds:.0f} s: {told}")
