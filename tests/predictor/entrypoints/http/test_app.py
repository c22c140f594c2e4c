"""A real predictor process on the demo model, asked over HTTP."""

import asyncio
import json
from typing import Any

import httpx
import kserve
import pytest

from demo import evaluate, exam
from devtools.processes import Predictor

INFER = "/v2/models/demo/infer"
RAW = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["17+25="]}


def chat(*contents: str) -> dict[str, Any]:
    data = [json.dumps([{"role": "user", "content": content}]) for content in contents]
    return {"name": "messages", "datatype": "BYTES", "shape": [len(data)], "data": data}


def ask(client: httpx.Client, tensor: dict[str, Any], **fields: Any) -> httpx.Response:
    return client.post(INFER, json={"inputs": [tensor], **fields})


def outputs(response: httpx.Response) -> dict[str, list[Any]]:
    assert response.status_code == 200, response.text
    return {output["name"]: output["data"] for output in response.json()["outputs"]}


def test_answers_raw_prompts_and_chats(client: httpx.Client) -> None:
    assert outputs(ask(client, RAW)) == {"text_output": [" 7+5=12 1+2+1=4 42"]}
    answers = outputs(ask(client, chat("What is 17 + 25?", "Who are you?")))["text_output"]
    assert answers == ["7+5=12 1+2+1=4 42", "I am the demo model of kserve-llm, a tiny language model."]


def test_answers_held_out_sums_right(server: Predictor) -> None:
    asked = exam.held_out_questions(100)
    answers = evaluate.complete_by_server(server.url, "demo", [question for question, _ in asked])
    assert evaluate.accuracy(answers, [result for _, result in asked]) >= 0.97


def test_tells_counts_and_finish_reasons(client: httpx.Client) -> None:
    names = ["text_output", "finish_reason", "prompt_tokens", "completion_tokens"]
    selected = {"outputs": [{"name": name} for name in names]}
    ended = outputs(ask(client, chat("What is 17 + 25?"), **selected))
    assert ended["finish_reason"] == ["eos_token"]
    cut = outputs(ask(client, chat("What is 17 + 25?"), parameters={"max_tokens": 3}, **selected))
    assert (cut["finish_reason"], cut["completion_tokens"]) == (["length"], [3])
    assert cut["prompt_tokens"] == ended["prompt_tokens"]
    stopped = outputs(ask(client, chat("What is 17 + 25?"), parameters={"stop": " 1+"}, **selected))
    assert (stopped["finish_reason"], stopped["text_output"]) == (["stop_sequence"], ["7+5=12"])


def test_describes_the_server(client: httpx.Client) -> None:
    described = client.get("/v2").json()
    assert (described["name"], "binary_tensor_data" in described["extensions"]) == ("kserve-llm", True)


def test_describes_its_inputs_and_outputs(client: httpx.Client) -> None:
    metadata = client.get("/v2/models/demo").json()
    assert metadata["name"] == "demo"
    assert {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]} == {
        "text_input": "BYTES",
        "messages": "BYTES",
    }
    assert metadata["outputs"][0] == {"name": "text_output", "datatype": "BYTES", "shape": [-1]}


def test_is_live_and_ready(client: httpx.Client) -> None:
    assert client.get("/").json() == {"status": "alive"}
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/demo/ready").json() == {"name": "demo", "ready": True}


def test_keeps_the_sdks_metrics(client: httpx.Client) -> None:
    outputs(ask(client, RAW))
    assert 'request_predict_seconds_count{model_name="demo"}' in client.get("/metrics").text


def test_the_kserve_client_gets_the_answer(server: Predictor) -> None:
    async def infer() -> kserve.InferResponse:
        tensor = kserve.InferInput("text_input", [1], "BYTES", ["17+25="])
        request = kserve.InferRequest("demo", [tensor], request_id="7", parameters={"max_tokens": 32})
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", timeout=60))
        try:
            assert await client.is_server_ready(server.url)
            assert await client.is_model_ready(server.url, "demo")
            return await client.infer(server.url, request, model_name="demo")
        finally:
            await client.close()

    response = asyncio.run(infer())
    assert response.id == "7"
    assert response.outputs[0].data == [" 7+5=12 1+2+1=4 42"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"not json", "The body is not JSON"),
        (b"{}", "inputs: field required"),
        (json.dumps({"inputs": [RAW | {"datatype": "INT32"}]}).encode(), "inputs.0.datatype is 'INT32'"),
        (json.dumps({"inputs": [RAW | {"shape": [4]}]}).encode(), "inputs.0.shape is [4], but data has 1 elements"),
        (json.dumps({"inputs": [RAW | {"data": [""]}]}).encode(), "inputs.0.data.0 is an empty prompt"),
        (json.dumps({"inputs": [RAW | {"data": ["1" * 2000]}]}).encode(), "The prompt is too long: 2001 tokens"),
        (json.dumps({"inputs": [RAW], "parameters": {"max_tokens": -1}}).encode(), "parameters.max_tokens: "),
        (json.dumps({"inputs": [RAW], "parameters": {"max_tokens": 2000}}).encode(), "max_tokens is too large: 2000"),
        (json.dumps({"inputs": [RAW], "parameters": {"beams": 3}}).encode(), "parameters.beams: not known here"),
        (json.dumps({"inputs": [chat("Hi") | {"data": ["Hi"]}]}).encode(), "inputs.0.data.0 is not a JSON list"),
    ],
)
def test_bad_input_is_400_and_the_connection_lives_on(client: httpx.Client, content: bytes, expected: str) -> None:
    response = client.post(INFER, content=content)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert response.json()["error"].startswith(expected)
    connections = client._transport._pool.connections  # type: ignore[attr-defined]
    before = list(connections)
    assert outputs(ask(client, RAW))
    assert list(connections) == before, "the next request took the same connection"


def test_one_bad_prompt_refuses_the_whole_request(client: httpx.Client) -> None:
    response = ask(client, RAW | {"shape": [2], "data": ["7+5=", "1" * 2000]})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "expected"),
    [
        ("GET", "/v2/models/other", 404, "Model not found: 'other'. Use 'demo'."),
        ("POST", "/v2/models/other/infer", 404, "Model not found: 'other'. Use 'demo'."),
        ("GET", "/v3", 404, "Route not found: GET /v3. Use /v2/models/NAME/infer"),
        ("GET", INFER, 405, f"Method not allowed: GET {INFER}. Use POST."),
        ("POST", "/v2/models/demo/versions/2/infer", 404, "Version of model 'demo' not found: '2'. Use '1'."),
        ("POST", "/v1/models/demo:explain", 404, "`:explain` is not supported. POST /v1/models/demo:predict."),
        (
            "POST",
            "/v2/repository/models/demo/unload",
            403,
            "Model unload is disabled. Start the server with --enable_admin_routes.",
        ),
        (
            "POST",
            "/v2/repository/models/demo/load",
            403,
            "Model load is disabled. Start the server with --enable_admin_routes.",
        ),
    ],
)
def test_errors_have_one_form(client: httpx.Client, method: str, path: str, status: int, expected: str) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"].startswith(expected)
