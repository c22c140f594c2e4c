"""Log probabilities of prompts, and choices by log probability, over HTTP."""

import json
from typing import Any

import httpx
import pytest

from demo.exam import Sum
from tests.predictor.servers import InProcessServer

SUM = Sum(17, "+", 25)
PROMPT = f"<|user|>What is 17 + 25?<|end|><|assistant|>{SUM.working}"


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "demo", "prompt": PROMPT, "temperature": 0} | fields)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def infer(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [PROMPT]}
    response = client.post("/v2/models/demo/infer", json={"inputs": [tensor]} | fields)
    assert response.status_code == 200, response.text
    return {output["name"]: output["data"] for output in response.json()["outputs"]}


def test_scores_without_new_tokens_are_those_of_generated_tokens(client: httpx.Client) -> None:
    question = PROMPT.removesuffix(SUM.working)
    generated = complete(client, prompt=question, logprobs=2, max_tokens=40)["choices"][0]
    assert generated["text"] == SUM.working
    response = complete(client, prompt=question + SUM.working, echo=True, logprobs=2, max_tokens=0)
    [choice] = response["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert response["usage"]["completion_tokens"] == 0
    scored, written = choice["logprobs"], generated["logprobs"]
    count = len(written["tokens"])
    assert (scored["tokens"][0], scored["token_logprobs"][0], scored["top_logprobs"][0]) == ("<|begin|>", None, None)
    assert len(scored["tokens"]) == response["usage"]["prompt_tokens"]
    assert scored["tokens"][-count:] == written["tokens"]
    assert scored["token_logprobs"][-count:] == pytest.approx(written["token_logprobs"], abs=1e-4)
    assert [offset - len(question) for offset in scored["text_offset"][-count:]] == written["text_offset"]


def test_echo_with_logprobs_of_tokens_has_the_prompts_and_then_the_new_ones(client: httpx.Client) -> None:
    [choice] = complete(client, prompt=[1, 60, 61, 62], echo=True, logprobs=0, max_tokens=3, ignore_eos=True)["choices"]
    assert [value is None for value in choice["logprobs"]["token_logprobs"]] == [True] + [False] * 6


def test_streamed_echo_with_logprobs_is_the_whole_response(client: httpx.Client) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 4, "n": 2, "prompt": ["17+25=", [5, 6, 7]]}
    whole = complete(client, **fields)["choices"]
    body = {"model": "demo", "temperature": 0, "stream": True} | fields
    lines = client.post("/v1/completions", json=body).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    for expected in whole:
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        for name in ("tokens", "text_offset"):
            assert [value for part in parts for value in part["logprobs"][name]] == expected["logprobs"][name]


def test_prompt_logprobs_are_the_same_in_every_protocol(client: httpx.Client) -> None:
    [choice] = complete(client, prompt_logprobs=1, max_tokens=1)["choices"]
    first, *scored = choice["prompt_logprobs"]
    assert first is None
    assert [choice["logprobs"], choice["text"].startswith(PROMPT)] == [None, False]
    expected = [next(iter(by_id.values())) for by_id in scored]
    assert all(1 in {entry["rank"] for entry in by_id.values()} for by_id in scored), "the most probable one is added"
    assert any(len(by_id) == 2 for by_id in scored)

    outputs = infer(client, outputs=[{"name": "prompt_logprobs"}], parameters={"prompt_logprobs": 1, "max_tokens": 0})
    _, *tokens = json.loads(outputs["prompt_logprobs"][0])
    assert [token["text"] for token in tokens] == [entry["decoded_token"] for entry in expected]
    assert [token["logprob"] for token in tokens] == pytest.approx([entry["logprob"] for entry in expected], abs=1e-4)

    body = {"text_input": PROMPT, "parameters": {"prompt_logprobs": 1, "max_tokens": 1}}
    generated = client.post("/v2/models/demo/generate", json=body).json()
    assert [token["id"] for token in generated["details"]["prompt_logprobs"][1:]] == [token["id"] for token in tokens]
    assert generated["details"]["prompt_logprobs"][0]["logprob"] is None
    events = client.post("/v2/models/demo/generate_stream", json=body).text.split("\n\n")
    last = json.loads(events[-2].removeprefix("data: "))
    assert len(last["details"]["prompt_logprobs"]) == 1 + len(tokens)

    question = [{"role": "user", "content": "What is 17 + 25?"}]
    chat = client.post(
        "/v1/chat/completions", json={"model": "demo", "messages": question, "prompt_logprobs": 0}
    ).json()
    of_chat = [next(iter(by_id.values()))["decoded_token"] for by_id in chat["prompt_logprobs"][1:]]
    assert of_chat == [entry["decoded_token"] for entry in expected[: len(of_chat)]]
    assert len(of_chat) == chat["usage"]["prompt_tokens"] - 1


