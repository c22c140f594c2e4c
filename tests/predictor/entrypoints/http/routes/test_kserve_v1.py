"""KServe v1 over HTTP, which shares its prefix with OpenAI."""

import httpx
import pytest

PREDICT = "/v1/models/demo:predict"
GREEDY = {"temperature": 0, "max_tokens": 40}
MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
ANSWER = " 7+5=12 1+2+1=4 42"


def test_predict_prompts_and_chats_keeps_their_order(client: httpx.Client) -> None:
    response = client.post(PREDICT, json={"instances": ["17+25=", MESSAGES], "parameters": GREEDY})
    assert response.json() == {"predictions": [" 7+5=12 1+2+1=4 42", "7+5=12 1+2+1=4 42"]}


def test_predict_with_one_invalid_instance_returns_400(client: httpx.Client) -> None:
    response = client.post(PREDICT, json={"instances": ["17+25=", "1" * 2000], "parameters": GREEDY})
    assert (response.status_code, list(response.json())) == (400, ["error"])


def test_models_list_has_kserves_and_openais_fields(client: httpx.Client) -> None:
    both = client.get("/v1/models").json()
    assert both["models"] == ["demo"]
    assert [model["id"] for model in both["data"]] == ["demo"]
    assert client.get("/openai/v1/models").json() == {name: both[name] for name in ("object", "data")}


def test_model_has_kserves_and_openais_fields(client: httpx.Client) -> None:
    both = client.get("/v1/models/demo").json()
    assert (both["name"], both["ready"]) == ("demo", True)
    assert (both["id"], both["object"], both["max_model_len"]) == ("demo", "model", 1024)
    alone = client.get("/openai/v1/models/demo").json()
    assert alone == {name: both[name] for name in alone}


def test_unknown_model_returns_404(client: httpx.Client) -> None:
    for response in (
        client.get("/v1/models/other"),
        client.post("/v1/models/other:predict", json={"instances": ["a"]}),
    ):
        assert response.status_code == 404
        assert response.json() == {"error": "Model not found: 'other'. Use 'demo'."}


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_predict_by_another_method_returns_405(client: httpx.Client, method: str) -> None:
    response = client.request(method, PREDICT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json() == {"error": f"Method not allowed: {method} {PREDICT}. Use POST."}


@pytest.mark.parametrize("path", ["/v1/moderations", "/v1", "/v1/chat", "/openai", "/openai/v1/models/other"])
def test_unknown_openai_route_returns_openais_error(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("path", ["/v2/embed", "/v1/models/a/b", "/", "/v1/models/demo:explain"])
def test_unknown_route_returns_a_sentence(client: httpx.Client, path: str) -> None:
    response = client.put(path)
    assert response.status_code in (404, 405)
    assert isinstance(response.json()["error"], str)


def test_predict_and_list_models(client: httpx.Client) -> None:
    body = {"instances": ["17+25=", "17+25="], "parameters": GREEDY}
    assert client.post("/v1/models/demo:predict", json=body).json() == {"predictions": [ANSWER, ANSWER]}
    assert client.get("/v1/models").json()["models"] == ["demo"]
    assert client.get("/v1/models/demo").json()["ready"] is True
