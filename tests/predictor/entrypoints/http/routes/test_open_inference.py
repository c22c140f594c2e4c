"""Open Inference Protocol v2 over HTTP, with the demo model; health and errors of all routes."""

import asyncio
import json
from typing import Any

import httpx
import kserve
import pytest

from demo import evaluate, exam
from tests.predictor.servers import HANG_SECONDS, Server

INFER = "/v2/models/demo/infer"
RAW = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["17+25="]}


def chat(*contents: str) -> dict[str, Any]:
    data = [json.dumps([{"role": "user", "content": content}]) for content in contents]
    return {"name": "messages", "datatype": "BYTES", "shape": [len(data)], "data": data}


def infer(client: httpx.Client, tensor: dict[str, Any], **fields: Any) -> httpx.Response:
    return client.post(INFER, json={"inputs": [tensor], **fields})


def outputs(response: httpx.Response) -> dict[str, list[Any]]:
    assert response.status_code == 200, response.text
    return {output["name"]: output["data"] for output in response.json()["outputs"]}


def test_infer_completes_raw_prompts_and_chats(client: httpx.Client) -> None:
    assert outputs(infer(client, RAW)) == {"text_output": [" 7+5=12 1+2+1=4 42"]}
    answers = outputs(infer(client, chat("What is 17 + 25?", "Who are you?")))["text_output"]
    assert answers == ["7+5=12 1+2+1=4 42", "I am the demo model of kserve-llm, a tiny language model."]


def test_infer_answers_held_out_sums_correctly(server: Server) -> None:
    exercises = exam.held_out_questions(100)
    answers = evaluate.complete_by_server(server.url, "demo", [question for question, _ in exercises])
    assert evaluate.accuracy(answers, [result for _, result in exercises]) >= 0.97


def test_infer_returns_token_counts_and_finish_reasons(client: httpx.Client) -> None:
    names = ["text_output", "finish_reason", "prompt_tokens", "completion_tokens"]
    selected = {"outputs": [{"name": name} for name in names]}
    finished = outputs(infer(client, chat("What is 17 + 25?"), **selected))
    assert finished["finish_reason"] == ["eos_token"]
    cut = outputs(infer(client, chat("What is 17 + 25?"), parameters={"max_tokens": 3}, **selected))
    assert (cut["finish_reason"], cut["completion_tokens"]) == (["length"], [3])
    assert cut["prompt_tokens"] == finished["prompt_tokens"]
    stopped = outputs(infer(client, chat("What is 17 + 25?"), parameters={"stop": " 1+"}, **selected))
    assert (stopped["finish_reason"], stopped["text_output"]) == (["stop_sequence"], ["7+5=12"])


def test_server_metadata_has_name_and_extensions(client: httpx.Client) -> None:
    metadata = client.get("/v2").json()
    assert (metadata["name"], "binary_tensor_data" in metadata["extensions"]) == ("kserve-llm", True)


def test_model_metadata_has_inputs_and_outputs(client: httpx.Client) -> None:
    metadata = client.get("/v2/models/demo").json()
    assert metadata["name"] == "demo"
    assert {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]} == {
        "text_input": "BYTES",
        "messages": "BYTES",
    }
    assert metadata["outputs"][0] == {"name": "text_output", "datatype": "BYTES", "shape": [-1]}


def test_health_routes_of_a_ready_server_return_200(client: httpx.Client) -> None:
    root = client.get("/").json()
    assert (root.pop("status"), root.pop("name")) == ("alive", "kserve-llm")
    assert client.get("/version").json() == {"version": root.pop("version")}
    assert {client.get(link).status_code for link in root.pop("links").values()} == {200}
    assert root == {}
    assert client.get("/ping").json() == client.get("/health").json() == {"ready": True}
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/demo/ready").json() == {"name": "demo", "ready": True}


def test_metrics_include_kserves_own(client: httpx.Client) -> None:
    outputs(infer(client, RAW))
    assert 'request_predict_seconds_count{model_name="demo"}' in client.get("/metrics").text


def test_infer_by_kserves_client_returns_the_completion(server: Server) -> None:
    async def run() -> kserve.InferResponse:
        tensor = kserve.InferInput("text_input", [1], "BYTES", ["17+25="])
        request = kserve.InferRequest("demo", [tensor], request_id="7", parameters={"max_tokens": 32})
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", timeout=HANG_SECONDS))
        try:
            assert await client.is_server_ready(server.url)
            assert await client.is_model_ready(server.url, "demo")
            return await client.infer(server.url, request, model_name="demo")
        finally:
            await client.close()

    response = asyncio.run(run())
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
        (json.dumps({"inputs": [RAW], "parameters": {"max_tokens": -2}}).encode(), "parameters.max_tokens: "),
        (json.dumps({"inputs": [RAW], "parameters": {"num_beams": 3}}).encode(), "parameters.num_beams: beam search"),
        (json.dumps({"inputs": [chat("Hi") | {"data": ["Hi"]}]}).encode(), "inputs.0.data.0 is not a JSON list"),
    ],
)
def test_infer_with_invalid_input_returns_400(client: httpx.Client, content: bytes, expected: str) -> None:
    response = client.post(INFER, content=content)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert response.json()["error"].startswith(expected)
    # One client, one connection: the server closes it where it could not read the body.
    assert response.headers.get("connection") != "close"
    assert outputs(infer(client, RAW))


def test_infer_with_one_invalid_prompt_returns_400(client: httpx.Client) -> None:
    response = infer(client, RAW | {"shape": [2], "data": ["7+5=", "1" * 2000]})
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
def test_error_has_one_format(client: httpx.Client, method: str, path: str, status: int, expected: str) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"].startswith(expected)
