"""KServe v1 beside OpenAI under the same prefix, over HTTP; what both decode and encode is in `test_generate.py`."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.errors import InvalidRequest
from predictor.protocols import kserve_v1, open_inference_generate

PREDICT = "/v1/models/demo:predict"
GREEDY = {"temperature": 0, "max_tokens": 40}
MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["instances", "text_input", "parameters", "role", "stop"]), inner, max_size=3)
    ),
)


@pytest.mark.parametrize(
    ("instance", "expected"),
    [
        (5, "instances.0: expected a prompt or a list of messages."),
        ({"text": "a"}, "instances.0: expected a prompt or a list of messages."),
        ([], "instances.0.messages: list should have at least 1 item"),
        (["a"], "instances.0.messages.0: input should be an object."),
        ([{"role": "user"}], "instances.0.messages.0.content: field required."),
        ("", "instances.0.prompt: string should have at least 1 character."),
    ],
)
def test_names_the_instance_that_is_wrong(instance: Any, expected: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        kserve_v1.decode(json.dumps({"instances": [instance]}).encode())
    assert str(raised.value).startswith(expected)


@given(st.binary() | anything.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_decoded_or_refused_without_a_class_name(body: bytes) -> None:
    for decode in (kserve_v1.decode, lambda raw: open_inference_generate.decode(raw, "m", None)):
        reason = ""
        try:
            decode(body)
        except InvalidRequest as error:
            reason = str(error)
        assert not any(
            word in reason
            for word in ("_PredictRequest", "_GenerateRequest", "_Message", "Sampling", "_Parameters", "set_int_max")
        )


def test_answers_prompts_and_chats_in_order(client: httpx.Client) -> None:
    response = client.post(PREDICT, json={"instances": ["17+25=", MESSAGES], "parameters": GREEDY})
    assert response.json() == {"predictions": [" 7+5=12 1+2+1=4 42", "7+5=12 1+2+1=4 42"]}


def test_one_wrong_instance_refuses_them_all(client: httpx.Client) -> None:
    response = client.post(PREDICT, json={"instances": ["17+25=", "1" * 2000], "parameters": GREEDY})
    assert (response.status_code, list(response.json())) == (400, ["error"])


def test_the_list_of_models_is_kserves_and_openais(client: httpx.Client) -> None:
    both = client.get("/v1/models").json()
    assert both["models"] == ["demo"]
    assert [model["id"] for model in both["data"]] == ["demo"]
    assert client.get("/openai/v1/models").json() == {name: both[name] for name in ("object", "data")}


def test_the_model_is_kserves_and_openais(client: httpx.Client) -> None:
    both = client.get("/v1/models/demo").json()
    assert (both["name"], both["ready"]) == ("demo", True)
    assert (both["id"], both["object"], both["max_model_len"]) == ("demo", "model", 1024)
    alone = client.get("/openai/v1/models/demo").json()
    assert alone == {name: both[name] for name in alone}


def test_a_model_that_is_not_here_is_not_found(client: httpx.Client) -> None:
    for response in (
        client.get("/v1/models/other"),
        client.post("/v1/models/other:predict", json={"instances": ["a"]}),
    ):
        assert response.status_code == 404
        assert response.json() == {"error": "Model not found: 'other'. Use 'demo'."}


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_predict_is_posted(client: httpx.Client, method: str) -> None:
    response = client.request(method, PREDICT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json() == {"error": f"Method not allowed: {method} {PREDICT}. Use POST."}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1", "/v1/chat", "/openai", "/openai/v1/models/other"])
def test_a_route_that_openai_would_have_is_refused_in_its_form(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("path", ["/v2/embed", "/v1/models/a/b", "/", "/v1/models/demo:explain"])
def test_any_other_is_refused_in_one_sentence(client: httpx.Client, path: str) -> None:
    response = client.put(path)
    assert response.status_code in (404, 405)
    assert isinstance(response.json()["error"], str)
