"""Grammars of messages on the demo tokenizer, followed by random logits: tool calls, reasoning, structured output."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from transformers import PreTrainedTokenizerBase

from predictor.errors import InvalidRequest
from predictor.generation import message_grammar, output_notations
from predictor.generation.output_format import OutputFormat
from predictor.generation.output_parser import OutputParser
from predictor.generation.structured_output import GrammarCompiler
from predictor.types import Chat, GrammarKind, OutputDelta, ReasoningDelta, StructuredOutput, TextDelta, ToolCallDelta
from tests.predictor.generation.random_text import EOS, random_text

Json = dict[str, Any]
CITY: Json = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Ulm", "Bonn"]}},
}
SUM: Json = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "text": {"type": "string", "maxLength": 4}},
    "required": ["a", "text"],
    "additionalProperties": False,
}
NOTHING: Json = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": CITY, 'a "b"': SUM, "weather.now": NOTHING}
ANSWER = StructuredOutput(GrammarKind.JSON_SCHEMA, json.dumps(CITY))
PROMPT = "<|user|>Hi<|assistant|>"


def _tool(name: str, parameters: Json | None) -> Json:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = (_tool("weather", CITY), _tool('a "b"', SUM), _tool("weather.now", None))
CHAT = Chat(({"role": "user", "content": "Hi"},), TOOLS)
REQUIRED = replace(CHAT, requires_tool_call=True)


@pytest.fixture(scope="module")
def hermes(tokenizer: PreTrainedTokenizerBase) -> OutputFormat:
    return output_notations.choose(tokenizer, "hermes", "think")[0]


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 512, frozenset([EOS]))


class Messages:
    """Random messages that follow the grammar of a chat, as parsed deltas; those that do not end are left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler, hermes: OutputFormat) -> None:
        self._tokenizer, self._compiler, self._format = tokenizer, compiler, hermes

    def __call__(
        self, chat: Chat, answer: StructuredOutput | None = None, *, begin: str = "", prompt: str = PROMPT
    ) -> list[list[OutputDelta]]:
        grammar = message_grammar.for_chat(chat, prompt, self._format, answer)
        assert grammar is not None
        compiled = self._compiler.compile_message(grammar)
        texts = [random_text(compiled, self._tokenizer, seed, begin=begin) for seed in range(12)]
        ended = [self._parse(prompt, text) for text in texts if text is not None]
        assert len(ended) >= 3
        return ended

    def _parse(self, prompt: str, text: str) -> list[OutputDelta]:
        parser = OutputParser(self._format, prompt, TOOLS)
        return [*parser.feed(text), *parser.finish()]


@pytest.fixture(scope="module")
def messages(tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler, hermes: OutputFormat) -> Messages:
    return Messages(tokenizer, compiler, hermes)


def _calls(deltas: Sequence[OutputDelta]) -> list[tuple[str | None, Any]]:
    found = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    return [
        (name, json.loads("".join(delta.arguments for delta in found if delta.index == index)))
        for index, name in enumerate(delta.name for delta in found if delta.name is not None)
    ]


def _text(deltas: Sequence[OutputDelta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))


def _reasoning(deltas: Sequence[OutputDelta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))


def test_grammar_of_a_required_call_gives_valid_calls_only(messages: Messages) -> None:
    called = [(_text(deltas), _calls(deltas)) for deltas in messages(REQUIRED)]
    for text, calls in called:
        assert not text.strip()
        assert calls
        for name, arguments in calls:
            assert name is not None
            jsonschema.validate(arguments, SCHEMAS[name])
    assert {name for _, calls in called for name, _ in calls} == SCHEMAS.keys()
    assert any(len(calls) > 1 for _, calls in called)


def test_grammar_of_a_required_call_without_parallel_calls_gives_one(messages: Messages) -> None:
    single = replace(REQUIRED, parallel_tool_calls=False)
    assert {len(_calls(deltas)) for deltas in messages(single)} == {1}


def test_grammar_of_strict_tools_restricts_their_calls_only(messages: Messages) -> None:
    chat = replace(CHAT, strict_tools=frozenset(["weather"]))
    began = 'Let me see. <tool_call>\n{"name": "weather"'
    for deltas in messages(chat, begin=began):
        assert _text(deltas).startswith("Let me see.")
        (name, arguments), *_ = _calls(deltas)
        assert name == "weather"
        jsonschema.validate(arguments, CITY)
    free = messages(chat, begin='<tool_call>\n{"name": "weather.now", "arguments": {"city": 7}}')
    assert all(_calls(deltas)[0] == ("weather.now", {"city": 7}) for deltas in free)
    for deltas in messages(chat, begin='<tool_call>\n{"name": "unknown'):
        assert all(name in SCHEMAS for name, _ in _calls(deltas))
    plain = messages(chat, begin="No call: {<tool> [")
    assert all(_text(deltas).startswith("No call: {<tool> [") for deltas in plain)


