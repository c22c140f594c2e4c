"""The predictor as a process: start, failing start, signals, a dead step loop."""

import errno
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT
from predictor.entrypoints import kserve_server
from predictor.errors import PortInUse
from tests.predictor import servers
from tests.predictor.servers import HANG_SECONDS, OPENAI, PROTOCOLS, Call, Orders, ServerProcess, StreamReader

STREAMS = [OPENAI, servers.GENERATE_STREAM] * 4


def failed_start(*arguments: str) -> tuple[int, str]:
    """Exit code and last line of a predictor that cannot start."""
    command = [sys.executable, "-m", "predictor", "--http_port", str(processes.free_port()), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_process_with_an_unknown_flag_exits_2() -> None:
    code, line = failed_start("--modeldir", "/x")
    assert (code, line.startswith("error: Unknown flag: --modeldir")) == (2, True)
    assert "--model_dir" in line


def test_process_without_weights_exits_1(weights: Path) -> None:
    (weights / "model.safetensors").unlink()
    code, line = failed_start("--model_dir", str(weights))
    assert (code, str(weights) in line) == (1, True)
    assert line.startswith("error: ")
    assert "no weights as safetensors" in line


@pytest.mark.parametrize("setting", ["--http_port", "metrics_port"])
def test_bind_of_a_taken_port_names_the_setting(setting: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse) as raised:
            kserve_server.bind(port, setting)
    assert str(raised.value) == f"Port {port} cannot be opened: Address already in use. Choose another with {setting}."


def test_bind_address_of_loopback_is_not_reachable_at_another_one() -> None:
    with kserve_server.bind(processes.free_port(), host="127.0.0.1") as server, socket.socket() as client:
        assert client.connect_ex(("127.0.0.2", server.getsockname()[1])) == errno.ECONNREFUSED


def test_bind_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(PortInUse, match=r"or another address than 192\.0\.2\.1 with --host"):
        kserve_server.bind(processes.free_port(), host="192.0.2.1")


def test_process_opens_its_port_before_the_model_is_loaded(tmp_path: Path) -> None:
    started = time.monotonic()
    port = str(processes.free_port())
    status = tmp_path / ".status/demo--arithmetic/main"
    status.parent.mkdir(parents=True)
    status.write_text('{"error": "no such model.", "failed_at": "now"}')
    flags = ["--served_model_name", "demo", "--model_dir", str(tmp_path), "--http_port", port]
    flags += ["--model_reference", "hf://demo/arithmetic", "--snapshot_wait_seconds", "600"]
    process = processes.start(["predictor", *flags], stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG_SECONDS, trust_env=False) as client:
            server = ServerProcess(str(client.base_url), "demo", client, lambda: "", process)
            reason = (
                r"Model demo is not ready: waiting for the snapshot, \d+ of 600 s; nothing in staging, "
                r"no storage initializer holds a lease; the storage initializer failed at now: no such model\.$"
            )
            # Before it waits, it starts.
            server.wait_for(
                lambda: bool(re.match(reason, server.wait_for_status(503, "/v2/models/demo/ready").json()["error"]))
            )
            assert client.get("/v2/health/live").status_code == 200
            metrics = client.get("/metrics").text
            [imports] = re.findall(r'load_phase_seconds{.*phase="imports".*} (\S+)', metrics)
            assert 0 < float(imports) < time.monotonic() - started + 0.02, "a clock tick of tolerance"
            assert Call(server, servers.INFER, 1).post().status_code == 503
    finally:
        assert processes.stop(process) == 0


@contextmanager
def blocked_streams(server: ServerProcess, orders: Orders, tokens: int) -> Iterator[list[StreamReader]]:
    """Eight streams that have started and cannot finish before `orders.withdraw`; read to their end on exit."""
    streams = [StreamReader() for _ in STREAMS]
    with ThreadPoolExecutor(len(STREAMS)) as threads:
        orders.give("slow")
        readers = [
            threads.submit(stream.read, Call(server, protocol, tokens))
            for stream, protocol in zip(streams, STREAMS, strict=True)
        ]
        for stream in streams:
            assert stream.started.wait(HANG_SECONDS)
        orders.give("block")
        yield streams
        for reader in readers:
            reader.result(HANG_SECONDS)


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_process_signalled_finishes_streams_and_rejects_new_requests(sent: signal.Signals, tmp_path: Path) -> None:
    with servers.own_process(tmp_path) as (server, orders):
        whole = Call(server, OPENAI, 300).post().json()["choices"][0]["text"]
        with blocked_streams(server, orders, 300) as streams:
            server.process.send_signal(sent)
            ready = server.wait_for_status(503, "/v2/models/demo/ready")
            assert ready.json() == {"error": "Model demo is not ready: shutting down."}
            assert "retry-after" in ready.headers
            assert server.client.get("/v2/health/live").status_code == 200
            for protocol in PROTOCOLS:
                rejection = Call(server, protocol, 1).post()
                assert (rejection.status_code, int(rejection.headers["retry-after"]) > 0) == (503, True)
                assert "shutting down" in rejection.text
            orders.withdraw()
        assert [stream.text == whole for stream in streams] == [True] * 8
        assert {stream.finish_reason for stream in streams} == {"length"}
        assert {stream.last for stream in streams[::2]} == {"[DONE]"}
        assert server.process.wait(HANG_SECONDS) == 0
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_process_signalled_twice_aborts_streams_with_an_error(tmp_path: Path) -> None:
    with servers.own_process(tmp_path) as (server, orders):
        with blocked_streams(server, orders, 1000) as streams:
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_status(503, "/v2/health/ready")
            server.process.send_signal(signal.SIGTERM)
            server.wait_for(lambda: "aborting running requests" in server.log)
            orders.withdraw()
        for stream, protocol in zip(streams, STREAMS, strict=True):
            error = stream.last["error"]
            message = error["message"] if protocol == OPENAI else error
            assert message.startswith("The server stopped before")
            assert stream.finish_reason is None
        assert server.process.wait(HANG_SECONDS) == 0
    assert "Traceback" not in server.log


@pytest.mark.parametrize("phase", ["starting", "loading weights", "warming up", "ready"])
@pytest.mark.slow
def test_process_signalled_in_any_phase_of_the_start_exits_0(phase: str, tmp_path: Path) -> None:
    port = str(processes.free_port())
    flags = ["--served_model_name", "demo", "--model_dir", str(DEMO_MODEL), "--http_port", port]
    with (tmp_path / "log").open("w") as log:
        process = processes.start(["predictor", *flags], stderr=log)
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while time.monotonic() < deadline:
            try:
                response = httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", trust_env=False)
            except httpx.TransportError:
                continue
            if phase == "starting" or phase in response.text or response.is_success:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_SECONDS) == 0
    finally:
        processes.stop(process)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_process_with_a_dead_step_loop_is_not_live_and_returns_503(tmp_path: Path) -> None:
    with servers.own_process(tmp_path) as (server, orders):
        orders.give("fail")
        for _ in range(2):
            response = Call(server, OPENAI, 400).post()
            assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
            assert "Retry-After" in response.headers
        live = server.client.get("/v2/health/live")
        assert (live.status_code, "restarted" in live.json()["error"]) == (503, True)
        ready = server.client.get("/v2/models/demo/ready")
        assert (ready.status_code, "makes no progress" in ready.json()["error"]) == (503, True)
        assert processes.stop(server.process) == 0


@pytest.mark.slow
def test_process_with_a_hanging_step_is_not_live_until_it_ends(tmp_path: Path) -> None:
    with servers.own_process(tmp_path, "--step_timeout_seconds", "2") as (server, orders):
        orders.give("block")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(Call(server, OPENAI, 400).post)
            server.wait_for_status(503, "/v2/health/live")
            assert waiting.result(HANG_SECONDS).status_code == 503
        assert server.client.get("/v2/health/live").status_code == 503, "even if no client waits"
        orders.withdraw()
        server.wait_for_status(200, "/v2/health/live")
        assert Call(server, OPENAI, 400).post().status_code == 200
        orders.give("block")
        assert Call(server, OPENAI, 400).post().status_code == 503
        server.process.terminate()
        assert server.process.wait(HANG_SECONDS) == 0, "a step that hangs does not keep the process alive"
