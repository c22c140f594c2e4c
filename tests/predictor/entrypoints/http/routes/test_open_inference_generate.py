"""Generate extension over HTTP, and malformed bodies of every protocol."""

import json
from typing import Any

import httpx
import pytest

ANSWER = " 7+5=12 1+2+1=4 42"
GREEDY = {"temperature": 0, "max_tokens": 40}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_generate_and_generate_stream_return_the_same(client: httpx.Client, version: str) -> None:
    body = {"text_input": "17+25=", "parameters": GREEDY | {"details": True}}
    whole = client.post(f"/v2/models/demo{version}/generate", json=body).json()
    assert whole["text_output"] == ANSWER
    assert whole.get("model_version") == ("1" if version else None)
    assert whole["details"]["finish_reason"] == "eos_token"
    assert len(whole["details"]["logprobs"]) == 19
    streamed = client.post(f"/v2/models/demo{version}/generate_stream", json=body)
    deltas = events(streamed)
    assert "".join(added["text_output"] for added in deltas) == ANSWER
    assert len(deltas) > 1
    assert deltas[-1]["details"]["logprobs"] == whole["details"]["logprobs"]
    assert streamed.headers["cache-control"] == "no-cache, no-transform"
    assert streamed.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "text_input: field required"),
        ({"text_input": ""}, "text_input: string should have at least 1 character"),
        ({"text_input": "1", "parameters": {"max_tokens": -2}}, "parameters.max_tokens: "),
        ({"text_input": "1", "beam_width": 2}, "beam_width: beam search is not supported"),
        ({"text_input": "1", "bad_words": [2]}, "bad_words"),
        ({"text_input": "1" * 2000}, "The prompt is too long: 2001 tokens"),
    ],
)
def test_generate_invalid_request_returns_422(client: httpx.Client, body: dict[str, Any], expected: str) -> None:
    whole = client.post("/v2/models/demo/generate", json=body)
    assert (whole.status_code, list(whole.json())) == (422, ["error"])
    assert whole.json()["error"].startswith(expected)
    streamed = client.post("/v2/models/demo/generate_stream", json=body)
    assert streamed.status_code == 422
    assert events(streamed) == [whole.json()]


def test_openapi_lists_the_routes_of_all_protocols(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v2/models/{model_name}/infer", "/v1/chat/completions", "/v1/models/{model_name}:predict"} <= set(paths)


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/demo/infer",
        "/v2/models/demo/generate",
        "/v2/models/demo/generate_stream",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models/demo:predict",
    ],
)
@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"7", b"[" * 50_000, b'{"a": NaN}', b'{"a": "\\ud800"}', b"\xff\xfe", b"{}" * 2]
)
def test_malformed_body_returns_a_client_error(client: httpx.Client, path: str, body: bytes) -> None:
    response = client.post(path, content=body)
    assert response.status_code in (400, 422)
    assert "Traceback" not in response.text
    assert '"error"' in response.text
