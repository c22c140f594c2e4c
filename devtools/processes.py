"""Start, wait for and stop the Hub, the storage initializer and the predictor as processes."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import httpx

from devtools.paths import ROOT

STOP_SECONDS = 30


class DemoError(Exception):
    """A process failed; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """A predictor process that serves `model_name` at `url`."""

    process: "subprocess.Popen[str]"
    url: str
    model_name: str


def free_port() -> int:
    """Return a TCP port that is free at the moment, and that no connection of another process takes meanwhile.

    Linux gives outgoing connections ports from 32768 on, and Ray's workers listen below 20000.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def local_hub(repositories: Mapping[str, Path]) -> Iterator[str]:
    """Serve local folders, by owner/name, as a Hub on loopback; yield its URL."""
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
    """Run the storage initializer and return its duration in seconds.

    Raises:
        DemoError: it failed; its last line on stderr is the reason.
    """
    started = time.monotonic()
    environment = {"HF_ENDPOINT": hub_url} if hub_url else {}
    exit_code = start(["storage_initializer", *flags, reference, str(root)], environment).wait()
    if exit_code:
        raise DemoError(f"The storage initializer failed with exit code {exit_code}; its last line is the reason.")
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
    until: Literal["ready", "live"] = "ready",
) -> Iterator[Predictor]:
    """Run a predictor and yield it when it is ready, or live while it loads; stop it with SIGTERM.

    Args:
        arguments: flags besides the name and the port.
        model_name: name in the URLs.
        port: HTTP port on loopback: programs of other machines do not reach it.
        stderr: destination of its log. Default: this process's stderr.
        on_wait: called with every new reason why it is not ready.
        timeout_seconds: how long to wait for it.
        until: the state in which it is yielded.

    Raises:
        DemoError: the port is taken, or the predictor exited or was not ready in time.
    """
    _check_free(port)
    flags = ["--served_model_name", model_name, "--host", "127.0.0.1", "--http_port", str(port), *arguments]
    process = start(["predictor", *flags], stderr=stderr)
    started = Predictor(process, f"http://127.0.0.1:{port}", model_name)
    try:
        path = f"/v2/models/{model_name}/ready" if until == "ready" else "/v2/health/live"
        _wait(started, path, on_wait, timeout_seconds)
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
    """Start `python -m module …` in the root of the repository."""
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=stdout,
        stderr=stderr,
        text=True,
    )


def stop(process: "subprocess.Popen[str]") -> int:
    """Send SIGTERM, after `STOP_SECONDS` SIGKILL, and return the exit code."""
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
    """Raise if the port is taken; otherwise readiness would be requested from the other process."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            reason = error.strerror
            raise DemoError(f"Port {port} cannot be opened ({reason}). Choose another: make serve PORT=8081.") from None


def _wait(server: Predictor, path: str, on_wait: Callable[[str], object] | None, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    last_reason = None
    with httpx.Client(base_url=server.url, timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                raise DemoError(f"The predictor exited with code {server.process.returncode}; see its log.")
            try:
                response = client.get(path)
            except httpx.TransportError:
                reason = "starting Python"
            else:
                if response.is_success:
                    return
                reason = response.json()["error"]
            if reason != last_reason and on_wait:
                on_wait(reason)
            last_reason = reason
            time.sleep(0.1)
    raise DemoError(f"The predictor was not ready within {timeout_seconds:.0f} s: {last_reason}")
