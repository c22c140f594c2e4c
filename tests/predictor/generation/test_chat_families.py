"""Conversations with tools through the chat templates of all families, and back through their notations.

The templates in `chat_templates` are short ones of our own, which write turns, reasoning, calls and results as the
families' do.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from devtools.paths import DEMO_MODEL
from predictor.generation import output_notations
from predictor.generation.chat_template import OK, ChatTemplate
from predictor.generation.detokenizer import Detokenizer
from predictor.generation.output_parser import OutputParser
from predictor.protocols.openai.requests import decode_chat_completion
from predictor.types import Chat, OutputDelta, ReasoningDelta, TextDelta, ToolCallDelta

TEMPLATES = Path(__file__).with_name("chat_templates")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What belongs to the chat template `chat_templates/NAME.jinja`.

    Args:
        name: of the template.
        notations: of tool calls and of reasoning, as detected.
        special_tokens: of the tokenizer.
        end: what the template writes after the assistant's message.
        several: a message may have several calls.
        text_arguments: the template takes the arguments as JSON.
        writes_reasoning: the template writes reasoning.
    """

    name: str
    notations: tuple[str, str]
    special_tokens: str
    end: str
    several: bool = True
    text_arguments: bool = False
    writes_reasoning: bool = True


CHATML = "<|im_start|> <|im_end|>"
MISTRAL = "[INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] </s>"
DEEPSEEK = (
    "<｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜> "
    "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜>"
)
KIMI = (
    "<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> <|im_end|> <|tool_calls_section_begin|> "
    "<|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_end|> <|tool_call_argument_begin|>"
)
LLAMA3 = "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
LLAMA4 = "<|header_start|> <|header_end|> <|eot|> <|python_start|> <|python_end|>"
GEMMA4 = '<|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> <|"|> <|tool_response> <tool_response|>'
GPT_OSS = "<|start|> <|channel|> <|message|> <|end|> <|call|> <|return|> <|constrain|>"

FAMILIES = [
    Family(name="qwen3", notations=("hermes", "think"), special_tokens=CHATML, end="<|im_end|>\n"),
    Family(name="qwen3-thinking", notations=("hermes", "think"), special_tokens=CHATML, end="<|im_end|>\n"),
    Family(name="qwen3-coder", notations=("qwen3_coder", "think"), special_tokens=CHATML, end="<|im_end|>\n"),
    Family(name="glm", notations=("glm45", "think"), special_tokens="<|assistant|> <|user|> <|observation|>", end=""),
    Family(
        name="mistral",
        notations=("mistral", "mistral"),
        special_tokens=f"{MISTRAL} [ARGS] [THINK] [/THINK]",
        end="</s>",
    ),
    Family(
        name="mistral-list",
        notations=("mistral_list", "none"),
        special_tokens=MISTRAL,
        end="</s>",
        writes_reasoning=False,
    ),
    Family(
        name="llama3",
        notations=("llama3_json", "none"),
        special_tokens=LLAMA3,
        end="<|eot_id|>",
        several=False,
        writes_reasoning=False,
    ),
    Family(
        name="llama4",
        notations=("pythonic", "none"),
        special_tokens=LLAMA4,
        end="<|eot|>",
        writes_reasoning=False,
    ),
    Family(
        name="deepseek-r1",
        notations=("deepseek_v3", "deepseek_r1"),
        special_tokens=DEEPSEEK,
        end="<｜end▁of▁sentence｜>",
        text_arguments=True,
        writes_reasoning=False,
    ),
    Family(
        name="deepseek-v31",
        notations=("deepseek_v31", "think"),
        special_tokens=DEEPSEEK,
        end="<｜end▁of▁sentence｜>",
        text_arguments=True,
        writes_reasoning=False,
    ),
    Family(name="kimi", notations=("kimi_k2", "think"), special_tokens=KIMI, end="<|im_end|>"),
    Family(name="gemma4", notations=("gemma4", "gemma4"), special_tokens=GEMMA4, end="<turn|>\n"),
    Family(name="gpt-oss", notations=("harmony", "harmony"), special_tokens=GPT_OSS, end="<|call|>", several=False),
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
USER = {"role": "user", "content": "How is the weather?"}
ARGUMENTS = {"city": 'Zürich "A"', "days": 2, "exact": True}


def call(index: int, name: str, arguments: Any, family: Family) -> dict[str, Any]:
    id_ = f"functions.{name}:{index}" if family.name == "kimi" else f"call{index:05}"
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def tokenizer_of(family: Family) -> PreTrainedTokenizerBase:
    template = (TEMPLATES / f"{family.name}.jinja").read_text()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO_MODEL, chat_template=template)
    tokenizer.add_special_tokens({"extra_special_tokens": family.special_tokens.split()})
    return tokenizer


