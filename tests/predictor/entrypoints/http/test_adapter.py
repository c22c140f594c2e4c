"""The demo model with `demo/adapter`, which answers small sums in words: published, merged and served."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.train_adapter import lessons
from devtools.paths import ADAPTER, DEMO_MODEL
from storage_initializer import settings as initializer_settings
from storage_initializer.cli import arguments, commands
from tests.predictor import servers
from tests.predictor.servers import InProcessServer

IN_WORDS = dict(list(lessons().items())[::4])
QUESTIONS = [*IN_WORDS, "What is 20 + 30?", "Take 3 from 40.", "Who are you?"]
MODEL, LORA = DEMO_MODEL.as_uri(), ADAPTER.as_uri()


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("volume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTER_REFERENCE", LORA)
        commands.run(arguments.parse([MODEL, str(root)]), initializer_settings.load({}))
    return root


@pytest.fixture(scope="module")
def flags(volume: Path) -> list[str]:
    return ["--model_dir", str(volume), "--model_reference", MODEL, "--adapter_reference", LORA]


@pytest.fixture(scope="module")
def adapted(flags: list[str]) -> Iterator[InProcessServer]:
    with servers.in_process(*flags, model_name="adapted") as server:
        yield server


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Answers of PEFT's model, by transformers' `generate` in float32."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), ADAPTER).eval()
    answers = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        answers.append(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def ask(client: httpx.Client, model: str, question: str) -> str:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 24}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_answers_with_adapter_are_those_of_peft(
    adapted: InProcessServer, client: httpx.Client, expected: list[str]
) -> None:
    answers = [ask(adapted.client, "adapted", question) for question in QUESTIONS]
    assert answers == expected
    assert answers[: len(IN_WORDS)] == list(IN_WORDS.values())
    assert answers != [ask(client, "demo", question) for question in QUESTIONS]


def test_answers_in_8_bits_with_adapter_are_in_words(flags: list[str]) -> None:
    with servers.in_process(*flags, "--quantization", "8bit", model_name="adapted-8bit") as server:
        right = sum(ask(server.client, "adapted-8bit", question) == word for question, word in IN_WORDS.items())
        assert server.client.get("/v2/models/adapted-8bit").json()["properties"]["quantization"] == "8bit"
    assert right >= len(IN_WORDS) - 1


def test_adapter_is_named_in_metadata_models_and_metrics(adapted: InProcessServer, volume: Path) -> None:
    commit = (volume / "file--adapter" / "refs" / "main").read_text().strip()
    properties = adapted.client.get("/v2/models/adapted").json()["properties"]
    assert (properties["adapter"], properties["adapter_commit"]) == (LORA, commit)
    [card] = adapted.client.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["parent"]) == ("adapted", LORA, MODEL)
    assert adapted.client.get("/v1/models/adapted").json()["root"] == LORA
    assert adapted.metric("model_info", adapter=LORA) == 1


def test_model_without_adapter_has_no_parent(client: httpx.Client) -> None:
    assert not {"root", "parent"} & client.get("/v1/models/demo").json().keys()
