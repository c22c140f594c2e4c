"""Spaces of a SentencePiece tokenizer's tokens, over HTTP: each token of the model is a word with a space before it."""

import re
from collections.abc import Iterator

import pytest

from devtools.paths import DEMO_MODEL
from tests.predictor import sentencepiece, servers
from tests.predictor.servers import PROTOCOLS, Call, InProcessServer, StreamReader

EMBEDDINGS = 512
TEMPLATE = "{{ messages[0].content }}<|assistant|>"
WORDS = re.compile(r"( w[a-p]+){8}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    """The demo model with a tokenizer whose tokens are words of letters a to p, by their number."""
    directory = tmp_path_factory.mktemp("weights")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (directory / name).symlink_to(DEMO_MODEL / name)
    numbers = range(EMBEDDINGS - len(sentencepiece.SPECIAL))
    letters = ("".join("abcdefghijklmnop"[int(digit, 16)] for digit in f"{number:x}") for number in numbers)
    tokenizer = sentencepiece.llama([f"▁w{word}" for word in letters], byte_fallback=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    with servers.in_process("--model_dir", str(directory), model_name="sentencepiece") as running:
        yield running


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_completion_begins_with_the_space_of_its_first_word(server: InProcessServer, protocol: str) -> None:
    response = Call(server, protocol, 8, prompt="wb wc").post().json()
    outputs = {output["name"]: output["data"][0] for output in response.get("outputs", [])}
    text = response["choices"][0]["text"] if "choices" in response else outputs.get("text_output")
    assert WORDS.fullmatch(text or response["text_output"])


def test_streamed_completion_is_the_whole_one(server: InProcessServer) -> None:
    call = Call(server, servers.OPENAI, 8, prompt="wb wc")
    assert StreamReader().read(call).text == call.post().json()["choices"][0]["text"]


def test_logprobs_offsets_are_those_of_the_tokens_in_the_text(server: InProcessServer) -> None:
    choice = Call(server, servers.OPENAI, 8, prompt="wb wc", more={"logprobs": 2}).post().json()["choices"][0]
    logprobs, text = choice["logprobs"], choice["text"]
    assert "".join(logprobs["tokens"]) == text
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset:].startswith(token)


def test_chat_after_a_special_token_begins_without_a_space(server: InProcessServer) -> None:
    body = {"model": server.model_name, "messages": [{"role": "user", "content": "wb wc"}], "max_tokens": 8}
    chat = server.client.post("/v1/chat/completions", json={**body, "ignore_eos": True, "logprobs": True}).json()
    [choice] = chat["choices"]
    assert WORDS.fullmatch(" " + choice["message"]["content"])
    assert "".join(token["token"] for token in choice["logprobs"]["content"]) == choice["message"]["content"]
