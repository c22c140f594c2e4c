"""The application of one service: limits, API keys, request log, admin routes; and two applications in one process."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from predictor import settings
from predictor.entrypoints.http.app import create_app
from predictor.generation.service import LLMService
from tests.predictor import servers
from tests.predictor.servers import OPENAI, PROTOCOLS, Call, InProcessServer

pytestmark = pytest.mark.xdist_group("engine")

KEY, OTHER_KEY = "alices-key-0123456789", "bobs-key-9876543210"
PROMPT = "xylophone"


# Two applications in one process


@pytest.fixture(scope="module")
def two_servers() -> Iterator[tuple[InProcessServer, InProcessServer]]:
    with (
        servers.in_process(model_name="first") as first,
        servers.in_process("--dtype", "bfloat16", model_name="second") as second,
    ):
        yield first, second


def test_apps_of_two_services_answer_with_their_own_models(two_servers: tuple[InProcessServer, ...]) -> None:
    for server, other in zip(two_servers, reversed(two_servers), strict=True):
        response = Call(server, servers.GENERATE, 4).post().json()
        assert response["model_name"] == server.model_name
        assert server.client.get("/v1/models").json()["models"] == [server.model_name]
        assert server.client.get(f"/v2/models/{other.model_name}").status_code == 404
    dtypes = [server.client.get(f"/v2/models/{server.model_name}").json()["properties"] for server in two_servers]
    assert [properties["dtype"] for properties in dtypes] == ["float32", "bfloat16"]


def test_metrics_of_two_services_have_their_own_labels(two_servers: tuple[InProcessServer, ...]) -> None:
    first, second = two_servers
    before = second.metric("generation_tokens_total")
    counted = first.metric("generation_tokens_total")
    assert Call(first, OPENAI, 5).post().status_code == 200
    first.wait_until_idle()
    assert first.metric("generation_tokens_total") == counted + 5
    assert second.metric("generation_tokens_total") == before
    assert first.metric("model_info", dtype="float32") == second.metric("model_info", dtype="bfloat16") == 1


def test_create_app_returns_a_new_app_that_may_still_be_loading() -> None:
    parsed = settings.read(["--served_model_name", "loading", "--model_dir", "/nowhere"])
    service = LLMService(parsed)
    apps = [create_app(service, parsed), create_app(service, parsed)]
    assert apps[0] is not apps[1]

    async def get(path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(apps[0]), base_url="http://app") as http:
            return await http.get(path)

    assert asyncio.run(get("/v2/health/live")).status_code == 200
    response = asyncio.run(get("/v2/models/loading/ready"))
    assert (response.status_code, response.json()) == (503, {"error": "Model loading is not ready: starting."})


# Limits, API keys, logs


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("app") / "keys"
    file.write_text(f"alice:{KEY}\n")
    return file


@pytest.fixture(scope="module")
def limited(keys_file: Path) -> Iterator[InProcessServer]:
    flags = ["--max_num_seqs", "2", "--max_queued_requests", "2", "--max_request_bytes", "5000"]
    headers = {"Authorization": f"Bearer {KEY}"}
    with servers.in_process(*flags, model_name="limited", keys=keys_file, headers=headers) as running:
        yield running


def log_lines(server: InProcessServer, request_id: str) -> list[dict[str, Any]]:
    """Log lines of a request; the last one is written after the response."""

    def read() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in server.log.splitlines()]
        return [line for line in lines if line["request_id"] == request_id]

    server.wait_for(lambda: any("status" in line for line in read()))
    return read()


def test_request_beyond_the_queue_limit_returns_429(limited: InProcessServer) -> None:
    rejected = limited.metric("request_rejected_total")
    limited.hold.delay_seconds = 0.02
    with ExitStack() as stack:
        for protocol in (OPENAI, servers.GENERATE_STREAM) * 2:
            call = Call(limited, protocol, 900).streamed()
            response = stack.enter_context(limited.client.stream("POST", call.path, json=call.body))
            assert response.status_code == 200
        limited.wait_for_metrics(num_requests_running=2, num_requests_waiting=2)
        limited.hold.close()
        responses = {protocol: Call(limited, protocol, 900).post() for protocol in PROTOCOLS}
        assert limited.metric("num_requests_running") == 2
    limited.hold.open()
    assert {response.status_code for response in responses.values()} == {429}
    assert all(int(response.headers["retry-after"]) > 0 for response in responses.values())
    error = responses[OPENAI].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    for protocol in PROTOCOLS[1:]:
        assert responses[protocol].json() == {"error": error["message"]}
    assert limited.metric("request_rejected_total") == rejected + 3
    limited.wait_until_idle()
    assert Call(limited, OPENAI, 1).post().status_code == 200


def test_request_with_more_sequences_than_the_limit_returns_400(limited: InProcessServer) -> None:
    response = Call(limited, OPENAI, 1, more={"n": 5}).post()
    assert response.status_code == 400


def test_request_with_a_body_beyond_the_limit_returns_413(limited: InProcessServer) -> None:
    for protocol in PROTOCOLS:
        response = Call(limited, protocol, 1, prompt="1" * 5000).post()
        assert response.status_code == 413
        assert "--max_request_bytes" in response.text
    assert Call(limited, OPENAI, 1).post().status_code == 200


def test_request_without_an_api_key_returns_401_except_for_probes(limited: InProcessServer) -> None:
    with httpx.Client(base_url=limited.url, timeout=60, trust_env=False) as anonymous:
        predict = "/v1/models/limited:predict"
        for path in (predict, *(Call(limited, protocol, 1).path for protocol in PROTOCOLS)):
            response = anonymous.post(path, json=Call(limited, OPENAI, 1).body)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/", "/health", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/limited/ready"):
            assert anonymous.get(path).status_code == 200, path
        assert anonymous.get("/v1/models").status_code == 401


def test_request_with_an_api_key_is_logged_with_its_name_only(limited: InProcessServer) -> None:
    assert Call(limited, OPENAI, 1).post(headers={"x-request-id": "by-alice"}).status_code == 200
    [line] = log_lines(limited, "by-alice")
    assert line["key"] == "alice"
    assert KEY not in limited.log


def test_api_keys_are_reloaded_when_the_file_changes(limited: InProcessServer, keys_file: Path) -> None:
    bob = {"Authorization": f"Bearer {OTHER_KEY}"}
    assert limited.client.get("/v1/models", headers=bob).status_code == 401
    keys_file.write_text(f"alice:{KEY}\nbob:{OTHER_KEY}\n")
    limited.wait_for_status(200, "/v1/models", headers=bob)
    keys_file.write_text(f"alice:{KEY}\n")
    limited.wait_for_status(401, "/v1/models", headers=bob)
    assert limited.client.get("/v1/models").status_code == 200


def test_request_is_logged_in_one_line_without_its_prompt(limited: InProcessServer) -> None:
    headers = {"x-request-id": "mine", "x-secret": PROMPT}
    response = Call(limited, OPENAI, 3, prompt=PROMPT).post(headers=headers)
    assert response.headers["x-request-id"] == "mine"
    [line] = log_lines(limited, "mine")
    assert (line["method"], line["path"], line["status"], line["protocol"]) == ("POST", OPENAI, 200, "openai")
    assert line["prompt_tokens"] == response.json()["usage"]["prompt_tokens"]
    assert (line["completion_tokens"], line["sequences"], line["finish_reasons"]) == (3, 1, ["length"])
    assert {"duration_ms", "queue_seconds", "first_token_seconds"} <= line.keys()
    assert PROMPT not in limited.log
    assert "/metrics" not in limited.log
    generated_id = limited.client.get("/v1/models").headers["x-request-id"]
    assert [line["status"] for line in log_lines(limited, generated_id)] == [200]


@pytest.mark.parametrize("action", ["load", "unload"])
def test_admin_routes_are_disabled_by_default(limited: InProcessServer, action: str) -> None:
    response = limited.client.post(f"/v2/repository/models/limited/{action}")
    assert (response.status_code, action in response.json()["error"]) == (403, True)
    assert limited.client.get("/v2/models/limited/ready").status_code == 200


# Other settings


def test_app_with_log_prompts_and_admin_routes_and_a_server_side_deadline() -> None:
    flags = ["--enable_admin_routes", "--log_prompts", "--request_timeout_seconds", "0.5"]
    with servers.in_process(*flags, model_name="open") as server:
        Call(server, OPENAI, 1, prompt=PROMPT).post()
        assert PROMPT in server.log
        server.hold.close()
        response = Call(server, OPENAI, 1000, more={"n": 2}).post(headers={"x-request-timeout-seconds": "1000"})
        assert (response.status_code, response.json()["error"]["type"]) == (504, "timeout")
        server.hold.open()
        server.wait_until_idle()
        load, unload = "/v2/repository/models/open/load", "/v2/repository/models/open/unload"
        assert server.client.post(load).json() == {"name": "open", "load": True}
        assert server.client.post("/v2/repository/models/other/unload").status_code == 404
        assert server.client.post(unload).json() == {"name": "open", "unload": True}
        assert Call(server, OPENAI, 1).post().status_code == 503
