"""A generation config with every kind of field, over HTTP."""

import json
from collections.abc import Iterator

import httpx
import pytest
from transformers import AutoTokenizer

from devtools.paths import DEMO_MODEL
from tests.predictor import servers
from tests.predictor.servers import InProcessServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    """The demo model with fields that change its answers."""
    directory = tmp_path_factory.mktemp("weights")
    for file in DEMO_MODEL.iterdir():
        if file.name != "generation_config.json":
            (directory / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = {
        "eos_token_id": [tokenizer.convert_tokens_to_ids("<|system|>")],
        "stop_strings": ["8"],
        "bad_words_ids": [tokenizer.encode("42", add_special_tokens=False)],
        "begin_suppress_tokens": tokenizer.encode("7", add_special_tokens=False),
        "typical_p": 0.5,
        "num_beams": 4,
    }
    (directory / "generation_config.json").write_text(json.dumps(config))
    with servers.in_process("--model_dir", str(directory), model_name="generation-config") as running:
        yield running


def complete(server: InProcessServer, prompt: str, **fields: object) -> dict[str, object]:
    body = {"model": server.model_name, "prompt": prompt, "max_tokens": 16, **fields}
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == httpx.codes.OK, response.text
    choice: dict[str, object] = response.json()["choices"][0]
    return choice


def test_completion_ends_at_the_tokenizers_end_of_sequence(server: InProcessServer) -> None:
    choice = complete(server, "3+4=")
    assert (choice["text"], choice["finish_reason"]) == (" 3+4=7 0+0=0 7", "stop")


def test_completion_ends_at_the_models_and_the_requests_stop_strings(server: InProcessServer) -> None:
    assert complete(server, "9+9=")["text"] == " 9+9=1"
    assert complete(server, "9+9=", stop="=")["text"] == " 9+9"


def test_completion_has_no_bad_word(server: InProcessServer) -> None:
    text = str(complete(server, "20+22=")["text"])
    assert text.startswith(" 0+2=2 2+2=4 ")
    assert "42" not in text


def test_completion_does_not_begin_with_suppressed_tokens(server: InProcessServer) -> None:
    assert not str(complete(server, "3+4= 3+4=", max_tokens=1)["text"]).startswith("7")


def test_start_names_unsupported_fields(server: InProcessServer) -> None:
    [line] = [line for line in server.log.splitlines() if "not supported" in line]
    assert "generation_config.json has fields that are not supported: num_beams=4;" in line
