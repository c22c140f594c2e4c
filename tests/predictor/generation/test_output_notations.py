"""Choice of the notation by settings, by the tokenizer and by the chat template."""

import logging
import re
from typing import Any, get_args

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from devtools.paths import DEMO_MODEL, ROOT
from predictor.generation import output_notations
from predictor.generation.output_notations import REASONING, TOOL_CALLS
from predictor.generation.output_parser import OutputParser
from predictor.settings import Settings
from predictor.types import ReasoningDelta, TextDelta, ToolCallDelta

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
OWN = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "<r>", "close": ["</r>", "</reason>"]},
        "tool_calls": {
            "open_pattern": r"<call (?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "kv-lines",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"\s*<\|end\|>"},
    },
}


def tokenizer_with(template: Any, **attributes: Any) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO_MODEL, chat_template=template)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def names(template: Any, tool_calls: str = "auto", reasoning: str = "auto", **attributes: Any) -> tuple[str, str]:
    _, found = output_notations.choose(tokenizer_with(template, **attributes), tool_calls, reasoning)
    return found["tool_call_format"], found["reasoning_format"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("<think> </think> <tool_call>", ("hermes", "think")),
        ("</think> <tool_call> <function=", ("qwen3_coder", "deepseek_r1")),
        ("<tool_call> <arg_key> <think></think>", ("glm45", "think")),
        ("[TOOL_CALLS] [ARGS] [THINK]", ("mistral", "mistral")),
        ("[TOOL_CALLS][", ("mistral_list", "none")),
        ("<|python_tag|>", ("llama3_json", "none")),
        ("<|python_start|>", ("pythonic", "none")),
        ("<｜tool▁call▁begin｜>\n```json </think>", ("deepseek_v3", "deepseek_r1")),
        ("<｜tool▁call▁begin｜> <think></think>", ("deepseek_v31", "think")),
        ("<|tool_call_argument_begin|>", ("kimi_k2", "none")),
        ("<|channel|>analysis<|message|>", ("harmony", "harmony")),
        ("<|tool_call>call: <|channel>", ("gemma4", "gemma4")),
        ("```tool_code", ("gemma3", "none")),
        ("{{ messages }}", ("none", "none")),
        ({"default": "{{ messages }}", "tool_use": "<tool_call>"}, ("hermes", "none")),
        ((DEMO_MODEL / "chat_template.jinja").read_text(), ("hermes", "none")),
    ],
)
def test_chat_template_shows_the_notations(template: Any, expected: tuple[str, str]) -> None:
    assert names(template) == expected


def test_settings_choose_the_notations_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "predictor"):
        assert names("<tool_call>", "mistral", "none") == ("mistral", "none")
    assert "format of reasoning: none, of tool calls: mistral" in caplog.text
    assert names("<tool_call></think>", "none") == ("none", "deepseek_r1")
    assert names("<tool_call>", "none", "think", response_template=OWN) == ("none", "think")


@pytest.mark.parametrize(("setting", "table"), [("tool_call_format", TOOL_CALLS), ("reasoning_format", REASONING)])
def test_documentation_has_every_notation_and_what_its_template_contains(setting: str, table: dict[str, Any]) -> None:
    _, _, section = (ROOT / "docs/output-formats.md").read_text().partition(f"| `--{setting}` |")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", section.partition("\n\n")[0], re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(table)
    for name, contains in rows:
        present, *_ = contains.partition(" without ")
        template = " ".join(re.findall(r"`([^`]+)`", present)).replace("\\|", "|")
        template = template.replace("tool_code", "```tool_code") + ("```json" if "block of JSON" in present else "")
        assert name in names(template), contains


@pytest.mark.parametrize(("setting", "table"), [("tool_call_format", TOOL_CALLS), ("reasoning_format", REASONING)])
def test_settings_name_every_notation(setting: str, table: dict[str, Any]) -> None:
    assert set(get_args(Settings.model_fields[setting].annotation)) == {"auto", "none", *table}


def test_model_without_chat_template_has_none() -> None:
    assert names("", chat_template=None) == ("none", "none")


def test_response_template_of_the_tokenizer_is_used() -> None:
    tokenizer = tokenizer_with("<tool_call>", response_template=OWN)
    output_format, found = output_notations.choose(tokenizer)
    assert found == {"tool_call_format": "tokenizer", "reasoning_format": "tokenizer"}
    parser = OutputParser(output_format, "<|assistant|>", TOOLS)
    deltas = []
    for character in "<r> hm </reason> So\n<call add>\na: 1\n</call>\n<call add>a: x</call> <|end|>":
        deltas += parser.feed(character)
    deltas += parser.finish()
    assert "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)) == "hm"
    assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == "So"
    calls = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    assert [(call.index, call.name, call.arguments) for call in calls] == [
        (0, "add", ""),
        (0, None, '{"a": 1}'),
        (1, "add", ""),
        (1, None, '{"a": "x"}'),
    ]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("text", "must be a dict"),
        ({"fields": {}}, "non-empty"),
        ({**OWN, "fields": {"content": {"content": "yaml"}}}, "unknown content parser 'yaml'"),
        ({**OWN, "fields": {"thinking": {"open_pattern": "("}}}, "open_pattern"),
        ({**OWN, "fields": {"thinking": {"close": "</r>"}}}, "the field thinking needs a start and an end"),
        ({**OWN, "fields": {"tool_calls": {"content": "json"}}}, "the field tool_calls needs a start"),
        ({**OWN, "fields": {"content": {"close_pattern": r"\s*"}}}, "matches an empty text"),
    ],
)
def test_response_template_that_does_not_work_is_reported_and_not_used(
    template: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert names("<tool_call>", response_template=template) == ("hermes", "none")
    assert "the tokenizer's response_template does not work" in caplog.text
    assert reason in caplog.text


def test_special_tokens_of_the_notation_are_kept_and_others_are_not() -> None:
    tokenizer = tokenizer_with("[TOOL_CALLS] [ARGS]")
    tokenizer.add_special_tokens({"extra_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "[IMG]", "<|eom_id|>", '<|"|>']})
    output_format, _ = output_notations.choose(tokenizer)
    assert set(output_format.special_tokens.values()) == {"[TOOL_CALLS]", "[ARGS]"}
    assert output_format.end_token_ids == ()
    output_format, _ = output_notations.choose(tokenizer, "gemma4")
    assert set(output_format.special_tokens.values()) == {'<|"|>'}
    output_format, _ = output_notations.choose(tokenizer, "llama3_json")
    assert output_format.end_token_ids == (tokenizer.convert_tokens_to_ids("<|eom_id|>"),)
