"""Embeddings, rerank and score over HTTP, compared with transformers' own forward passes of each text alone."""

import base64
import json
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as protobuf_service

from devtools import tiny_poolers
from devtools.tiny_poolers import PROMPTS, WORDS
from tests.predictor import servers
from tests.predictor.servers import InProcessServer

TEXTS = [" ".join(WORDS[start : start + count]) for start, count in ((0, 1), (10, 20), (50, 3), (70, 9), (90, 15))]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    """An encoder with Sentence Transformers' files."""
    directory = tiny_poolers.make_bert(tmp_path_factory.mktemp("bert"))
    flags = ("--model_dir", str(directory), "--enable_grpc", "--max_num_batched_tokens", "64")
    with servers.in_process(*flags, model_name="bert") as running:
        yield running


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    directory = tiny_poolers.make_classifier(tmp_path_factory.mktemp("reranker"))
    with servers.in_process("--model_dir", str(directory), model_name="reranker") as running:
        yield running


def directory_of(server: InProcessServer) -> Path:
    return server.service._settings.model_dir


def last_hidden_states(server: InProcessServer, text: str) -> torch.Tensor:
    """transformers' own, (tokens, hidden size)."""
    directory = directory_of(server)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
    with torch.no_grad():
        states: torch.Tensor = model(**encoded).last_hidden_state[0]
    return states


def mean_of(server: InProcessServer, text: str) -> torch.Tensor:
    mean = last_hidden_states(server, text).mean(0)
    return mean / mean.norm()


def relevance_of(server: InProcessServer, query: str, document: str) -> float:
    directory = directory_of(server)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(directory)(query, document, return_tensors="pt")
    with torch.no_grad():
        return float(model(**encoded).logits.sigmoid())


def embed(server: InProcessServer, inputs: object, **fields: object) -> list[list[float]]:
    response = server.client.post("/v1/embeddings", json={"model": server.model_name, "input": inputs, **fields})
    assert response.status_code == 200, response.text
    return [item["embedding"] for item in response.json()["data"]]


def error_of(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def assert_close(actual: Sequence[Any], expected: Sequence[Any]) -> None:
    for row, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.as_tensor(other), atol=TOLERANCE, rtol=0)


def test_embeddings_are_those_of_transformers_alone_and_in_a_crowd(embedder: InProcessServer) -> None:
    expected = [mean_of(embedder, text) for text in TEXTS]
    assert_close(embed(embedder, TEXTS), expected)
    steps = embedder.metric("engine_steps_total")
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda text: embed(embedder, text)[0], TEXTS * 8))
    assert_close(answers, expected * 8)
    assert embedder.metric("engine_steps_total") > steps
    embedder.wait_until_idle()


def test_embeddings_response_has_openais_form_and_usage(embedder: InProcessServer) -> None:
    body = {"model": "bert", "input": TEXTS[:2], "user": "someone"}
    for path in ("/v1/embeddings", "/openai/v1/embeddings"):
        content = embedder.client.post(path, json=body).json()
        assert [(item["object"], item["index"]) for item in content["data"]] == [("embedding", 0), ("embedding", 1)]
        assert content["usage"] == {"prompt_tokens": 25, "total_tokens": 25}
        assert (content["object"], content["model"]) == ("list", "bert")


def test_embeddings_of_token_ids_are_those_of_their_text(embedder: InProcessServer) -> None:
    token_ids = [0, 5, 6, 2]  # <s> w0 w1 </s>
    [of_ids] = embed(embedder, token_ids)
    assert_close([of_ids, *embed(embedder, [token_ids, token_ids])], [mean_of(embedder, "w0 w1")] * 3)


