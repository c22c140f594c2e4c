"""Two gloo ranks of the demo model: the answers of one, and an end of both when one fails."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from devtools import processes
from devtools.paths import DEMO_MODEL, ROOT
from tests.predictor import servers
from tests.predictor.servers import GENERATE_STREAM, HANG_SECONDS, OPENAI, Call, InProcessServer, Server, ServerProcess
from tests.predictor.servers import StreamReader as Reader
from tests.sizes import IS_NIGHTLY

pytestmark = pytest.mark.slow

FLAGS = ["--tensor_parallel_size", "2"]
SMALL = ["--kv_cache_tokens", "1024", "--max_num_seqs", "4", "--max_queued_requests", "4"]
STEP_SECONDS = 4.0
LONG_PROMPT = "What is 17 + 25? " * 40
"""Of more than one page of the KV cache."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with servers.own_process(tmp_path_factory.mktemp("ranks"), *FLAGS, *SMALL) as (server, _):
        yield server


def follower(server: ServerProcess) -> psutil.Process:
    [process] = [child for child in psutil.Process(server.process.pid).children() if "follower" in str(child.cmdline())]
    return process


def completion(server: Server, **body: Any) -> dict[str, Any]:
    response = server.client.post("/v1/completions", json={"model": server.model_name, "max_tokens": 24, **body})
    assert response.status_code == 200, response.text
    return {"choices": response.json()["choices"], "usage": response.json()["usage"]}


SEEDED = {"temperature": 1.5, "seed": 7, "ignore_eos": True}
SOAK_THOUSANDS = int(os.environ.get("SOAK_THOUSANDS", "1"))
"""Thousands of requests after which no rank may have grown."""
PROTOCOL_TESTS = ("test_clients.py", "test_scoring.py", "test_streaming.py", "test_structured_output.py")
MORE_PROTOCOL_TESTS = (
    "routes",
    "test_anthropic_client.py",
    "test_fields.py",
    "test_openai_responses.py",
    "test_tool_calls.py",
)
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": "17+25=", "temperature": 0},
    "seeded": {"prompt": "17+25=", **SEEDED},
    "several": {"prompt": ["1+1=", "9+9=", "3+4="], "n": 2, **SEEDED},
    "log probabilities": {"prompt": "17+25=", "logprobs": 3, "temperature": 0},
    "prompt log probabilities": {"prompt": "17+25=", "logprobs": 2, "echo": True, "temperature": 0},
    "grammar": {
        "prompt": "17+25=",
        "structured_outputs": {"regex": "[0-9]{3}-[a-z]{2}"},
        "temperature": 1.5,
        "seed": 7,
    },
    "penalties": {"prompt": "17+25=", "repetition_penalty": 1.3, "presence_penalty": 0.5, "temperature": 0},
    "a shared prefix": {"prompt": LONG_PROMPT, "temperature": 0},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_ranks_answers_are_those_of_one(name: str, server: InProcessServer, pair: ServerProcess) -> None:
    for _ in range(2):
        assert rounded(completion(pair, **REQUESTS[name])) == rounded(completion(server, **REQUESTS[name]))


def test_ranks_with_an_int8_cache_answer_as_one(server: InProcessServer, tmp_path: Path) -> None:
    with servers.own_process(tmp_path, *FLAGS, *SMALL, "--kv_cache_dtype", "int8") as (pair, _):
        assert "KV cache of 1024 tokens in int8" in pair.read_log()
        for name in ("greedy", "a shared prefix"):
            assert completion(pair, **REQUESTS[name]) == completion(server, **REQUESTS[name])