def test_prompt_logprobs_of_a_long_prompt_leave_the_server_responsive(
    client: httpx.Client, server: InProcessServer
) -> None:
    [choice] = complete(client, prompt=[60, 61] * 500, prompt_logprobs=20, max_tokens=1)["choices"]
    assert len(choice["prompt_logprobs"]) == 1000
    assert all(20 <= len(by_id) <= 21 for by_id in choice["prompt_logprobs"][1:])
    server.wait_until_idle()


def test_best_of_returns_the_most_probable_completions(client: httpx.Client) -> None:
    fields = {"temperature": 2.0, "seed": 3, "max_tokens": 8, "logprobs": 0, "prompt": "1+1="}

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return float(sum(values) / len(values))

    candidates = complete(client, **fields, n=6, ignore_eos=True)["choices"]
    best = complete(client, **fields, n=2, best_of=6, ignore_eos=True)
    ranked = sorted(candidates, key=mean, reverse=True)
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert best["usage"]["completion_tokens"] == 48
    parameters = {"temperature": 2.0, "seed": 3, "max_tokens": 8, "best_of": 6, "ignore_eos": True}
    body = {"text_input": "1+1=", "parameters": parameters}
    assert client.post("/v2/models/demo/generate", json=body).json()["text_output"] == ranked[0]["text"]
    predicted = client.post("/v1/models/demo:predict", json={"instances": ["1+1="], "parameters": parameters}).json()
    assert predicted["predictions"] == [ranked[0]["text"]]
    assert client.post("/v2/models/demo/generate_stream", json=body).status_code == 422


def test_logit_bias_and_allowed_tokens_decide_the_token(client: httpx.Client) -> None:
    def token_of(text: str) -> int:
        [choice] = complete(client, prompt=text, prompt_logprobs=0, max_tokens=1)["choices"]
        return int(next(iter(choice["prompt_logprobs"][-1])))

    seven, eight = token_of("7"), token_of("8")
    biased = complete(client, max_tokens=3, logit_bias={str(seven): 100})
    assert biased["choices"][0]["text"] == "777"
    allowed = complete(client, max_tokens=20, temperature=2.0, allowed_token_ids=[seven, eight])
    assert set(allowed["choices"][0]["text"]) <= {"7", "8"}
    assert allowed["usage"]["completion_tokens"] == 20
    outputs = infer(client, parameters={"max_tokens": 3, "logit_bias": json.dumps({str(eight): 100})})
    assert outputs["text_output"] == ["888"]
    body = {"model": "demo", "prompt": "1", "logit_bias": {"99999": 1}}
    response = client.post("/v1/completions", json=body)
    assert (response.status_code, "Unknown token id in logit_bias: 99999" in response.text) == (400, True)


def test_truncated_prompt_is_its_end(client: httpx.Client) -> None:
    for limit, count in ((5, 5), (-1, 1014)):
        response = complete(client, prompt="1" * 3000, truncate_prompt_tokens=limit, max_tokens=10)
        assert response["usage"]["prompt_tokens"] == count