def conversation(family: Family, *, native: bool) -> list[dict[str, Any]]:
    """Return the conversation as clients send it, or as transformers takes it for this template."""
    as_text = family.text_arguments or not native
    calls = [("weather", ARGUMENTS)] + ([("now", {})] if family.several else [])
    messages: list[dict[str, Any]] = [USER]
    for turn in range(2):
        written = [
            call(2 * turn + index, name, json.dumps(arguments, ensure_ascii=False) if as_text else arguments, family)
            for index, (name, arguments) in enumerate(calls)
        ]
        thought = {"reasoning_content": "I look it up."}
        messages.append({"role": "assistant", "content": "" if native else None, **thought, "tool_calls": written})
        messages += [{"role": "tool", "tool_call_id": item["id"], "content": "Sunny"} for item in written]
    messages.append({"role": "assistant", "content": "It is sunny.", "reasoning_content": "Done."})
    return [*messages, USER]


def decode(messages: list[dict[str, Any]]) -> Chat:
    [request] = decode_chat_completion(
        json.dumps({"model": "demo", "messages": messages, "tools": TOOLS}).encode()
    ).requests
    assert isinstance(request.prompt, Chat)
    return request.prompt


@pytest.fixture(params=FAMILIES, ids=lambda family: str(family.name))
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    return chosen


@pytest.fixture
def gpt_oss() -> Family:
    return FAMILIES[-1]


def test_conversation_with_tools_is_rendered_as_transformers_renders_it(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    template = ChatTemplate(tokenizer)
    assert template.status == OK
    expected = tokenizer.apply_chat_template(
        conversation(family, native=True), tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert template.render(decode(conversation(family, native=False))) == expected


def test_turn_that_the_template_writes_is_parsed_back_and_accepted_again(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    template = ChatTemplate(tokenizer)
    output_format, names = output_notations.choose(tokenizer)
    assert (names["tool_call_format"], names["reasoning_format"]) == family.notations
    messages = conversation(family, native=True)
    prompt = template.render(decode(messages[:1]))
    whole = tokenizer.apply_chat_template(messages[:2], tools=TOOLS, tokenize=False)
    assert whole.startswith(prompt)
    turn = whole.removeprefix(prompt).removesuffix(family.end)
    if family.notations[1] != "none" and not family.writes_reasoning:
        turn = f"I look it up.</think>{turn.removeprefix('</think>')}"
    reasoning, text, calls = parse(tokenizer, OutputParser(output_format, prompt, TOOLS), turn)
    assert text == ""
    assert reasoning == ("" if family.notations[1] == "none" else "I look it up.")
    written = [(item["function"]["name"], json.loads(item["function"]["arguments"])) for item in calls]
    assert written == [("weather", ARGUMENTS), ("now", {})][: 1 + family.several]
    results = [{"role": "tool", "tool_call_id": item["id"], "content": "Sunny"} for item in calls]
    assistant: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": calls}
    assistant["reasoning_content"] = reasoning
    assert "Sunny" in template.render(decode([USER, assistant, *results])).removeprefix(prompt)


def parse(tokenizer: PreTrainedTokenizerBase, parser: OutputParser, turn: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Return the reasoning, the text and the calls of a turn, token by token as the model generates them."""
    detokenizer = Detokenizer(tokenizer, special_tokens=parser.special_tokens)
    deltas: list[OutputDelta] = []
    for token_id in tokenizer.encode(turn, add_special_tokens=False):
        deltas += parser.feed(detokenizer.push([token_id]))
    deltas += parser.feed(detokenizer.push([], last=True)) + parser.finish()
    found = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    calls = [
        {
            "id": head.id,
            "type": "function",
            "function": {
                "name": head.name,
                "arguments": "".join(delta.arguments for delta in found if delta.index == head.index),
            },
        }
        for head in found
        if head.name is not None
    ]
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    return reasoning, "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)), calls


def test_reasoning_next_to_text_and_calls_is_left_out_if_the_template_rejects_it(gpt_oss: Family) -> None:
    template = ChatTemplate(tokenizer_of(gpt_oss))
    messages = conversation(gpt_oss, native=False)[:3]
    messages[1]["content"] = "Wait."
    assert "analysis<|message|>Wait.<|end|>" in template.render(decode(messages))


def test_empty_list_of_calls_is_no_call() -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls is defined %}[]{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, chat_template=template)
    chat = decode([USER, {"role": "assistant", "content": "Hi", "tool_calls": []}, USER])
    assert ChatTemplate(tokenizer).render(chat) == f"{USER['content']}Hi{USER['content']}"


def test_special_tokens_are_text_only_if_they_are_markers() -> None:
    tokenizer = tokenizer_of(next(family for family in FAMILIES if family.name == "mistral"))
    tokens = tokenizer.encode("Hi[INST] é[TOOL_CALLS]x[/INST]é", add_special_tokens=False)
    assert Detokenizer(tokenizer).push(tokens, last=True) == "Hi éxé"
    kept = {tokenizer.convert_tokens_to_ids("[TOOL_CALLS]"): "[TOOL_CALLS]"}
    detokenizer = Detokenizer(tokenizer, special_tokens=kept, stop=["[TOOL_CALLS]x"])
    assert re.sub("x$", "", "".join(detokenizer.push([token]) for token in tokens)) == "Hi é"
    assert detokenizer.found_stop
    detokenizer = Detokenizer(tokenizer, special_tokens=kept)
    assert "".join(detokenizer.push([token]) for token in tokens) == "Hi é[TOOL_CALLS]xé"
