"""The generate extension and KServe v1, pure and over HTTP."""

import json
from typing import Any

import httpx
import pytest

from predictor.errors import InvalidRequest
from predictor.protocols import kserve_v1, open_inference_generate
from predictor.types import Chat, Completion, CompletionDelta, FinishReason, SamplingParams, TextDelta, Token

ANSWER = " 7+5=12 1+2+1=4 42"
GREEDY = {"temperature": 0, "max_tokens": 40}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]


def delta(
    index: int,
    text: str,
    prompt_tokens: int,
    completion_tokens: int,
    finish_reason: FinishReason | None = None,
    tokens: tuple[Token, ...] = (),
) -> CompletionDelta:
    return CompletionDelta(
        index=index,
        deltas=(TextDelta(text),) if text else (),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        finish_reason=finish_reason,
        tokens=tokens,
    )


def test_generate_has_the_specifications_defaults() -> None:
    asked = open_inference_generate.decode(b'{"text_input": "Hi"}', "m", None)
    assert asked.request.sampling == SamplingParams(max_tokens=20, temperature=1.0)


def test_a_stream_gives_details_with_its_last_event() -> None:
    asked = open_inference_generate.decode(b'{"text_input": "Hi", "parameters": {"details": true}}', "m", "1")
    stream = open_inference_generate.EventEncoder(asked)
    token = Token(7, "a", -0.5)
    [first] = stream.delta(delta(0, "a", 1, 1, tokens=(token,)))
    assert json.loads(first.removeprefix("data: ")) == {"text_output": "a", "model_name": "m", "model_version": "1"}
    assert stream.delta(delta(0, "", 1, 1)) == []
    [last] = stream.delta(delta(0, "", 1, 2, FinishReason.LENGTH, (token,)))
    details = json.loads(last.removeprefix("data: "))["details"]
    assert (details["finish_reason"], details["token"]["id"], len(details["logprobs"])) == ("length", 7, 2)


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_generates_whole_and_as_a_stream(client: httpx.Client, version: str) -> None:
    body = {"text_input": "17+25=", "parameters": GREEDY | {"details": True}}
    whole = client.post(f"/v2/models/demo{version}/generate", json=body).json()
    assert whole["text_output"] == ANSWER
    assert whole.get("model_version") == ("1" if version else None)
    assert whole["details"]["finish_reason"] == "eos_token"
    assert len(whole["details"]["logprobs"]) == 19
    streamed = client.post(f"/v2/models/demo{version}/generate_stream", json=body)
    pieces = events(streamed)
    assert "".join(piece["text_output"] for piece in pieces) == ANSWER
    assert len(pieces) > 10, "an event for each token"
    assert pieces[-1]["details"]["logprobs"] == whole["details"]["logprobs"]
    assert streamed.headers["cache-control"] == "no-cache, no-transform"
    assert streamed.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "text_input: field required"),
        ({"text_input": ""}, "text_input: string should have at least 1 character"),
        ({"text_input": "1", "parameters": {"max_tokens": 0}}, "parameters.max_tokens: "),
        ({"text_input": "1", "parameters": {"beams": 2}}, "parameters.beams: unknown field"),
        ({"text_input": "1" * 2000}, "The prompt is too long: 2001 tokens"),
    ],
)
def test_generate_answers_422(client: httpx.Client, body: dict[str, Any], expected: str) -> None:
    whole = client.post("/v2/models/demo/generate", json=body)
    assert (whole.status_code, list(whole.json())) == (422, ["error"])
    assert whole.json()["error"].startswith(expected)
    streamed = client.post("/v2/models/demo/generate_stream", json=body)
    assert streamed.status_code == 422
    assert events(streamed) == [whole.json()]


def test_v1_takes_prompts_and_chats() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    body = json.dumps({"instances": ["a", chat], "parameters": {"max_tokens": 3}}).encode()
    requests = kserve_v1.decode(body)
    assert [request.prompt for request in requests] == ["a", Chat(tuple(chat))]
    assert {request.sampling.max_tokens for request in requests} == {3}
    completion = Completion("b", finish_reason=FinishReason.LENGTH, prompt_tokens=1, completion_tokens=1)
    assert kserve_v1.encode([completion, completion]) == {"predictions": ["b", "b"]}


@pytest.mark.parametrize("body", [b"", b"{}", b'{"instances": []}', b'{"instances": [7]}', b'{"instances": [""]}'])
def test_v1_refuses_by_name(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"instances|not JSON"):
        kserve_v1.decode(body)


def test_v1_predicts_and_lists(client: httpx.Client) -> None:
    body = {"instances": ["17+25=", "17+25="], "parameters": GREEDY}
    assert client.post("/v1/models/demo:predict", json=body).json() == {"predictions": [ANSWER, ANSWER]}
    assert client.get("/v1/models").json()["models"] == ["demo"]
    assert client.get("/v1/models/demo").json()["ready"] is True


def test_the_server_describes_itself(client: httpx.Client) -> None:
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
def test_hostile_bodies_are_the_clients_fault(client: httpx.Client, path: str, body: bytes) -> None:
    response = client.post(path, content=body)
    assert response.status_code in (400, 422)
    assert "Traceback" not in response.text
    assert '"error"' in response.text