def test_openai_client_gets_equal_embeddings_as_floats_and_base64(embedder: InProcessServer) -> None:
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="-", max_retries=0) as client:
        default = client.embeddings.create(model="bert", input=TEXTS)
        floats = client.embeddings.create(model="bert", input=TEXTS, encoding_format="float")
    assert [item.embedding for item in default.data] == [item.embedding for item in floats.data]
    [encoded] = embed(embedder, TEXTS[0], encoding_format="base64")
    assert_close([struct.unpack("<32f", base64.b64decode(str(encoded)))], [floats.data[0].embedding])


def test_dimensions_keep_the_first_ones_normalized_again(embedder: InProcessServer) -> None:
    expected = mean_of(embedder, TEXTS[1])[:8]
    assert_close(embed(embedder, TEXTS[1], dimensions=8), [expected / expected.norm()])
    request = {"model": "bert", "input": "w1", "dimensions": 33}
    assert error_of(embedder.client.post("/v1/embeddings", json=request)) == (
        "dimensions is 33: embeddings of this model have 32."
    )


def test_prompt_name_puts_the_snapshots_prompt_before_texts(embedder: InProcessServer) -> None:
    assert_close(embed(embedder, "w1", prompt_name="query"), [mean_of(embedder, PROMPTS["query"] + "w1")])
    unknown = embedder.client.post("/v1/embeddings", json={"model": "bert", "input": "w1", "prompt_name": "passage"})
    assert error_of(unknown) == "prompt_name is 'passage': the prompts of this model are query, document."
    ids = embedder.client.post("/v1/embeddings", json={"model": "bert", "input": [5], "prompt_name": "query"})
    assert error_of(ids) == "prompt_name is for texts, not for token ids. Omit it."


def test_text_is_in_lower_case_as_the_snapshot_has_it(embedder: InProcessServer) -> None:
    assert_close(embed(embedder, "W1 W2"), [mean_of(embedder, "w1 w2")])


def test_text_beyond_the_snapshots_length_is_refused_or_truncated(embedder: InProcessServer) -> None:
    text = " ".join(WORDS[:30])
    response = embedder.client.post("/v1/embeddings", json={"model": "bert", "input": ["w1", text]})
    assert error_of(response) == (
        "Input 1 is too long: 32 tokens. The model takes 24; shorten it, or set truncate_prompt_tokens to -1."
    )
    expected = [mean_of(embedder, " ".join(WORDS[:22])), mean_of(embedder, "w0 w1")]
    for limit, other in zip((-1, 4), expected, strict=True):
        assert_close(embed(embedder, text, truncate_prompt_tokens=limit), [other])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": []}, "input: expected a string, a list of strings, of token ids or of lists of token ids"),
        ({"input": ["w1", ""]}, "input: expected a string"),
        ({"input": [[5], []]}, "input: expected a string"),
        ({"input": ["w1"] * 2049}, "up to 2048 and none of them empty"),
        ({"input": [205]}, "Unknown token id in input 0: 205. This model's are 0 to 204."),
        ({"input": "w1", "dimensions": 0}, "dimensions: input should be greater than or equal to 1"),
        ({"input": "w1", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens: expected -1 or at least 1."),
        ({"input": "w1", "encoding_format": "int8"}, "encoding_format: input should be 'float' or 'base64'"),
        ({"input": "w1", "messages": [{}]}, "messages: chats are not supported. Send the text as input."),
    ],
)
def test_invalid_embedding_request_returns_400(embedder: InProcessServer, fields: dict[str, Any], message: str) -> None:
    assert message in error_of(embedder.client.post("/v1/embeddings", json={"model": "bert", **fields}))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "w1"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w1"}], "stream": True}),
        ("/v1/responses", {"input": "w1"}),
        ("/tokenize", {"prompt": "w1"}),
        ("/v1/rerank", {"query": "w1", "documents": ["w2"]}),
    ],
)
def test_route_of_another_task_returns_400(embedder: InProcessServer, path: str, body: dict[str, Any]) -> None:
    response = embedder.client.post(path, json={"model": "bert", **body})
    assert error_of(response) == "Model bert computes embeddings. POST /v1/embeddings."


