import sys
from pathlib import Path

import pytest

from benchmarks import servers
from kserve_llm import bench
from kserve_llm.errors import BenchmarkError


def test_servers_peer_command_is_stopped(tiny_model: Path) -> None:
    command = f"{sys.executable} -m benchmarks.sequential --model_dir {{model_dir}} --port {{port}}"
    with servers.peer(command, tiny_model) as peer:
        assert bench.find("it", peer.url).model == peer.model
    with pytest.raises(BenchmarkError, match="lists no model"):
        bench.find("it", peer.url)


def test_servers_peer_that_fails_to_start_is_named(tiny_model: Path) -> None:
    with (
        pytest.raises(BenchmarkError, match="`false` did not start"),
        servers.peer("false", tiny_model),
    ):
        pytest.fail("it started")
