"""vLLM's routes for token ids of texts and chats, and back."""

from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
TOOL = {"type": "function", "function": {"name": "calculate", "parameters": {"type": "object"}}}


def tokenize(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


@pytest.mark.parametrize("prompt", ["7+5=12", "", "<|user|>Hi<|end|>", "héllo 😀 ", "17 " * 4000], ids=len)
def test_text_has_the_tokenizers_ids_and_comes_back(
    client: httpx.Client, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> None:
    ids = tokenizer.encode(prompt)
    assert tokenize(client, prompt=prompt, return_token_strs=True) == {
        "count": len(ids),
        "max_model_len": 1024,
        "tokens": ids,
        "token_strs": tokenizer.convert_ids_to_tokens(ids),
    }
    plain = tokenize(client, prompt=prompt, add_special_tokens=False, model="demo")
    assert (plain["tokens"], plain["token_strs"]) == (tokenizer.encode(prompt, add_special_tokens=False), None)
    assert client.post("/detokenize", json={"tokens": plain["tokens"]}).json() == {"prompt": prompt}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [TOOL]},
        {"add_generation_prompt": False},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "7+5"}], "continue_final_message": True},
    ],
    ids=["plain", "tools", "no-generation-prompt", "continued"],
)
def test_chat_has_the_tokens_that_a_completion_counts(client: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"messages": MESSAGES} | fields
    tokens = tokenize(client, **body)
    completion = client.post(
        "/v1/chat/completions", json={"model": "demo", "max_tokens": 1, "prompt_logprobs": 0} | body
    )
    assert tokens["count"] == len(tokens["tokens"]) == completion.json()["usage"]["prompt_tokens"]
    scored = [int(next(iter(by_id))) for by_id in completion.json()["prompt_logprobs"][1:]]
    assert scored == tokens["tokens"][1:]


def test_tokenizer_info_has_the_special_tokens_and_the_template(
    client: httpx.Client, tokenizer: PreTrainedTokenizerBase
) -> None:
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<|begin|>", "<|end|>")
    assert info["chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/tokenize", {}, 400, "The body needs either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "The body needs either prompt or messages"),
        ("/tokenize", {"prompt": 7}, 400, "prompt: input should be a valid string"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "content is required"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "add_special_tokens: special tokens"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "other"),
        ("/tokenize", {"prompt": "1" * 20_000}, 400, "more than 16384 tokens, 16 times the context"),
        ("/detokenize", {"tokens": [60, 100_000]}, 400, "Unknown token id in tokens: 100000"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens.0: input should be a valid integer"),
        ("/detokenize", {"tokens": [60], "model": "other"}, 404, "other"),
    ],
)
def test_invalid_request_has_openais_error(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, reason: str
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == status
    assert reason in response.json()["error"]["message"]


def test_unknown_fields_are_named(client: httpx.Client) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [60]})):
        response = client.post(path, json=body | {"mood": 1, "user": "u"})
        assert (response.status_code, response.headers["x-ignored-fields"]) == (200, "mood")