def test_embeddings_of_a_generating_model_return_400(client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", json={"model": "demo", "input": "w1"})
    assert error_of(response) == "Model demo generates text. POST /v1/completions or /v1/chat/completions."


def test_v2_embeds_as_fp32_in_json_and_binary(embedder: InProcessServer) -> None:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [2], "data": TEXTS[:2]}
    path = "/v2/models/bert/infer"
    [output] = embedder.client.post(path, json={"inputs": [tensor]}).json()["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("embedding", "FP32", [2, 32])
    expected = torch.cat([mean_of(embedder, text) for text in TEXTS[:2]])
    assert_close([output["data"]], [expected])
    response = embedder.client.post(path, json={"inputs": [tensor], "parameters": {"binary_data_output": True}})
    size = int(response.headers["inference-header-content-length"])
    assert list(struct.unpack("<64f", response.content[size:])) == pytest.approx(output["data"], abs=TOLERANCE)
    shortened = {"inputs": [tensor], "parameters": {"dimensions": 4, "prompt_name": "query"}}
    assert embedder.client.post(path, json=shortened).json()["outputs"][0]["shape"] == [2, 4]


def test_v2_metadata_has_the_tensors_and_the_pooling(embedder: InProcessServer) -> None:
    metadata = embedder.client.get("/v2/models/bert").json()
    assert metadata["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": [-1]}]
    assert metadata["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, -1]}]
    expected = {"task": "embed", "pooling": "mean", "normalized": "true", "context_tokens": "24", "outputs": "32"}
    assert expected.items() <= metadata["properties"].items()


def test_grpc_embeds_as_fp32(embedder: InProcessServer) -> None:
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{embedder.grpc_port}") as channel:
        stub = protobuf_service.GRPCInferenceServiceStub(channel)
        request = messages.ModelInferRequest(model_name="bert")
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(TEXTS[2].encode())
        [output] = stub.ModelInfer(request).outputs
        assert list(output.shape) == [1, 32]
        assert_close([list(output.contents.fp32_contents)], [mean_of(embedder, TEXTS[2])])
        tensor.ClearField("contents")
        request.raw_input_contents.append(struct.pack("<I", 2) + b"w1")
        [raw] = stub.ModelInfer(request).raw_output_contents
    assert_close([struct.unpack("<32f", raw)], [mean_of(embedder, "w1")])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([{"name": "messages"}], "inputs.0.name is 'messages': expected text_input, each once."),
        ([{"datatype": "FP32"}], "inputs.0.datatype is 'FP32': text_input is BYTES."),
        ([{"parameters": {"prompt_name": "passage"}}], "prompt_name is 'passage'"),
    ],
)
def test_v2_with_invalid_inputs_returns_400(
    embedder: InProcessServer, inputs: list[dict[str, Any]], message: str
) -> None:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["w1"]}
    response = embedder.client.post("/v2/models/bert/infer", json={"inputs": [tensor | each for each in inputs]})
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_decoder_gives_the_last_tokens_state_not_normalized(tmp_path: Path) -> None:
    directory = tiny_poolers.make_qwen3(tmp_path)
    with servers.in_process("--model_dir", str(directory), model_name="qwen3") as server:
        expected = [last_hidden_states(server, text)[-1] for text in TEXTS]
        assert_close(embed(server, TEXTS), expected)
        assert_close([embed(server, text)[0] for text in TEXTS], expected)
        assert_close(embed(server, TEXTS[0], dimensions=5), [expected[0][:5]])


