"""Grammars of messages on the demo tokenizer, followed by random logits: tool calls, reasoning, structured output."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from devtools.paths import DEMO_MODEL
from predictor.errors import InvalidRequest
from predictor.generation import message_grammar, output_notations
from predictor.generation.call_envelope import CallEnvelope
from predictor.generation.output_format import OutputFormat
from predictor.generation.output_notations import TOOL_CALLS
from predictor.generation.output_parser import OutputParser
from predictor.generation.structured_output import GrammarCompiler
from predictor.types import Chat, GrammarKind, OutputDelta, ReasoningDelta, StructuredOutput, TextDelta, ToolCallDelta
from tests.predictor.generation import envelopes
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

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler, known: OutputFormat, eos: int = EOS
    ) -> None:
        self._tokenizer, self._compiler, self._format, self._eos = tokenizer, compiler, known, eos

    def __call__(
        self,
        chat: Chat,
        answer: StructuredOutput | None = None,
        *,
        begin: str = "",
        prompt: str = PROMPT,
        seeds: Iterable[int] = range(12),
        at_least: int = 3,
    ) -> list[list[OutputDelta]]:
        grammar = message_grammar.for_chat(chat, prompt, self._format, answer)
        assert grammar is not None
        compiled = self._compiler.compile_message(grammar)
        texts = [random_text(compiled, self._tokenizer, seed, begin=begin, eos=self._eos) for seed in seeds]
        ended = [self._parse(chat, prompt, text) for text in texts if text is not None]
        assert len(ended) >= at_least
        return ended

    def _parse(self, chat: Chat, prompt: str, text: str) -> list[OutputDelta]:
        parser = OutputParser(self._format, prompt, chat.tools)
        return [*parser.feed(text), *parser.finish()]


@pytest.fixture(scope="module")
def messages(tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler, hermes: OutputFormat) -> Messages:
    return Messages(tokenizer, compiler, hermes)


def _calls(deltas: Sequence[OutputDelta]) -> list[tuple[str, Any]]:
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


MARKERS = [
    "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "<|tool_call>", "<tool_call|>",
    *(f"<\uff5ctool▁{name}\uff5c>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")),
    *(f"<|tool_call{name}|>" for name in ("s_section_begin", "s_section_end", "_begin", "_end", "_argument_begin")),
    *(f"<|{name}|>" for name in ("channel", "message", "start", "constrain", "call", "return")),
]  # fmt: skip
FORMATS = [
    pytest.param(name, special, id=f"{name}-{'special' if special else 'text'}")
    for name, notation in output_notations.TOOL_CALLS.items()
    if notation.envelope is not None
    for special in (True, False)
]


@pytest.fixture(scope="module")
def messages_of() -> Callable[[str, bool], tuple[Messages, CallEnvelope]]:
    """Messages of a model with this format, whose markers are special tokens or text."""
    tokenizers = {}
    for special in (True, False):
        tokenizers[special] = AutoTokenizer.from_pretrained(DEMO_MODEL)
        if special:
            tokenizers[special].add_special_tokens({"extra_special_tokens": MARKERS})
    # Not <|end|>, which is a marker of harmony.
    [eos] = tokenizers[True].encode("<|begin|>", add_special_tokens=False)
    compilers = {special: GrammarCompiler(model, 512, frozenset([eos])) for special, model in tokenizers.items()}

    def make(name: str, special: bool) -> tuple[Messages, CallEnvelope]:
        reasoning = "harmony" if name == "harmony" else "think"
        known, _ = output_notations.choose(tokenizers[special], name, reasoning)
        assert known.envelope is not None
        return Messages(tokenizers[special], compilers[special], known, eos), known.envelope

    return make


PLAIN_TOOLS = (_tool("weather", CITY), _tool("total", SUM), _tool("weather.now", None))
PLAIN_SCHEMAS = {"weather": CITY, "total": SUM, "weather.now": NOTHING}


@pytest.mark.parametrize(("name", "special"), FORMATS)
def test_grammar_of_every_format_gives_calls_that_it_parses(messages_of: Any, name: str, special: bool) -> None:
    messages, _ = messages_of(name, special)
    called = [
        (_text(deltas), _calls(deltas))
        for deltas in messages(replace(REQUIRED, tools=PLAIN_TOOLS), seeds=range(8), at_least=1)
    ]
    for text, calls in called:
        assert calls
        assert not text.strip()
        for tool, arguments in calls:
            jsonschema.validate(arguments, PLAIN_SCHEMAS[tool])


@pytest.mark.parametrize(("name", "special"), FORMATS)
def test_grammar_of_every_format_holds_strict_calls_to_their_schema(messages_of: Any, name: str, special: bool) -> None:
    messages, envelope = messages_of(name, special)
    chat = replace(CHAT, tools=PLAIN_TOOLS, strict_tools=frozenset(PLAIN_SCHEMAS))
    begin = envelopes.write(envelope, [("weather", '{"town": 1}')])
    for deltas in messages(chat, begin=begin, seeds=range(5), at_least=1):
        (tool, arguments), *_ = _calls(deltas)
        assert tool == "weather"
        jsonschema.validate(arguments, CITY)
    start = "<|channel|>final<|message|>" if name == "harmony" else ""
    for excluded in ("", *envelope.excluded):
        found = messages(chat, begin=f"{start}Just text {excluded}", seeds=range(5), at_least=1)
        assert all(_text(deltas).startswith("Just text ") for deltas in found)
        for tool, arguments in (call for deltas in found for call in _calls(deltas)):
            jsonschema.validate(arguments, PLAIN_SCHEMAS[tool])


@pytest.mark.parametrize(("name", "special"), FORMATS)
def test_grammar_of_every_format_gives_a_call_or_an_answer(messages_of: Any, name: str, special: bool) -> None:
    messages, envelope = messages_of(name, special)
    chat = replace(CHAT, tools=PLAIN_TOOLS)
    start = "<|channel|>final<|message|>" if name == "harmony" else ""
    for deltas in messages(chat, ANSWER, begin=start + '{"city": "', seeds=range(5), at_least=1):
        assert not _calls(deltas)
        jsonschema.validate(json.loads(_text(deltas)), CITY)
    for deltas in messages(
        chat, ANSWER, begin=envelopes.write(envelope, [("total", '{"x": 1}')]), seeds=range(5), at_least=1
    ):
        assert not _text(deltas).strip()
        assert _calls(deltas)[0] == ("total", {"x": 1})


@pytest.mark.parametrize("special", [True, False])
def test_grammar_of_harmony_puts_the_answer_into_the_final_channel(messages_of: Any, special: bool) -> None:
    messages, _ = messages_of("harmony", special)
    thought = "<|channel|>analysis<|message|>Which?<|end|><|start|>assistant"
    for deltas in messages(replace(CHAT, tools=()), ANSWER, begin=thought, seeds=range(5)):
        assert _reasoning(deltas) == "Which?"
        jsonschema.validate(json.loads(_text(deltas)), CITY)


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


@pytest.mark.parametrize("types", ["string", ["array", "null"]])
def test_arguments_that_are_no_object_are_refused(hermes: OutputFormat, types: Any) -> None:
    chat = replace(REQUIRED, tools=(_tool("odd", {"type": types}),))
    with pytest.raises(InvalidRequest, match="the type of the parameters of 'odd' is not object"):
        message_grammar.for_chat(chat, PROMPT, hermes, None)


def test_compile_unsupported_schema_of_a_tool_is_refused_with_its_name(
    compiler: GrammarCompiler, hermes: OutputFormat
) -> None:
    tools = (*TOOLS, _tool("odd", {"type": "object", "not": {}}))
    grammar = message_grammar.for_chat(replace(REQUIRED, tools=tools), PROMPT, hermes, None)
    assert grammar is not None
    with pytest.raises(InvalidRequest, match=r"JSON schema of tool 'odd' is not supported.*not"):
        compiler.compile_message(grammar)


@pytest.mark.parametrize("name", [name for name, notation in TOOL_CALLS.items() if notation.envelope])
def test_required_calls_in_every_notation_are_parsed(
    tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler, name: str
) -> None:
    output_format, _ = output_notations.choose(tokenizer, name, "none")
    chat = replace(REQUIRED, tools=(TOOLS[0], TOOLS[2]))
    grammar = message_grammar.for_chat(chat, PROMPT, output_format, None)
    assert grammar is not None
    compiled = compiler.compile_message(grammar)
    texts = [text for seed in range(4) if (text := random_text(compiled, tokenizer, seed)) is not None]
    assert texts
    for text in texts:
        parser = OutputParser(output_format, PROMPT, chat.tools)
        deltas = [*parser.feed(text), *parser.finish()]
        calls = _calls(deltas)
        assert calls
        assert {called for called, _ in calls} <= {"weather", "weather.now"}
        assert not _text(deltas)
