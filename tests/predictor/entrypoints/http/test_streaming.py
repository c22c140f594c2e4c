"""Deadlines and disconnects of requests whose model is blocked, so that no test depends on its speed."""

import json
from collections.abc import Iterator

import pytest

from tests.predictor import servers
from tests.predictor.servers import GENERATE_STREAM, OPENAI, PROTOCOLS, Call, InProcessServer, StreamReader

TOKENS = 900
DEADLINE = {"x-request-timeout-seconds": "0.5"}


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    with servers.in_process(model_name="streaming") as running:
        yield running


@pytest.fixture(autouse=True)
def opened(server: InProcessServer) -> Iterator[None]:
    yield
    server.hold.open()
    server.wait_until_idle()


def test_request_past_the_clients_deadline_returns_504_with_the_partial_text(server: InProcessServer) -> None:
    whole = Call(server, OPENAI, TOKENS).post().json()["choices"][0]["text"]
    timed_out = server.metric("request_finished_total", finished_reason="deadline")
    server.hold.close(after=5)
    response = Call(server, OPENAI, TOKENS, more={"n": 2}).post(headers=DEADLINE)
    assert response.status_code == 504
    error = response.json()["error"]
    assert error["type"] == "timeout"
    # Without a single token before the deadline, there is no `partial`.
    partial = error.get("partial", [])
    assert all(whole.startswith(text) and len(whole) > len(text) for text in partial)
    for protocol in PROTOCOLS[1:]:
        response = Call(server, protocol, TOKENS).post(headers=DEADLINE)
        assert (response.status_code, response.json()["error"]) == (504, error["message"])
    assert server.metric("request_finished_total", finished_reason="deadline") == timed_out + 4


@pytest.mark.parametrize("protocol", [OPENAI, GENERATE_STREAM])
def test_stream_past_the_clients_deadline_ends_with_an_error_event(server: InProcessServer, protocol: str) -> None:
    server.hold.close(after=5)
    stream = StreamReader().read(Call(server, protocol, TOKENS), headers=DEADLINE)
    assert stream.finish_reason is None
    assert "timed out" in json.dumps(stream.last["error"])


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", "inf"])
def test_request_with_an_invalid_deadline_returns_400(server: InProcessServer, seconds: str) -> None:
    response = Call(server, OPENAI, 1).post(headers={"x-request-timeout-seconds": seconds})
    assert response.status_code == 400
    assert "x-request-timeout-seconds" in response.json()["error"]["message"]


@pytest.mark.parametrize("protocol", [OPENAI, GENERATE_STREAM])
def test_stream_of_a_disconnected_client_is_cancelled(server: InProcessServer, protocol: str) -> None:
    cancelled = server.metric("request_finished_total", finished_reason="cancelled")
    steps = server.metric("engine_steps_total")
    server.hold.close(after=5)
    call = Call(server, protocol, TOKENS).streamed()
    with server.client.stream("POST", call.path, json=call.body) as response:
        assert next(response.iter_lines()).startswith("data: ")
    server.wait_for_metric("request_finished_total", cancelled + 1, finished_reason="cancelled")
    server.hold.open()
    server.wait_until_idle()
    assert server.metric("engine_steps_total") - steps < 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_request_of_a_disconnected_client_is_cancelled(server: InProcessServer, protocol: str) -> None:
    cancelled = server.metric("request_finished_total", finished_reason="cancelled")
    steps = server.metric("engine_steps_total")
    server.hold.close(after=5)
    call = Call(server, protocol, TOKENS)
    server.disconnect_during(call.path, call.body, num_requests_running=1)
    server.wait_for_metric("request_finished_total", cancelled + 1, finished_reason="cancelled")
    server.hold.open()
    server.wait_until_idle()
    assert server.metric("engine_steps_total") - steps < 20
