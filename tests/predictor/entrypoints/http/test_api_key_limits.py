"""Several API keys with weights and limits on one server, over HTTP and gRPC."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service

from devtools.paths import ROOT
from tests.predictor import servers
from tests.predictor.servers import GENERATE, INFER, OPENAI, Call, InProcessServer

PLACES, CAPACITY = 8, 72
LIMITS = {
    "greedy": "",
    "modest": "",
    "http": "requests_per_minute=3",
    "rpc": "requests_per_minute=1",
    "tokens": "tokens_per_minute=12",
    "single": "concurrent_sequences=1",
    "reloaded": "requests_per_minute=1",
}


def key(name: str) -> str:
    return f"{name}-key-0123456789"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key(name)}"}


def lines(**changes: str) -> str:
    return "".join(f"{name}:{key(name)} {options}\n" for name, options in (LIMITS | changes).items())


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("limits") / "keys"
    file.write_text(lines())
    return file


@pytest.fixture(scope="module")
def server(keys_file: Path) -> Iterator[InProcessServer]:
    flags = ["--max_num_seqs", str(PLACES), "--max_queued_requests", str(CAPACITY - PLACES), "--enable_grpc"]
    with servers.in_process(*flags, model_name="limits", keys=keys_file, headers=bearer("modest")) as running:
        yield running


def open_stream(stack: ExitStack, server: InProcessServer, name: str, **more: Any) -> httpx.Response:
    call = Call(server, OPENAI, 400, more=more).streamed()
    options: dict[str, Any] = {"json": call.body, "headers": bearer(name)}
    return stack.enter_context(server.client.stream("POST", call.path, **options))


def wait_for_sequences(server: InProcessServer, name: str, count: int) -> None:
    server.wait_for_metric("key_num_sequences", count, key=name)


def test_one_request_next_to_64_of_another_key_starts_within_two_steps(server: InProcessServer) -> None:
    server.hold.close()
    with ExitStack() as stack:
        for _ in range(64):
            assert open_stream(stack, server, "greedy").status_code == 200
        wait_for_sequences(server, "greedy", 64)
        assert server.hold.blocked.wait(servers.HANG_SECONDS)
        server.hold.step(3)
        assert server.hold.blocked.wait(servers.HANG_SECONDS)
        assert server.metric("num_requests_running") == PLACES
        response = open_stream(stack, server, "modest")
        wait_for_sequences(server, "modest", 1)
        before = server.service._engine.steps  # type: ignore[union-attr]
        server.hold.step(2)
        events = response.iter_lines()
        assert next(line for line in events if '"text"' in line)
        assert server.hold.blocked.wait(servers.HANG_SECONDS)
        assert server.service._engine.steps - before == 2  # type: ignore[union-attr]
        server.wait_for_metrics(num_requests_running=PLACES, num_requests_waiting=65 - PLACES)
        server.hold.open()
    server.wait_until_idle()


def test_queue_filled_by_one_key_leaves_a_place_for_another(server: InProcessServer) -> None:
    rejected = server.metric("key_request_rejected_total", key="greedy", limit="queue")
    server.hold.close()
    with ExitStack() as stack:
        assert open_stream(stack, server, "greedy", n=CAPACITY).status_code == 200
        wait_for_sequences(server, "greedy", CAPACITY)
        refused = Call(server, OPENAI, 1).post(headers=bearer("greedy"))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert open_stream(stack, server, "modest").status_code == 200
        server.hold.open()
    server.wait_until_idle()
    assert server.metric("key_request_rejected_total", key="greedy", limit="queue") == rejected + 1


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "17"}), ("/detokenize", {"tokens": [5]})],
    ids=["tokenize", "detokenize"],
)
def test_tokenization_beyond_a_limit_is_counted_as_rejected(
    server: InProcessServer, path: str, body: dict[str, Any]
) -> None:
    labels = {"key": "single", "limit": "concurrent_sequences"}
    rejected = server.metric("key_request_rejected_total", **labels)
    server.hold.close()
    with ExitStack() as stack:
        assert open_stream(stack, server, "single").status_code == 200
        assert server.client.post(path, json=body, headers=bearer("single")).status_code == 429
        server.hold.open()
    server.wait_until_idle()
    assert server.metric("key_request_rejected_total", **labels) == rejected + 1


def test_waiting_requests_that_a_proxy_gives_up_free_their_places(server: InProcessServer) -> None:
    """Although the engine makes no step meanwhile."""
    server.hold.close()
    call = Call(server, OPENAI, 400, more={"n": 9})

    def give_up(_: int) -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}{call.path}", json=call.body, headers=bearer("greedy"), timeout=0.5, trust_env=False
            )

    with ThreadPoolExecutor(CAPACITY // 9) as threads:
        list(threads.map(give_up, range(CAPACITY // 9)))
    wait_for_sequences(server, "greedy", 0)
    with ExitStack() as stack:
        assert open_stream(stack, server, "modest", n=CAPACITY).status_code == 200
        server.hold.open()
    server.wait_until_idle()


def test_requests_beyond_the_limit_of_a_minute_return_429_in_every_protocol(server: InProcessServer) -> None:
    for _ in range(3):
        assert Call(server, OPENAI, 1).post(headers=bearer("http")).status_code == 200
    message = "API key http has used its 3 requests per minute. Retry in "
    for protocol in (OPENAI, INFER, GENERATE):
        response = Call(server, protocol, 1).post(headers=bearer("http"))
        assert response.status_code == 429
        assert 0 < int(response.headers["retry-after"]) <= 20
        content = response.json()["error"]
        if protocol == OPENAI:
            assert (content["type"], content["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            content = content["message"]
        assert content.startswith(message)
    assert server.metric("key_requests_total", key="http") == 3
    assert server.metric("key_request_rejected_total", key="http", limit="requests_per_minute") == 3
    assert Call(server, OPENAI, 1).post().status_code == 200, "another key"
    assert server.client.get("/v1/models", headers=bearer("http")).status_code == 200, "no generation"


def test_request_after_the_tokens_of_a_minute_returns_429(server: InProcessServer) -> None:
    response = Call(server, OPENAI, 20).post(headers=bearer("tokens"))
    assert response.status_code == 200, "accepted while any token is left, and not cut off"
    used = response.json()["usage"]["total_tokens"]
    assert server.metric("key_generation_tokens_total", key="tokens") == 20
    assert server.metric("key_prompt_tokens_total", key="tokens") == used - 20
    refused = Call(server, OPENAI, 1).post(headers=bearer("tokens"))
    assert refused.status_code == 429
    assert "API key tokens has used its 12 tokens per minute." in refused.text
    seconds = (used - 12 + 1) * 60 / 12
    assert seconds - 30 < int(refused.headers["retry-after"]) <= seconds


def test_sequences_beyond_the_limit_of_a_key_return_429_until_one_ends(server: InProcessServer) -> None:
    server.hold.close()
    with ExitStack() as stack:
        open_stream(stack, server, "single")
        wait_for_sequences(server, "single", 1)
        refused = Call(server, OPENAI, 1).post(headers=bearer("single"))
        assert refused.status_code == 429
        assert "API key single has 1 of its 1 concurrent sequences. Retry later." in refused.text
    wait_for_sequences(server, "single", 0)
    server.hold.open()
    assert Call(server, OPENAI, 1).post(headers=bearer("single")).status_code == 200
    too_many = Call(server, OPENAI, 1, more={"n": 2}).post(headers=bearer("single"))
    assert (too_many.status_code, "API key single allows 1 at a time" in too_many.text) == (400, True)


def test_grpc_call_beyond_the_limit_is_resource_exhausted_with_retry_after(server: InProcessServer) -> None:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"1+1="]}}
    request = messages.ModelInferRequest(
        model_name="limits", inputs=[tensor], parameters={"priority": messages.InferParameter(int64_param=-1)}
    )
    metadata = (("authorization", f"Bearer {key('rpc')}"),)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = service.GRPCInferenceServiceStub(channel)
        _, call = stub.ModelInfer.with_call(request, metadata=metadata)
        assert not call.trailing_metadata(), "priority is a known parameter"
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(request, metadata=metadata)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "API key rpc has used its 1 requests per minute" in raised.value.details()
    assert 0 < int(dict(raised.value.trailing_metadata())["retry-after"]) <= 60


def test_changed_limit_holds_after_the_file_is_read_again(server: InProcessServer, keys_file: Path) -> None:
    def status() -> int:
        return Call(server, OPENAI, 1).post(headers=bearer("reloaded")).status_code

    assert [status(), status()] == [200, 429]
    keys_file.write_text(lines(reloaded=""))
    server.wait_for(lambda: status() == 200)


def test_metrics_and_log_have_names_of_keys_only(server: InProcessServer) -> None:
    assert Call(server, OPENAI, 1).post().status_code == 200
    text = server.client.get("/metrics").text
    samples = re.findall(r"^kserve_llm_(key_\w+){", text, re.MULTILINE)
    names = {name.removesuffix("_count").removesuffix("_sum") for name in samples}
    page = (ROOT / "docs/how-to/api-keys.md").read_text().partition("| Metric by key |")[2].partition("\n\n")[0]
    assert {name for name in names if not name.endswith("_created")} == set(re.findall("`(key_[a-z_]+)`", page))
    assert not any(key(name) in text + server.log for name in LIMITS)
