import sys
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from predictor.errors import InvalidRequest, PromptTooLong
from predictor.generation.prompts import Prompts
from predictor.types import Chat, GenerationRequest, SamplingParams

HELLO = Chat(({"role": "user", "content": "Hi"},))


class WithTemplate:
    """A tokenizer with another chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.all_special_ids = tokenizer.all_special_ids
        self.encode = tokenizer.encode
        self.decode = tokenizer.decode

    def apply_chat_template(self, conversation: list[Any], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **options))


def test_encode_text_adds_one_bos(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
    ids, _ = prompts.encode(GenerationRequest("7+5="))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "7+5="


def test_encode_chat_applies_template_with_one_bos(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
    ids, _ = prompts.encode(GenerationRequest(HELLO))
    assert tokenizer.decode(ids) == "<|begin|><|user|>Hi<|end|><|assistant|>"


def test_encode_chat_rejected_by_template_reports_reason(prompts: Prompts) -> None:
    with pytest.raises(InvalidRequest, match="role must be system, user or assistant, not judge"):
        prompts.encode(GenerationRequest(Chat(({"role": "judge", "content": "Hi"},))))


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content + 1 }}", "{{ messages[0].missing.name }}", "{{ 1 // 0 }}", "{% nonsense %}"],
    ids=["type", "undefined", "arithmetic", "syntax"],
)
def test_encode_chat_with_failing_template_is_invalid_request(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    failing = replace(prompts, tokenizer=WithTemplate(tokenizer, template))
    with pytest.raises(InvalidRequest, match="chat template rejected the messages"):
        failing.encode(GenerationRequest(HELLO))


def test_encode_chat_without_template_is_invalid_request(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
    without = replace(prompts, tokenizer=WithTemplate(tokenizer, None))
    with pytest.raises(InvalidRequest, match="has no chat template"):
        without.encode(GenerationRequest(HELLO))


def test_encode_chat_passes_tools_to_template(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
    with_tools = replace(prompts, tokenizer=WithTemplate(tokenizer, template))
    chat = Chat(HELLO.messages, ({"type": "function", "function": {"name": "7+5="}},))
    ids, _ = with_tools.encode(GenerationRequest(chat))
    assert tokenizer.decode(ids) == "7+5="


def test_encode_token_ids_keeps_them_and_text_decodes_them(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tuple(tokenizer.encode("7+5=", add_special_tokens=False))
    request = GenerationRequest(ids)
    assert prompts.encode(request)[0] == list(ids)
    assert prompts.text(request) == "7+5="


def test_encode_prompt_longer_than_context_is_too_long(prompts: Prompts) -> None:
    with pytest.raises(PromptTooLong, match=r"101 tokens. The context is 64 tokens .*; shorten the prompt"):
        prompts.encode(GenerationRequest("1" * 100))


@pytest.mark.parametrize(
    ("request_", "message", "field"),
    [
        (GenerationRequest(""), "prompt is empty", None),
        (GenerationRequest((5, 300)), "Unknown token id in the prompt: 300. This model's are 0 to 299", None),
        (GenerationRequest((-1,)), "Unknown token id in the prompt: -1", None),
        (GenerationRequest("1", SamplingParams(stop_token_ids=(301,))), "token id in stop_token_ids: 301", None),
        (
            GenerationRequest("1", SamplingParams(max_tokens=2, min_tokens=3)),
            "min_tokens is too large: 3. Set it to at most max_tokens, 2",
            "min_tokens",
        ),
    ],
    ids=["empty", "token-id", "negative-token-id", "stop-token-id", "min-tokens"],
)
def test_encode_invalid_request_names_problem_and_field(
    prompts: Prompts, request_: GenerationRequest, message: str, field: str | None
) -> None:
    with pytest.raises(InvalidRequest, match=message) as raised:
        prompts.encode(request_)
    assert raised.value.field == field


@pytest.mark.parametrize("prompt", ["1+1", HELLO], ids=["text", "chat"])
def test_encode_token_without_embedding_is_invalid_and_named(prompts: Prompts, prompt: str | Chat) -> None:
    last = max(prompts.encode(GenerationRequest(prompt))[0])
    too_few = replace(prompts, vocabulary_tokens=last, unembedded_tokens={last: "<pad>"})
    with pytest.raises(InvalidRequest, match=f"in the prompt: {last}, '<pad>'; remove it. This model's are 0 to"):
        too_few.encode(GenerationRequest(prompt))
    assert replace(prompts, vocabulary_tokens=last + 1).encode(GenerationRequest(prompt))


def test_encode_completes_sampling_with_model_defaults(prompts: Prompts) -> None:
    defaults = SamplingParams(max_tokens=40, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    _, sampling = replace(prompts, defaults=defaults).encode(
        GenerationRequest("1", SamplingParams(temperature=0.0, stop=("x",)))
    )
    assert sampling == replace(defaults, temperature=0.0, stop=("x",))


@pytest.mark.parametrize(("requested", "granted"), [(10, 10), (11, 10), (sys.maxsize, 10), (0, 0)])
def test_encode_max_tokens_is_limited_to_context(prompts: Prompts, requested: int, granted: int) -> None:
    _, sampling = prompts.encode(GenerationRequest("1" * 53, SamplingParams(max_tokens=requested)))
    assert sampling.max_tokens == granted


def test_encode_min_tokens_is_limited_to_context(prompts: Prompts) -> None:
    _, sampling = prompts.encode(GenerationRequest("1" * 53, SamplingParams(max_tokens=30, min_tokens=20)))
    assert (sampling.max_tokens, sampling.min_tokens) == (10, 10)


def test_encode_without_new_tokens_accepts_a_prompt_of_the_whole_context(prompts: Prompts) -> None:
    ids, _ = prompts.encode(GenerationRequest("1" * 63, SamplingParams(max_tokens=0)))
    assert len(ids) == 64
    for prompt, max_tokens in (("1" * 63, 1), ("1" * 64, 0)):
        with pytest.raises(PromptTooLong):
            prompts.encode(GenerationRequest(prompt, SamplingParams(max_tokens=max_tokens)))


def test_encode_default_max_tokens_is_limited_to_context(prompts: Prompts) -> None:
    _, sampling = prompts.encode(GenerationRequest("1" * 58))
    assert sampling.max_tokens == 5