def test_grammar_of_strict_tools_reasoning_may_mention_calls(messages: Messages) -> None:
    chat = replace(CHAT, strict_tools=frozenset(["weather"]))
    thought = "A <tool_call>anything</tool_call> is possible."
    for deltas in messages(chat, begin=f"<think>{thought}</think>So"):
        assert _reasoning(deltas) == thought
        assert _text(deltas).startswith("So")
    for deltas in messages(chat, prompt=PROMPT + "<think>", begin=f"{thought}</think>So"):
        assert _text(deltas).startswith("So")


def test_grammar_without_anything_to_enforce_is_none(hermes: OutputFormat) -> None:
    assert message_grammar.for_chat(CHAT, PROMPT, hermes, None) is None


@pytest.mark.parametrize("answer", [ANSWER, StructuredOutput(GrammarKind.CHOICE, '["yes", "no <tool>"]')])
def test_grammar_of_an_answer_and_tools_gives_either(messages: Messages, answer: StructuredOutput) -> None:
    found = [
        (_text(deltas), _calls(deltas))
        for deltas in [*messages(CHAT, answer), *messages(CHAT, answer, begin="<tool_call>")]
    ]
    for text, calls in found:
        assert bool(text.strip()) is not bool(calls)
        assert all(name in SCHEMAS and isinstance(arguments, dict) for name, arguments in calls)
        if calls:
            continue
        if answer is ANSWER:
            jsonschema.validate(json.loads(text), CITY)
        else:
            assert text in ("yes", "no <tool>")
    assert {bool(calls) for _, calls in found} == {True, False}


@pytest.mark.parametrize(
    ("prompt", "begin", "thought"),
    [
        (PROMPT, "<think>Is it {}?</think>\n\n", "Is it {}?"),
        (PROMPT, "", ""),
        (PROMPT + "<think>\n", "Is it {}?</think>", "Is it {}?"),
        (PROMPT + "<think>\n\n</think>\n\n", "<think>", ""),
        ("<|assistant|><think>old</think>Hi<|user|>Hi<|assistant|>", "<think>new</think>", "new"),
    ],
)
def test_grammar_of_an_answer_begins_after_the_reasoning(
    messages: Messages, prompt: str, begin: str, thought: str
) -> None:
    for deltas in messages(replace(CHAT, tools=()), ANSWER, prompt=prompt, begin=begin):
        assert _reasoning(deltas).strip() == thought
        jsonschema.validate(json.loads(_text(deltas)), CITY)


def test_grammar_of_required_calls_begins_after_the_reasoning(messages: Messages) -> None:
    for deltas in messages(REQUIRED, begin="<think>Which one?</think>\n"):
        assert _reasoning(deltas) == "Which one?"
        assert _calls(deltas)


def test_grammar_of_special_tokens_writes_them_as_tokens(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    mistral = output_notations.TOOL_CALLS["mistral_list"].envelope
    assert mistral is not None
    envelope = replace(mistral, begin="<|user|>[", end="]<|system|>", marker="<|user|>")
    for required in (True, False):
        calls = message_grammar.ToolCalls(envelope, {"weather": CITY}, required=required, parallel=True)
        grammar = compiler.compile_message(message_grammar.MessageGrammar(calls=calls))
        texts = [random_text(grammar, tokenizer, seed, begin="<|user|>[") for seed in range(5)]
        for text in filter(None, texts):
            written, found, rest = text.removeprefix("<|user|>").partition("<|system|>")
            assert found
            assert required is not bool(rest) or not rest
            assert all(call["name"] == "weather" for call in json.loads(written))


@pytest.mark.parametrize(
    ("chat", "known", "field", "reason"),
    [
        (REQUIRED, False, "tool_choice", "unknown; the server's --tool_call_format sets it. Use auto."),
        (replace(CHAT, strict_tools=frozenset(["weather"])), False, "tools", "--tool_call_format sets it. Omit strict"),
        (REQUIRED, True, "tool_choice", "this model's format cannot be restricted"),
    ],
)
def test_calls_that_no_grammar_can_restrict_are_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, known: bool, field: str, reason: str
) -> None:
    known_format = output_notations.choose(tokenizer, "gemma3")[0] if known else None
    with pytest.raises(InvalidRequest, match=reason) as raised:
        message_grammar.for_chat(chat, PROMPT, known_format, None)
    assert raised.value.field == field


def test_compile_unsupported_schema_of_a_tool_is_refused_with_its_name(
    compiler: GrammarCompiler, hermes: OutputFormat
) -> None:
    tools = (*TOOLS, _tool("odd", {"type": "object", "not": {}}))
    grammar = message_grammar.for_chat(replace(REQUIRED, tools=tools), PROMPT, hermes, None)
    assert grammar is not None
    with pytest.raises(InvalidRequest, match=r"JSON schema of tool 'odd' is not supported.*not"):
        compiler.compile_message(grammar)