def rounded(value: Any) -> Any:
    """A response with log probabilities of the precision in which the order of a sum does not show."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def test_ranks_fill_their_cache_and_queue(server: InProcessServer, pair: ServerProcess) -> None:
    """Four sequences fill the cache several times over, and four more wait; a further one is rejected."""
    whole = completion(server, prompt="1+1=", temperature=0, ignore_eos=True, max_tokens=300)["choices"][0]["text"]
    calls = [Call(pair, protocol, 300) for protocol in (OPENAI, GENERATE_STREAM) * 4]
    with ThreadPoolExecutor(len(calls)) as threads:
        readers = [Reader() for _ in calls]
        running = [threads.submit(reader.read, call) for reader, call in zip(readers, calls, strict=True)]
        pair.wait_for_metrics(num_requests_running=4, num_requests_waiting=4)
        assert Call(pair, OPENAI, 1).post().status_code == 429
        for reader in running:
            reader.result(HANG_SECONDS)
    assert {reader.text for reader in readers} == {whole}
    pair.wait_until_idle()


def test_ranks_forget_cancelled_and_late_sequences(pair: ServerProcess) -> None:
    body = Call(pair, OPENAI, 900).body
    pair.disconnect_during(
        "/v1/completions", {**body, "echo": True, "logprobs": 1, "prompt": LONG_PROMPT}, num_requests_running=1
    )
    pair.wait_until_idle()
    late = Call(pair, OPENAI, 900).post(headers={"x-request-timeout-seconds": "0.2"})
    assert late.status_code == 504
    pair.wait_until_idle()
    assert completion(pair, prompt="1+1=", temperature=0)["usage"]["completion_tokens"] > 0


def test_ranks_are_in_the_metadata_and_the_log(pair: ServerProcess) -> None:
    properties = pair.client.get("/v2/models/demo").json()["properties"]
    assert properties["tensor_parallel_size"] == "2"
    assert re.search(r"INFO predictor\.\S+ \[rank 1\]: rank 1 follows rank 0", pair.log)
    assert pair.metric("load_phase_seconds", phase="ranks") > 0
    pid = follower(pair).pid
    connections = [connection for connection in psutil.net_connections("inet") if connection.pid == pid]
    addresses = {connection.laddr[0] for connection in connections if connection.laddr}
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def streaming(server: ServerProcess, threads: ThreadPoolExecutor, count: int, tokens: int) -> list[Reader]:
    """Readers of running streams."""
    readers = [Reader() for _ in range(count)]
    for reader, protocol in zip(readers, (OPENAI, GENERATE_STREAM) * count, strict=False):
        threads.submit(reader.read, Call(server, protocol, tokens))
    for reader in readers:
        assert reader.started.wait(HANG_SECONDS)
    return readers


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_ranks_end_with_an_error_when_one_fails(sent: signal.Signals, tmp_path: Path) -> None:
    # The end of a process is noticed at once, not when a step takes too long.
    step_seconds = 2 * HANG_SECONDS if sent is signal.SIGKILL else STEP_SECONDS
    with servers.own_process(tmp_path, *FLAGS, "--step_timeout_seconds", str(step_seconds)) as (server, orders):
        orders.give("slow")
        rank = follower(server)
        with ThreadPoolExecutor(4) as threads:
            readers = streaming(server, threads, 4, 900)
            rank.send_signal(sent)
        assert server.process.wait(HANG_SECONDS) == 1
        assert not rank.is_running()
        for reader in readers:
            assert "error" in reader.last
    how = "was killed by SIGKILL" if sent is signal.SIGKILL else "is stopped"
    assert f"error: Rank 1 (process {rank.pid}) {how}" in server.log.splitlines()[-1]


def test_ranks_end_when_rank_0_is_killed(tmp_path: Path) -> None:
    with servers.own_process(tmp_path, *FLAGS) as (server, _):
        rank = follower(server)
        server.process.kill()
        rank.wait(HANG_SECONDS)


def test_ranks_signalled_finish_their_streams(tmp_path: Path) -> None:
    """A terminal and some supervisors signal every process."""
    with servers.own_process(tmp_path, *FLAGS) as (server, orders):
        whole = Call(server, OPENAI, 100).post().json()["choices"][0]["text"]
        orders.give("slow")
        rank = follower(server)
        with ThreadPoolExecutor(4) as threads:
            readers = streaming(server, threads, 4, 100)
            for number in (signal.SIGTERM, signal.SIGINT):
                rank.send_signal(number)
            server.process.terminate()
            server.wait_for_status(503, "/v2/health/ready")
            orders.withdraw()
        assert {reader.finish_reason for reader in readers} == {"length"}
        assert {reader.text for reader in readers} == {whole}
        assert server.process.wait(HANG_SECONDS) == 0
        assert not rank.is_running()
    assert "Traceback" not in server.log


def test_ranks_end_when_one_is_killed_before_it_has_joined(tmp_path: Path) -> None:
    flags = ["--model_dir", str(DEMO_MODEL), "--http_port", str(processes.free_port()), *FLAGS]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = processes.start(["predictor", *flags], stderr=stderr)
    try:
        while not (children := psutil.Process(process.pid).children()):
            assert process.poll() is None
        children[0].kill()
        assert process.wait(HANG_SECONDS) == 1
    finally:
        processes.stop(process)
    assert log.read_text().splitlines()[-1].startswith(f"error: Rank 1 (process {children[0].pid}) was killed")


def test_ranks_signalled_while_loading_end_and_leave_no_process(tmp_path: Path) -> None:
    flags = ["--model_dir", str(DEMO_MODEL), "--http_port", str(processes.free_port()), *FLAGS]
    with (tmp_path / "log").open("w") as stderr:
        process = processes.start(["predictor", *flags], stderr=stderr)
    try:
        while "listening on HTTP port" not in (tmp_path / "log").read_text():
            assert process.poll() is None
        [rank] = psutil.Process(process.pid).children()
        process.terminate()
        assert process.wait(HANG_SECONDS) == 0
    finally:
        processes.stop(process)
    assert not rank.is_running()


def test_ranks_more_than_kv_heads_are_refused() -> None:
    command = [sys.executable, "-m", "predictor", "--model_dir", str(DEMO_MODEL), "--tensor_parallel_size", "3"]
    done = subprocess.run(
        [*command, "--http_port", str(processes.free_port())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "4 attention heads and 2 KV heads, which 3 ranks cannot share equally" in last


def resident(server: ServerProcess) -> list[int]:
    """Resident memory of both ranks, in MiB."""
    return [process.memory_info().rss >> 20 for process in (psutil.Process(server.process.pid), follower(server))]


@pytest.mark.serial
def test_ranks_do_not_grow_with_requests(pair: ServerProcess) -> None:
    async def send(http: httpx.AsyncClient, first: int) -> None:
        for number in range(first, first + 1000, 8):
            call = Call(pair, OPENAI, 4, f"{number}+1=")
            assert (await http.post(call.path, json=call.body)).status_code == 200

    async def send_thousands(count: int) -> None:
        async with httpx.AsyncClient(base_url=pair.url, timeout=HANG_SECONDS, trust_env=False) as http:
            for _ in range(count):
                await asyncio.gather(*(send(http, first) for first in range(8)))

    asyncio.run(send_thousands(1))
    before = resident(pair)
    asyncio.run(send_thousands(SOAK_THOUSANDS))
    growth = [after - rank for after, rank in zip(resident(pair), before, strict=True)]
    assert max(growth) < 32, growth


def latency(target: Server, tokens: int) -> float:
    """Time of a completion on an idle server: the lower quartile, in seconds."""
    times = []
    for _ in range(12):
        time.sleep(0.15)
        started = time.perf_counter()
        Call(target, OPENAI, tokens).post().raise_for_status()
        times.append(time.perf_counter() - started)
    return sorted(times)[3]


@pytest.mark.serial
def test_ranks_answer_an_idle_server_without_a_wait_of_their_own(server: InProcessServer, pair: ServerProcess) -> None:
    """A follower that slept while idle, as transformers' do, would add up to 100 ms.

    A first step has the collective operations of every step, and those that distribute the sequence.
    """
    together = latency(pair, 1)
    step = (latency(pair, 31) - together) / 30
    assert together < 1.3 * latency(server, 1) + 2 * step


def test_ranks_pass_the_tests_of_the_protocols() -> None:
    """The tests of what is generated, except those of other models and of failing steps."""
    variables = {**os.environ, "TEST_TENSOR_PARALLEL_SIZE": "2"}
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not serial and not gpu"]
    folder = "tests/predictor/entrypoints/http"
    files = [f"{folder}/{name}" for name in (*PROTOCOL_TESTS, *(MORE_PROTOCOL_TESTS if IS_NIGHTLY else ()))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > (200 if IS_NIGHTLY else 30)
