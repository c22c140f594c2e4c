"""Fields of requests in all protocols: unknown ones, and max_tokens at its limits."""

import json
from typing import Any

import httpx
import pytest

from predictor.entrypoints.http.app import create_app
from predictor.settings import Settings
from tests.predictor import servers
from tests.predictor.servers import InProcessServer

MODEL = "/v2/models/demo"
MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
TENSOR = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["1+1="]}
CONTEXT = 1024


def protocol_requests(**parameters: Any) -> list[tuple[str, dict[str, Any]]]:
    """A request of each route that generates, with sampling parameters where it has them."""
    completion = {"model": "demo", "prompt": "1+1=", **parameters}
    chat = {"model": "demo", "messages": MESSAGES, **parameters}
    return [
        ("/v1/completions", completion),
        ("/v1/completions", completion | {"stream": True}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | {"stream": True}),
        ("/v1/responses", {"model": "demo", "input": "1+1=", **parameters}),
        ("/v1/responses", {"model": "demo", "input": "1+1=", "stream": True, **parameters}),
        ("/v1/models/demo:predict", {"instances": ["1+1="], "parameters": parameters}),
        (f"{MODEL}/infer", {"inputs": [TENSOR], "parameters": parameters}),
        (f"{MODEL}/generate", {"text_input": "1+1=", "parameters": parameters}),
        (f"{MODEL}/generate_stream", {"text_input": "1+1=", "parameters": parameters}),
    ]


def log_lines(server: InProcessServer, request_id: str) -> list[dict[str, Any]]:
    """Log lines of a request; there is one after the response."""

    def read() -> list[dict[str, Any]]:
        return [line for line in map(json.loads, server.log.splitlines()) if line["request_id"] == request_id]

    server.wait_for(lambda: bool(read()))
    return read()


def test_unknown_field_is_named_in_header_and_log_of_every_protocol(
    client: httpx.Client, server: InProcessServer
) -> None:
    for path, body in protocol_requests(max_tokens=2, max_token=8):
        prefix = "parameters." if "parameters" in body else ""
        request_id = f"unknown-{path}-{'stream' in body}"
        response = client.post(path, json=body, headers={"x-request-id": request_id})
        assert response.status_code == 200, response.text
        assert response.headers["x-ignored-fields"] == f"{prefix}max_token"
        [line] = log_lines(server, request_id)
        assert line["ignored_fields"] == [f"{prefix}max_token"]


def test_unknown_field_is_named_in_the_header_of_an_error(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"model": "demo", "prompt": "1" * 2000, "mood": 1})
    assert (response.status_code, response.headers["x-ignored-fields"]) == (400, "mood")


def test_known_fields_are_not_named(client: httpx.Client) -> None:
    for path, body in protocol_requests(max_tokens=2, user="u", seed=3):
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert "x-ignored-fields" not in response.headers


def test_unknown_fields_refuse_returns_the_field(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = Settings(unknown_fields="refuse")
    monkeypatch.setattr(server.service, "_settings", refuse)
    with (
        servers.serve_app(create_app(server.service, refuse)) as (url, _),
        httpx.Client(base_url=url, timeout=servers.HANG_SECONDS, trust_env=False) as client,
    ):
        for path, body in protocol_requests(max_tokens=2, max_token=8):
            response = client.post(path, json=body)
            assert response.status_code in (400, 422)
            assert "max_token: unknown field. Omit it." in response.text
        response = client.post("/v1/completions", json={"model": "demo", "prompt": "1", "max_token": 8, "user": "u"})
        assert response.json()["error"]["param"] == "max_token"
        for path, body in protocol_requests(max_tokens=2, user="u"):
            assert client.post(path, json=body).status_code == 200


@pytest.mark.parametrize("max_tokens", [-1, 5000])
def test_max_tokens_beyond_the_context_ends_with_it(client: httpx.Client, max_tokens: int) -> None:
    body = {"model": "demo", "prompt": "1" * (CONTEXT - 4), "max_tokens": max_tokens, "ignore_eos": True}
    response = client.post("/v1/completions", json=body).json()
    assert response["usage"] == {"prompt_tokens": CONTEXT - 3, "completion_tokens": 3, "total_tokens": CONTEXT}
    assert response["choices"][0]["finish_reason"] == "length"
    for path, request in protocol_requests(max_tokens=max_tokens, temperature=0):
        assert client.post(path, json=request).status_code == 200


def test_default_max_tokens_beyond_the_context_is_limited(client: httpx.Client) -> None:
    for path, body in (
        ("/v1/completions", {"model": "demo", "prompt": "1" * (CONTEXT - 4)}),
        (f"{MODEL}/generate", {"text_input": "1" * (CONTEXT - 4)}),
    ):
        assert client.post(path, json=body).status_code == 200


def test_max_tokens_zero_returns_the_prompt_if_echoed_and_no_tokens(
    client: httpx.Client, server: InProcessServer
) -> None:
    server.wait_until_idle()
    steps = server.metric("engine_steps_total")
    body = {"model": "demo", "prompt": "1+1=", "max_tokens": 0}
    for echo, text in ((True, "1+1="), (False, "")):
        response = client.post("/v1/completions", json=body | {"echo": echo, "n": 2}).json()
        assert [(choice["text"], choice["finish_reason"]) for choice in response["choices"]] == [(text, "length")] * 2
        assert response["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
    chat = client.post("/v1/chat/completions", json={"model": "demo", "messages": MESSAGES, "max_tokens": 0}).json()
    assert (chat["choices"][0]["message"]["content"], chat["choices"][0]["finish_reason"]) == ("", "length")
    for path, request in protocol_requests(max_tokens=0):
        assert client.post(path, json=request).status_code == 200
    assert server.metric("engine_steps_total") == steps
    assert client.post("/v1/completions", json=body | {"prompt": "1" * 2000}).status_code == 400


def test_seeds_beyond_64_bits_sample_repeatably(client: httpx.Client) -> None:
    def text(seed: int) -> str:
        body = {"model": "demo", "prompt": "1+1=", "temperature": 2, "top_k": 0, "seed": seed, "max_tokens": 40}
        body["ignore_eos"] = True
        return str(client.post("/v1/completions", json=body).json()["choices"][0]["text"])

    assert text(2**64 + 5) == text(5) != text(6)
    assert text(2**64 - 1) == text(2**64 - 1)


@pytest.mark.parametrize("words", [["2"], "2", ["42"], ["2=4 4"]])
def test_completion_has_no_bad_word_of_the_request(client: httpx.Client, words: list[str] | str) -> None:
    def complete(**fields: object) -> str:
        body = {"model": "demo", "prompt": "20+22=", "max_tokens": 30, "temperature": 0, **fields}
        return str(client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"])

    [word] = [words] if isinstance(words, str) else words
    assert word in complete()
    assert word not in complete(bad_words=words)
