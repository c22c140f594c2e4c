"""Where a model of this machine is served, and the phases of its start."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_llm import local_server
from kserve_llm.errors import CommandError
from kserve_llm.local_server import LocalModel
from predictor.entrypoints.http.routes import health
from predictor.errors import ModelNotReady


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ([], "http://127.0.0.1:8080"),
        (["--dtype", "float32"], "http://127.0.0.1:8080"),
        (["--host", "0.0.0.0"], "http://127.0.0.1:8080"),
        (["--host=192.0.2.1"], "http://192.0.2.1:8080"),
        (["--host", "192.0.2.1", "--dtype", "float32"], "http://192.0.2.1:8080"),
    ],
)
def test_url_is_of_this_machine_unless_another_address_is_chosen(flags: list[str], url: str) -> None:
    assert LocalModel(Path("model"), Path("cache"), flags).url(8080) == url


def test_port_is_in_use_at_the_address_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "Child", None)
    with socket.create_server(("127.0.0.2", 0)) as server:
        port = server.getsockname()[1]
        model = LocalModel(Path("model"), Path("cache"), ["--host", "127.0.0.2"])
        with pytest.raises(CommandError, match=f"Port {port} is in use"), local_server.running(model, port):
            pass


@pytest.mark.parametrize("reason", ["starting", "loading weights, 45 %", "waiting for the snapshot, 12 s"])
def test_phase_is_the_reason_of_the_readiness_route(reason: str) -> None:
    service: Any = SimpleNamespace(
        accepts_requests=False,
        models=SimpleNamespace(default="model"),
        not_ready_reason=reason,
        retry_after_seconds=None,
    )
    with pytest.raises(ModelNotReady) as raised:
        health.require_ready(service)
    assert local_server.phase({"error": str(raised.value)}) == reason
