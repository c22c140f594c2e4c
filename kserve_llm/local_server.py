"""A model of the Hub, or of a directory, served on this machine by one command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from snapshot_format.reference import HubReference, ModelReference

POLL_SECONDS = 0.2
REQUEST_SECONDS = 5
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables that the storage initializer may need, and a server never does."""
INT8_FLAGS = ("avx512_vnni", "amx_int8")
"""Flags of a CPU with the kernels for 8 bits, in /proc/cpuinfo."""


def serve(source: Path | ModelReference, cache: Path, port: int, flags: Sequence[str]) -> int:
    """Fetch and verify a model, serve it until a signal, and return the exit code.

    Args:
        source: directory of a model, or a reference to fetch.
        cache: volume of fetched models.
        port: HTTP port.
        flags: of the predictor.
    """
    name = source.name if isinstance(source, Path) else _short_name(source)
    words = ["--served_model_name", name, "--http_port", str(port), "--log_level", "WARNING"]
    if isinstance(source, Path):
        words += ["--model_dir", str(source)]
    else:
        cache.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run([sys.executable, "-m", "storage_initializer", str(source), str(cache)])
        if fetched.returncode:
            return fetched.returncode
        words += ["--model_dir", str(cache), "--model_reference", str(source)]
    environment = {key: value for key, value in os.environ.items() if key not in SECRETS}
    # In a session of its own, so that Ctrl-C reaches it once, from here.
    command = [sys.executable, "-m", "predictor", *words, *flags]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    with _forwarding_signals(process):
        url = f"http://127.0.0.1:{port}"
        if _wait_until_ready(process, url):
            _print_addresses(url)
            _print_hint(url)
        return process.wait()


def _short_name(reference: ModelReference) -> str:
    return reference.model if isinstance(reference, HubReference) else reference.path.name


@contextmanager
def _forwarding_signals(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    def stop(*_: object) -> None:
        process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str) -> bool:
    """Show the phase of the load until the server is ready; false if it has exited."""
    is_live, shown = sys.stderr.isatty(), ""
    while process.poll() is None:
        status, body = _get(f"{url}/v2/health/ready")
        error = str(body.get("error", "starting"))
        phase = "ready" if status == 200 else error.rpartition(" is not ready: ")[2]
        if phase != shown:
            print(f"\r{phase}\x1b[K" if is_live else phase, end="" if is_live else "\n", file=sys.stderr, flush=True)
            shown = phase
        if status == 200:
            if is_live:
                print(file=sys.stderr)
            return True
        time.sleep(POLL_SECONDS)
    return False


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


def _print_hint(url: str) -> None:
    """Print which quantization would be faster, if none was chosen and this CPU has kernels for it."""
    _, index = _get(f"{url}/v2/models")
    for name in index.get("models", ())[:1]:
        properties = _get(f"{url}/v2/models/{name}")[1].get("properties", {})
        is_plain = (properties.get("device"), properties.get("quantization")) == ("cpu", "none")
        if is_plain and any(flag in _cpu_flags() for flag in INT8_FLAGS):
            print("  Hint: --quantization 8bit takes half the memory or less, and is faster on this CPU.\n")


def _cpu_flags() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return []