def test_rerank_orders_documents_by_transformers_scores(reranker: InProcessServer) -> None:
    query, documents = "w3 w4", TEXTS
    expected = [relevance_of(reranker, query, document) for document in documents]
    order = sorted(range(len(documents)), key=lambda index: -expected[index])
    body = {"model": "reranker", "query": query, "documents": documents}
    for path in ("/v1/rerank", "/rerank"):
        content = reranker.client.post(path, json=body).json()
        assert [result["index"] for result in content["results"]] == order
        scores = [result["relevance_score"] for result in content["results"]]
        assert scores == pytest.approx([expected[index] for index in order], abs=TOLERANCE)
        assert [result["document"]["text"] for result in content["results"]] == [TEXTS[index] for index in order]
    shortened = body | {"top_n": 2, "return_documents": False, "documents": [{"text": text} for text in documents]}
    content = reranker.client.post("/v1/rerank", json=shortened).json()
    assert [set(result) for result in content["results"]] == [{"index", "relevance_score"}] * 2
    assert [result["index"] for result in content["results"]] == order[:2]
    assert content["usage"]["total_tokens"] == content["usage"]["prompt_tokens"] == 5 * (2 + 3) + 48


def test_score_gives_one_value_for_each_pair(reranker: InProcessServer) -> None:
    one = {"model": "reranker", "text_1": TEXTS[0], "text_2": TEXTS[1:]}
    for path, body, pairs in (
        ("/v1/score", one, [(TEXTS[0], text) for text in TEXTS[1:]]),
        ("/score", {"text_1": TEXTS[:2], "text_2": TEXTS[2:4]}, [(TEXTS[0], TEXTS[2]), (TEXTS[1], TEXTS[3])]),
    ):
        content = reranker.client.post(path, json=body).json()
        assert [(item["object"], item["index"]) for item in content["data"]] == [
            ("score", index) for index in range(len(pairs))
        ]
        expected = [relevance_of(reranker, *pair) for pair in pairs]
        assert [item["score"] for item in content["data"]] == pytest.approx(expected, abs=TOLERANCE)
    response = reranker.client.post("/score", json={"text_1": TEXTS[:2], "text_2": TEXTS[:3]})
    assert error_of(response) == "text_1 has 2 texts, and text_2 3. Send one text_1, or as many as text_2."


