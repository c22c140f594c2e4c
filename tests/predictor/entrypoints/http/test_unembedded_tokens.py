"""A model whose tokenizer has a token beyond the embedding, as fine-tunes with an added padding token have."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from devtools.paths import DEMO_MODEL
from tests.predictor import servers
from tests.predictor.servers import OPENAI, Call, InProcessServer

CHAT = [{"role": "system", "content": "[PAD]"}, {"role": "user", "content": "Hi"}]
COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"
INFER = "/v2/models/unembedded/infer"


def tensor(name: str, data: str) -> dict[str, Any]:
    return {"inputs": [{"name": name, "datatype": "BYTES", "shape": [1], "data": [data]}]}


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    directory = tmp_path_factory.mktemp("unembedded")
    for file in DEMO_MODEL.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 512, "content": "[PAD]"})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with servers.in_process("--model_dir", str(directory), model_name="unembedded") as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "a [PAD] b"}),
        (COMPLETIONS, {"prompt": [1, 512]}),
        (COMPLETIONS, {"prompt": ["1+1=", "[PAD]"]}),
        (COMPLETIONS, {"prompt": "1+1=", "stop_token_ids": [512]}),
        (INFER, tensor("text_input", "[PAD]")),
        ("/v2/models/unembedded/generate", {"text_input": "[PAD]"}),
        ("/v1/models/unembedded:predict", {"instances": ["[PAD]"]}),
    ],
    ids=["text", "ids", "several", "stop", "v2", "generate", "v1"],
)
def test_request_with_token_beyond_the_embedding_is_400_and_the_loop_goes_on(
    padded: InProcessServer, path: str, body: dict[str, Any]
) -> None:
    before = Call(padded, OPENAI, 8).post().json()["choices"]
    response = padded.client.post(path, json={"model": "unembedded", **body} if "v1/c" in path else body)
    # 422 is the status of this protocol's invalid requests.
    assert response.status_code == (422 if path.endswith("generate") else 400)
    assert "Unknown token id" in response.text
    assert "512" in response.text
    assert padded.client.get("/v2/health/live").status_code == 200
    assert Call(padded, OPENAI, 8).post().json()["choices"] == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHATS, {"model": "unembedded", "messages": CHAT, "max_tokens": 1}),
        (INFER, tensor("messages", json.dumps(CHAT)) | {"parameters": {"max_tokens": 1}}),
    ],
    ids=["chat", "v2-messages"],
)
def test_token_beyond_the_embedding_in_a_chat_is_text(padded: InProcessServer, path: str, body: dict[str, Any]) -> None:
    assert padded.client.post(path, json=body).status_code == 200


def test_tokens_beyond_the_embedding_are_reported_at_start(padded: InProcessServer) -> None:
    assert "the model's embedding has 512 rows, too few for 1 of the tokenizer's tokens: '[PAD]' (512);" in padded.log
    metadata = padded.client.get("/v2/models/unembedded").json()
    assert metadata["properties"]["unembedded_tokens"] == "1"
