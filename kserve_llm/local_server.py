"""A model of the Hub, or of a directory, served on this machine by one command."""

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from kserve_llm.child import Child
from kserve_llm.errors import CommandError
from kserve_llm.flags import value
from kserve_llm.hints import hints
from kserve_llm.start_display import StartDisplay
from snapshot_format.reference import HubReference, ModelReference

ALL_ADDRESSES = "0.0.0.0"  # noqa: S104
LOOPBACK = "127.0.0.1"
"""Programs of other machines do not reach it; a model on a laptop has no API keys."""
POLL_SECONDS = 0.2
REQUEST_SECONDS = 5
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables that the storage initializer may need, and a server never does."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model to serve."""

    source: Path | ModelReference
    """Its directory, or a reference to fetch."""
    cache: Path
    """Volume of fetched models."""
    flags: Sequence[str] = ()
    """Of the predictor."""

    @property
    def name(self) -> str:
        """Name in requests."""
        if isinstance(self.source, HubReference):
            return self.source.model
        return self.source.name if isinstance(self.source, Path) else self.source.path.name

    @property
    def host(self) -> str:
        """Address for programs of this machine."""
        host = value(self.flags, "host")
        return LOOPBACK if host in (None, ALL_ADDRESSES) else host

    def url(self, port: int) -> str:
        """URL for programs of this machine."""
        return f"http://{self.host}:{port}"


def serve(model: LocalModel, port: int) -> int:
    """Fetch and verify a model, serve it until a signal, and return the exit code.

    Raises:
        CommandError: the port is in use.
    """
    with running(model, port) as (child, is_ready):
        if is_ready:
            url = model.url(port)
            _print_addresses(url)
            _print_hints(model, url)
        return child.wait()


@contextmanager
def running(model: LocalModel, port: int) -> Iterator[tuple[Child, bool]]:
    """Fetch, verify and start a model; yield the process, and whether it is ready to serve at `port` of loopback.

    The process has ended otherwise: that of the storage initializer if the model could not be fetched.

    Raises:
        CommandError: the port is in use.
    """
    _require_free(model.host, port)
    words = ["--served_model_name", model.name, "--http_port", str(port), "--log_level", "WARNING"]
    if value(model.flags, "host") is None:
        words += ["--host", LOOPBACK]
    with Child() as child:
        if isinstance(model.source, Path):
            words += ["--model_dir", str(model.source)]
        else:
            model.cache.mkdir(parents=True, exist_ok=True)
            child.start([sys.executable, "-m", "storage_initializer", str(model.source), str(model.cache)])
            if child.wait():
                yield child, False
                return
            words += ["--model_dir", str(model.cache), "--model_reference", str(model.source)]
        environment = {key: value for key, value in os.environ.items() if key not in SECRETS}
        child.start([sys.executable, "-m", "predictor", *words, *model.flags], environment)
        yield child, _wait_until_ready(child, model.url(port))


def free_port() -> int:
    """Return a TCP port of loopback that is free at the moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _require_free(host: str, port: int) -> None:
    """Raise if the port is in use: another server would answer in place of the one that is started."""
    with socket.socket() as probe, suppress(OSError):  # an address that cannot be used is the predictor's to report
        probe.settimeout(REQUEST_SECONDS)
        if probe.connect_ex((host, port)) == 0:
            raise CommandError(f"Port {port} is in use. Stop the server there, or choose another one with --port.")


def _wait_until_ready(child: Child, url: str) -> bool:
    """Show the phases of the start until the server is ready; false if it has ended."""
    with closing(StartDisplay()) as display:
        while child.is_running:
            status, body = _get(f"{url}/v2/health/ready")
            display.show("ready" if status == 200 else phase(body))
            if status == 200:
                return True
            time.sleep(POLL_SECONDS)
    return False


def phase(body: Mapping[str, Any]) -> str:
    """Return the phase of a start in the body of a readiness route; without one, the server has not opened its port."""
    message = str(body.get("error", "starting"))
    return message.rpartition(" is not ready: ")[2].removesuffix(".")


def _get(url: str) -> tuple[int, dict[str, Any]]:
    """Return status and body; status 0 without a response."""
    try:
        response = httpx2.get(url, timeout=REQUEST_SECONDS, trust_env=False)
        return response.status_code, response.json()
    except (httpx2.TransportError, ValueError):
        return 0, {}


def _print_addresses(url: str) -> None:
    _, models = _get(f"{url}/v1/models")
    names = ", ".join(model["id"] for model in models.get("data", ()))
    print(f"\n  {url}/    page to talk to the model")
    print(f"  {url}/v1  base URL of OpenAI clients; model {names}")
    print("  Stop with Ctrl-C.\n", flush=True)


def _print_hints(model: LocalModel, url: str) -> None:
    _, index = _get(f"{url}/v2/models")
    for name in index.get("models", ())[:1]:
        properties = _get(f"{url}/v2/models/{name}")[1].get("properties", {})
        for hint in hints(str(model.source), properties, model.flags):
            print(f"  Hint: {hint}\n", flush=True)