def test_v2_scores_pairs(reranker: InProcessServer) -> None:
    tensors = [
        {"name": name, "datatype": "BYTES", "shape": [2], "data": data}
        for name, data in (("text_input", TEXTS[:2]), ("text_pair", TEXTS[2:4]))
    ]
    [output] = reranker.client.post("/v2/models/reranker/infer", json={"inputs": tensors}).json()["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("score", "FP32", [2, 1])
    expected = [relevance_of(reranker, TEXTS[index], TEXTS[index + 2]) for index in range(2)]
    assert output["data"] == pytest.approx(expected, abs=TOLERANCE)


def test_v2_classifies_single_texts_by_label_and_rerank_refuses_the_model(tmp_path: Path) -> None:
    directory = tiny_poolers.make_classifier(tmp_path, labels=3, model_type="bert")
    with servers.in_process("--model_dir", str(directory), model_name="labels") as server:
        tensor = {"name": "text_input", "datatype": "BYTES", "shape": [2], "data": TEXTS[:2]}
        [output] = server.client.post("/v2/models/labels/infer", json={"inputs": [tensor]}).json()["outputs"]
        assert output["shape"] == [2, 3]
        assert sum(output["data"][:3]) == pytest.approx(1)
        response = server.client.post("/v1/rerank", json={"query": "w1", "documents": ["w2"]})
        assert error_of(response).startswith("This model has 3 labels, and one score for a pair needs exactly one.")


def test_classifier_on_a_decoder_without_padding_token_serves_batches(tmp_path: Path) -> None:
    fields: dict[str, Any] = {**tiny_poolers.CAUSAL, "pad_token_id": None}
    directory = tiny_poolers.make_classifier(tmp_path, model_type="qwen3", **fields)
    with servers.in_process("--model_dir", str(directory), model_name="qwen3-classifier") as server:
        scores = server.client.post("/score", json={"text_1": "w1", "text_2": TEXTS}).json()["data"]
        expected = [relevance_of(server, "w1", text) for text in TEXTS]
        assert [item["score"] for item in scores] == pytest.approx(expected, abs=TOLERANCE)


def test_full_queue_returns_429_and_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    directory = tiny_poolers.make_bert(tmp_path)
    limits = ("--max_num_seqs", "1", "--max_queued_requests", "1", "--request_timeout_seconds", "60")
    with servers.in_process("--model_dir", str(directory), *limits, model_name="full") as server:
        body = {"model": "full", "input": ["w1", "w2"]}
        server.hold.close()
        with ThreadPoolExecutor(2) as clients:
            first = clients.submit(server.client.post, "/v1/embeddings", json=body)
            assert server.hold.blocked.wait(servers.HANG_SECONDS)
            server.wait_for_metrics(num_requests_running=1, num_requests_waiting=1)
            late = server.client.post("/v1/embeddings", json=body, headers={"x-request-timeout-seconds": "0.01"})
            assert error_of(late, 504) == "Request timed out. Send fewer inputs or raise the timeout."
            server.disconnect_during("/v1/embeddings", body, num_requests_running=1, num_requests_waiting=3)
            server.wait_for_metrics(num_requests_waiting=1)
            second = clients.submit(server.client.post, "/v1/embeddings", json=body)
            server.wait_for_metrics(num_requests_waiting=3)
            full = server.client.post("/v1/embeddings", json=body)
            assert error_of(full, 429).startswith("Server overloaded")
            assert full.headers["retry-after"] == "1"
            server.hold.open()
            assert first.result().status_code == second.result().status_code == 200
        server.wait_until_idle()
        assert server.metric("request_finished_total", finished_reason="computed") == 2
        assert server.metric("request_finished_total", finished_reason="cancelled") == 1
        assert server.metric("request_finished_total", finished_reason="deadline") == 1


def test_api_keys_limits_and_metrics_count_requests_and_tokens(tmp_path: Path) -> None:
    directory = tiny_poolers.make_bert(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text("alice:long-secret-of-alice tokens_per_minute=10\n")
    bearer = {"Authorization": "Bearer long-secret-of-alice"}
    with servers.in_process("--model_dir", str(directory), model_name="keys", keys=keys) as server:
        body = {"model": "keys", "input": TEXTS[:2]}
        assert server.client.post("/v1/embeddings", json=body).status_code == 401
        assert server.client.post("/v1/embeddings", json=body, headers=bearer).status_code == 200
        limited = server.client.post("/v1/embeddings", json=body, headers=bearer)
        assert "has used its 10 tokens per minute" in error_of(limited, 429)
        assert server.metric("key_requests_total", key="alice") == 1
        assert server.metric("key_request_rejected_total", key="alice", limit="tokens_per_minute") == 1
        assert server.metric("key_prompt_tokens_total", key="alice") == 25
        assert server.metric("key_num_sequences", key="alice") == 0


def test_failed_forward_pass_returns_500_and_the_server_recovers(embedder: InProcessServer) -> None:
    embedder.hold.error = RuntimeError("out of memory")
    try:
        response = embedder.client.post("/v1/embeddings", json={"model": "bert", "input": "w1"})
    finally:
        embedder.hold.open()
    assert error_of(response, 500) == "The forward pass failed. See the server log."
    assert embedder.metric("engine_failed_steps_total") == 1
    assert_close(embed(embedder, "w1"), [mean_of(embedder, "w1")])


def test_log_line_counts_a_request_as_one_sequence(embedder: InProcessServer) -> None:
    embedder.client.post(
        "/v1/embeddings", json={"model": "bert", "input": TEXTS}, headers={"x-request-id": "many-texts"}
    )
    embedder.wait_for(lambda: "many-texts" in embedder.log)
    line = next(json.loads(line) for line in embedder.log.splitlines() if '"request_id": "many-texts"' in line)
    assert (line["protocol"], line["sequences"], line["prompt_tokens"]) == ("openai", 1, 58)
    assert line["finish_reasons"] == ["computed"]
