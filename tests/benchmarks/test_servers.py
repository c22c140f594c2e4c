import sys
from pathlib import Path

import pytest

from benchmarks import servers


def test_servers_peer_command_is_stopped(tiny_model: Path) -> None:
    command = f"{sys.executable} -m benchmarks.sequential --model_dir {{model_dir}} --port {{port}}"
    with servers.peer(command, tiny_model) as peer:
        assert servers.find("it", peer.url).model == peer.model
    with pytest.raises(servers.BenchmarkError, match="lists no model"):
        servers.find("it", peer.url)


def test_servers_peer_that_fails_to_start_is_named(tiny_model: Path) -> None:
    with (
        pytest.raises(servers.BenchmarkError, match="`false` did not start"),
        servers.peer("false", tiny_model),
    ):
        pytest.fail("it started")
