"""What is measured: servers that speak OpenAI's completions, found by URL or started on a model directory."""

import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from devtools import processes

CONNECT_SECONDS = 30
START_SECONDS = 300
"""How long a server may take to load its model."""
_POLL_SECONDS = 0.05


class BenchmarkError(Exception):
    """A measurement would be worthless; the message is one sentence for whoever runs it."""


@dataclass(frozen=True, slots=True, eq=False)
class Server:
    """What is measured: `url` up to and with OpenAI's version segment, and the model's name in its requests.

    Each is equal to itself only, so that one can be compared with itself, to see the noise.
    """

    name: str
    url: str
    model: str


@contextmanager
def predictor(name: str, model_dir: Path, flags: Sequence[str]) -> Iterator[Server]:
    """The predictor in a process of its own, ready; stopped at the end.

    Raises:
        DemoError: it ended, or was not ready in time.
    """
    with processes.predictor(
        [
            "--model_dir",
            str(model_dir.resolve()),
            "--log_level",
            "WARNING",
            "--self_check_interval_seconds",
            "0",
            *flags,
        ],
        model_name="model",
        port=processes.free_port(),
        timeout_seconds=START_SECONDS,
    ) as running:
        yield Server(name, f"{running.url}/v1", running.model_name)


@contextmanager
def sequential(model_dir: Path, dtype: str) -> Iterator[Server]:
    """The baseline in a process of its own, once its model is loaded; stopped at the end.

    Raises:
        BenchmarkError: it ended, or did not load in time.
    """
    port = processes.free_port()
    process = processes.start(
        ["benchmarks.sequential", "--model_dir", str(model_dir.resolve()), "--dtype", dtype, "--port", str(port)]
    )
    try:
        _wait(process, port)
        yield find("sequential", f"http://127.0.0.1:{port}/v1")
    finally:
        processes.stop(process)


@contextmanager
def peer(command: str, model_dir: Path) -> Iterator[Server]:
    """Another server, named by its program, that lists its model; stopped at the end.

    Args:
        command: what a shell would be told, with `{model_dir}` and `{port}` in it; serves OpenAI's routes below /v1.
        model_dir: what `{model_dir}` stands for.

    Raises:
        BenchmarkError: it ended, or was not ready in time.
    """
    port = processes.free_port()
    words = shlex.split(command.format(model_dir=model_dir.resolve(), port=port))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, text=True)
    try:
        _wait(process, port)
        program = next((word for word in words if "=" not in word and word != "env"), words[0])
        yield find(Path(program).name, f"http://127.0.0.1:{port}/v1")
    finally:
        processes.stop(process)


def find(name: str, url: str) -> Server:
    """The server at `url`, with the first model that it lists.

    Raises:
        BenchmarkError: there is none.
    """
    try:
        answer = httpx.get(f"{url}/models", timeout=CONNECT_SECONDS, trust_env=False).raise_for_status()
        return Server(name, url, answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise BenchmarkError(
            f"{url}/models lists no model; URL goes up to the /v1 of an OpenAI server: {error}"
        ) from None


def _wait(process: "subprocess.Popen[str]", port: int) -> None:
    """Until its models are listed.

    Raises:
        BenchmarkError: it ended, or was not ready in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while not _lists(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"`{shlex.join(map(str, process.args))}` did not start; its output says why.")  # type: ignore[arg-type]
        time.sleep(_POLL_SECONDS)


def _lists(port: int) -> bool:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return False
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=CONNECT_SECONDS, trust_env=False).is_success
    except httpx.TransportError:
        return False
