"""The application of one service: limits, API keys, request log, admin routes; and two applications in one process."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from predictor import settings
from predictor.entrypoints.http.app import create_app
from predictor.generation.service import LLMService
from predictor.protocols.open_inference_binary import HEADER_LENGTH
from tests.predictor import servers
from tests.predictor.servers import HANG_SECONDS, OPENAI, PROTOCOLS, Call, InProcessServer

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
    with httpx.Client(base_url=limited.url, timeout=HANG_SECONDS, trust_env=False) as anonymous:
        predict = "/v1/models/limited:predict"
        for path in (predict, *(Call(limited, protocol, 1).path for protocol in PROTOCOLS)):
            response = anonymous.post(path, json=Call(limited, OPENAI, 1).body)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        for path in servers.probe_paths("limited"):
            assert anonymous.get(path).status_code == 200, path
        assert anonymous.get("/v1/models").status_code == 401


def documented_routes(server: InProcessServer) -> list[tuple[str, str]]:
    """Method and path of every route in the OpenAPI document."""
    paths = server.client.get("/openapi.json").json()["paths"]
    return [
        (method, path.format(model_name=server.model_name, model_version="1"))
        for path, operations in paths.items()
        for method in operations
        if method in ("get", "post")
    ]


def test_every_documented_route_but_the_public_ones_needs_an_api_key(limited: InProcessServer) -> None:
    with httpx.Client(base_url=limited.url, timeout=HANG_SECONDS, trust_env=False) as anonymous:
        public = {
            path for method, path in documented_routes(limited) if anonymous.request(method, path).status_code != 401
        }
    ready = {f"/v2/models/limited/{version}ready" for version in ("", "versions/1/")}
    assert public == {"/v2/health/live", "/v2/health/ready", *ready}


def test_every_documented_route_with_a_body_limits_it_in_the_form_of_its_protocol(limited: InProcessServer) -> None:
    posts = [path for method, path in documented_routes(limited) if method == "post"]
    assert len(posts) > 20
    for path in posts:
        response = limited.client.post(path, content=b" " * 5001)
        assert response.status_code == 413, path
        error = json.loads(response.text.removeprefix("data: "))["error"]
        assert isinstance(error, str) is (path.startswith("/v2/") or path.endswith(":predict")), path
        assert "--max_request_bytes" in str(error), path


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


# Methods, paths and encodings of all routes


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/ping",
        "/version",
        "/metrics",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models",
        "/v2/models/demo",
        "/v2/models/demo/ready",
        "/v1/models",
        "/v1/models/demo",
        "/openai/v1/models",
        "/openapi.json",
    ],
)
def test_route_of_get_answers_head_without_a_body(client: httpx.Client, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == str(len(get.content))


def test_route_with_another_method_names_the_allowed_ones(client: httpx.Client) -> None:
    response = client.put("/v2/models/demo")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
    assert response.json() == {"error": "Method not allowed: PUT /v2/models/demo. Use GET, HEAD."}


def test_head_of_an_unknown_route_returns_404(client: httpx.Client) -> None:
    assert client.head("/v1/model").status_code == 404


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_path_with_extra_slashes_is_answered_without_a_redirect(server: InProcessServer, protocol: str) -> None:
    call = Call(server, protocol, 3)
    headers = {"X-Forwarded-Proto": "https", "Host": "llm.example.org"}
    for path in (f"{call.path}/", f"/{call.path}", call.path.replace("/", "//")):
        response = server.client.post(f"{server.url}{path}", json=call.body, headers=headers, follow_redirects=False)
        assert response.status_code == 200
    for path in ("/v1/models/", "/v2/", "/v2/models/demo/", "/metrics/"):
        assert server.client.get(path, follow_redirects=False).status_code == 200


def test_path_with_extra_slashes_needs_a_key_too(limited: InProcessServer) -> None:
    with httpx.Client(base_url=limited.url, timeout=HANG_SECONDS, trust_env=False) as anonymous:
        assert anonymous.get("/v1/models/").status_code == 401
        assert anonymous.get("/v2/health/ready/").status_code == 200


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_body_in_any_coding_and_encoding_has_the_same_completion(server: InProcessServer, protocol: str) -> None:
    call = Call(server, protocol, 3)
    text = json.dumps(call.body)
    expected = call.post().json()
    for body, coding in (
        (text.encode("utf-8-sig"), "identity"),
        (text.encode("utf-16"), "identity"),
        (gzip.compress(text.encode(), mtime=0), "gzip"),
        (zlib.compress(text.encode("utf-8-sig")), "deflate"),
    ):
        response = server.client.post(call.path, content=body, headers={"Content-Encoding": coding})
        assert response.status_code == 200, response.text
        assert response.json() | CHANGING == expected | CHANGING


CHANGING = {"id": "", "created": 0}
"""Fields of completions that differ between equal requests."""


@pytest.mark.parametrize(("protocol", "status"), [(OPENAI, 400), (servers.INFER, 400), (servers.GENERATE, 422)])
def test_body_in_another_coding_than_its_header_is_an_error(
    server: InProcessServer, protocol: str, status: int
) -> None:
    call = Call(server, protocol, 3)
    response = server.client.post(call.path, json=call.body, headers={"Content-Encoding": "gzip"})
    assert response.status_code == status
    assert "The body is not gzip" in response.text
    assert call.post(headers={"Content-Encoding": "br"}).status_code == 415
    assert call.post().status_code == 200


def test_binary_tensors_in_a_compressed_body_are_decoded(server: InProcessServer) -> None:
    prompt = (4).to_bytes(4, "little") + b"1+1="
    parameters = {"binary_data_size": len(prompt)}
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": parameters}
    head = json.dumps({"inputs": [tensor], "parameters": {"max_tokens": 3, "ignore_eos": True}}).encode("utf-8-sig")
    headers = {"Content-Encoding": "gzip", HEADER_LENGTH: str(len(head))}
    response = server.client.post("/v2/models/demo/infer", content=gzip.compress(head + prompt), headers=headers)
    assert response.json()["outputs"] == Call(server, servers.INFER, 3).post().json()["outputs"]


# CORS


ORIGIN = "https://ui.example.org"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-request-id",
    "Access-Control-Request-Private-Network": "true",
}


@pytest.fixture(scope="module")
def cors(keys_file: Path) -> Iterator[InProcessServer]:
    flags = [
        "--allowed_origins",
        f"http://localhost:3000, {ORIGIN}",
        "--max_num_seqs",
        "1",
        "--max_queued_requests",
        "0",
    ]
    headers = {"Authorization": f"Bearer {KEY}", "Origin": ORIGIN}
    with servers.in_process(*flags, model_name="cors", keys=keys_file, headers=headers) as running:
        yield running


def readable(response: httpx.Response) -> bool:
    """Whether a browser lets a page of `ORIGIN` read the response and the headers that the API sets."""
    headers = response.headers
    exposed = {name.strip().lower() for name in headers.get("access-control-expose-headers", "").split(",")}
    assert "origin" in headers["vary"].lower()
    return headers.get("access-control-allow-origin") == ORIGIN and exposed >= {
        "x-request-id",
        "x-ignored-fields",
        "retry-after",
    }


def test_cors_is_off_by_default(server: InProcessServer) -> None:
    call = Call(server, OPENAI, 1)
    response = call.post(headers={"Origin": ORIGIN})
    assert (response.status_code, [name for name in response.headers if "access-control" in name]) == (200, [])
    assert server.client.options(call.path, headers={"Origin": ORIGIN, **PREFLIGHT}).status_code == 405


def test_cors_preflight_needs_no_key(cors: InProcessServer) -> None:
    for path in (OPENAI, "/v1/chat/completions/", "/v2/models/cors/infer", "/v1/models"):
        response = httpx.options(f"{cors.url}{path}", headers={"Origin": ORIGIN, **PREFLIGHT}, trust_env=False)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert response.headers["access-control-allow-methods"] == "GET, HEAD, POST"
        assert response.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
        assert response.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize(("origin", "method"), [("https://other.example.org", "POST"), (ORIGIN, "DELETE")])
def test_cors_preflight_of_another_origin_or_method_is_refused(cors: InProcessServer, origin: str, method: str) -> None:
    headers = {"Origin": origin, **PREFLIGHT, "Access-Control-Request-Method": method}
    assert cors.client.options(OPENAI, headers=headers).status_code == 400


def test_cors_response_to_another_origin_is_not_readable(cors: InProcessServer) -> None:
    response = Call(cors, OPENAI, 1).post(headers={"Origin": "https://other.example.org"})
    assert (response.status_code, readable(response)) == (200, False)


def test_cors_responses_and_errors_are_readable(cors: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    responses = [Call(cors, protocol, 2).post() for protocol in PROTOCOLS]
    call = Call(cors, OPENAI, 900).streamed()
    cors.hold.delay_seconds = 0.01
    with cors.client.stream("POST", call.path, json=call.body) as stream:
        cors.wait_for_metrics(num_requests_running=1)
        overloaded = call.post()
    cors.hold.open()
    cors.wait_until_idle()
    unauthorized = Call(cors, OPENAI, 2).post(headers={"Authorization": "Bearer wrong"})
    monkeypatch.setattr(cors.service, "submit", None)
    failed = Call(cors, OPENAI, 2).post()
    responses += [stream, overloaded, failed, unauthorized, cors.client.get("/v3"), cors.client.get("/health")]
    assert [response.status_code for response in responses] == [200, 200, 200, 200, 429, 500, 401, 404, 200]
    assert all(map(readable, responses))
    assert "retry-after" in overloaded.headers


def test_cors_with_every_origin_allows_any() -> None:
    parsed = settings.read(["--served_model_name", "loading", "--model_dir", "/nowhere", "--allowed_origins", "*"])
    app = create_app(LLMService(parsed), parsed)

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as http:
            return await http.get("/v2/health/ready", headers={"Origin": ORIGIN})

    response = asyncio.run(get())
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (503, "*")


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
