"""Reasoning, text and tool calls in the notations of all families, in pieces of every size."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from predictor.generation import output_notations
from predictor.generation.output_notations import REASONING, TOOL_CALLS
from predictor.generation.output_parser import OutputParser
from predictor.types import OutputDelta, ReasoningDelta, TextDelta, ToolCallDelta
from tests.predictor.generation import envelopes

Parts = list[tuple[str, ...]]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "on": {"type": "boolean"}, "note": {"type": "string"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ARGUMENTS = '{"a": 1, "note": "x}</tool_call>\\" é"}'
ADD, NOW = ("add", ARGUMENTS), ("now", "{}")
XML = ("add", '{"a": 1, "on": true, "note": "  if x:\\n    y"}')
HERMES = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
DEEPSEEK = "<｜tool▁calls▁begin｜>%s<｜tool▁calls▁end｜>"
DEEPSEEK_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```<｜tool▁call▁end｜>"
DEEPSEEK_V31 = "<｜tool▁call▁begin｜>%s<｜tool▁sep｜>%s<｜tool▁call▁end｜>"
KIMI = "<|tool_calls_section_begin|>%s<|tool_calls_section_end|>"
KIMI_CALL = "<|tool_call_begin|>functions.%s:%d<|tool_call_argument_begin|>%s<|tool_call_end|>"
QWEN = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=on>\ntrue\n</parameter>\n"
    "<parameter=note>\n  if x:\n    y\n</parameter>\n</function>\n</tool_call>"
)
GLM = (
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>on</arg_key>\n<arg_value>true</arg_value>"
    "\n<arg_key>note</arg_key>\n<arg_value>  if x:\n    y</arg_value>\n</tool_call>"
)
CHANNEL = "<|start|>assistant<|channel|>"


def call(name: str, arguments: str = "{}") -> tuple[str, ...]:
    return ("call", name, arguments)


def text(content: str) -> tuple[str, ...]:
    return ("text", content)


def reasoning(content: str) -> tuple[str, ...]:
    return ("reasoning", content)


CALLS = [call(*ADD), call(*NOW)]

CASES: dict[str, tuple[str, str, str, Parts]] = {
    # name: format of tool calls, format of reasoning, output, what it contains
    "hermes": (
        "hermes",
        "think",
        f"<think>\nWell,\n\nwell.\n</think>\n\nLet me see.\n{HERMES % ADD}\n{HERMES % NOW}\n",
        [reasoning("Well,\n\nwell."), text("Let me see."), *CALLS],
    ),
    "hermes, text after calls": (
        "hermes",
        "none",
        f"\nOne.\n{HERMES % ADD}\nTwo.\n\nThree. ",
        [text("One."), call(*ADD), text("\nTwo.\n\nThree.")],
    ),
    "hermes, arguments first": (
        "hermes",
        "none",
        f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "add"}}</tool_call>',
        [call(*ADD)],
    ),
    "hermes, arguments encoded twice": (
        "hermes",
        "none",
        HERMES % ("add", '"{\\"a\\": 1}"'),
        [call("add", '{"a": 1}')],
    ),
    "hermes, no arguments": (
        "hermes",
        "none",
        '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "now", "arguments": null}</tool_call>',
        [call("now"), call("now")],
    ),
    "hermes, nested function": (
        "hermes",
        "none",
        '<tool_call>{"id": 5, "type": "function", "function": '
        f'{{"name": "add", "arguments": {ARGUMENTS}}}}}</tool_call>',
        [call(*ADD)],
    ),
    "hermes, list": (
        "hermes",
        "none",
        f'<tool_call>\n[{{"name": "add", "arguments": {ARGUMENTS}}},\n{{"name": "now"}}]\n</tool_call>',
        CALLS,
    ),
    "hermes, bracket too many": (
        "hermes",
        "none",
        f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}}}\n</tool_call>\n{HERMES % NOW}',
        CALLS,
    ),
    "hermes, arguments twice": (
        "hermes",
        "none",
        '<tool_call>{"name": "add", "arguments": {"a": 1}, "parameters": {"a": 2}}</tool_call>',
        [call("add", '{"a": 1}')],
    ),
    "hermes, unknown tool": ("hermes", "none", HERMES % ("sub", '{"a": 1}'), [call("sub", '{"a": 1}')]),
    "hermes, cut off in arguments": (
        "hermes",
        "none",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "no',
        [call("add", '{"a": 1, "no')],
    ),
    "hermes, cut off in name": ("hermes", "none", '<tool_call>\n{"name": "ad', [text('<tool_call>\n{"name": "ad')]),
    "hermes, cut off in marker": ("hermes", "none", "Yes.\n<tool_c", [text("Yes.\n<tool_c")]),
    "qwen3_coder": (
        "qwen3_coder",
        "think",
        f"<think>\nHm.\n</think>\n\nOK.\n\n{QWEN}\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        [reasoning("Hm."), text("OK."), call(*XML), call("now")],
    ),
    "qwen3_coder without outer tag": (
        "qwen3_coder",
        "none",
        QWEN.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"),
        [call(*XML)],
    ),
    "qwen3_coder, tags in a value": (
        "qwen3_coder",
        "none",
        f"{QWEN.replace('if x:', '</tool_call></function>')}\n{QWEN}",
        [call("add", XML[1].replace("if x:", "</tool_call></function>")), call(*XML)],
    ),
    "qwen3_coder, last tags missing": (
        "qwen3_coder",
        "none",
        f"{QWEN.removesuffix('</tool_call>')}{QWEN.removesuffix('</tool_call>')}",
        [call(*XML), call(*XML)],
    ),
    "glm45, tags in a value": (
        "glm45",
        "none",
        f"{GLM.replace('if x:', '</tool_call>')} OK",
        [call("add", XML[1].replace("if x:", "</tool_call>")), text("OK")],
    ),
    "glm45 without line feeds": (
        "glm45",
        "none",
        f"{GLM.replace(chr(10) + '<', '<')}<tool_call>now</tool_call>",
        [call(*XML), call("now")],
    ),
    "qwen3_coder, last tag missing": (
        "qwen3_coder",
        "none",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=note>\nx\n</function>\n</tool_call>",
        [call("add", '{"a": 1, "note": "x"}')],
    ),
    "qwen3_coder, JSON": ("qwen3_coder", "none", HERMES % ADD, [call(*ADD)]),
    "glm45": (
        "glm45",
        "think",
        f"<think>Hm.</think>\n{GLM}\n<tool_call>now\n</tool_call>",
        [reasoning("Hm."), call(*XML), call("now")],
    ),
    "glm45, JSON": ("glm45", "none", HERMES % ADD, [call(*ADD)]),
    "mistral": (
        "mistral",
        "mistral",
        f"[THINK]Hm.[/THINK]OK.[TOOL_CALLS]add[ARGS]{ARGUMENTS}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{{}}",
        [reasoning("Hm."), text("OK."), *CALLS],
    ),
    "mistral without [ARGS]": ("mistral", "none", f"[TOOL_CALLS]add{ARGUMENTS}", [call(*ADD)]),
    "mistral_list": (
        "mistral_list",
        "none",
        f'[TOOL_CALLS] [{{"name": "add", "arguments": {ARGUMENTS}, "id": "123456789"}}, '
        '{"name": "now", "arguments": {}}]',
        CALLS,
    ),
    "llama3_json": ("llama3_json", "none", f'\n{{"name": "add", "parameters": {ARGUMENTS}}}', [call(*ADD)]),
    "llama3_json, several": (
        "llama3_json",
        "none",
        f'{{"type": "function", "name": "add", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}',
        CALLS,
    ),
    "llama3_json, list": (
        "llama3_json",
        "none",
        f'[{{"name": "add", "parameters": {ARGUMENTS}}}, {{"name": "now", "parameters": {{}}}}]',
        CALLS,
    ),
    "llama3_json, tag": (
        "llama3_json",
        "none",
        f'<|python_tag|>{{"function": "add", "parameters": {ARGUMENTS}}}',
        [call(*ADD)],
    ),
    "llama3_json, other object": (
        "llama3_json",
        "none",
        '{"name": "Ann", "parameters": 3}',
        [text('{"name": "Ann", "parameters": 3}')],
    ),
    "llama3_json, object later": (
        "llama3_json",
        "none",
        'It is {"name": "now", "parameters": {}}',
        [text('It is {"name": "now", "parameters": {}}')],
    ),
    "pythonic": (
        "pythonic",
        "none",
        '[add(a=1, note="x]\\")", on=True), now()]',
        [call("add", '{"a": 1, "note": "x]\\")", "on": true}'), call("now")],
    ),
    "pythonic, constants of JSON": (
        "pythonic",
        "none",
        "[add(a=null, on=true), add(on=[False, false])]",
        [call("add", '{"a": null, "on": true}'), call("add", '{"on": [false, false]}')],
    ),
    "pythonic, tags": (
        "pythonic",
        "none",
        "<|python_start|>[add(a=-1, note='\\'é'), now()]<|python_end|>",
        [call("add", '{"a": -1, "note": "\'é"}'), call("now")],
    ),
    "pythonic, JSON": ("pythonic", "none", f'{{"name": "add", "parameters": {ARGUMENTS}}}', [call(*ADD)]),
    "pythonic, list of text": ("pythonic", "none", "[1, 2] and [x(y)]", [text("[1, 2] and [x(y)]")]),
    "pythonic, unknown tool": ("pythonic", "none", "[sub(a=1)]", [text("[sub(a=1)]")]),
    "gemma3": (
        "gemma3",
        "none",
        "OK.\n```tool_code\nprint(add(a=1))\nnow()\n```",
        [text("OK."), call("add", '{"a": 1}'), call("now")],
    ),
    "gemma4": (
        "gemma4",
        "gemma4",
        '<|channel>thought\nHm.\n<channel|><|tool_call>call:add{a:1,note:<|"|>{a:"b"}, c<|"|>}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
        [reasoning("Hm."), call("add", '{"a": 1, "note": "{a:\\"b\\"}, c"}'), call("now")],
    ),
    "gemma4, JSON": (
        "gemma4",
        "none",
        f'<|tool_call>{{"name": "add", "arguments": {ARGUMENTS}}}<tool_call|>',
        [call(*ADD)],
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "deepseek_r1",
        f"Hm.\n</think>\n\nOK.{DEEPSEEK % (DEEPSEEK_V3 % ADD + chr(10) + DEEPSEEK_V3 % NOW)}",
        [reasoning("Hm."), text("OK."), *CALLS],
    ),
    "deepseek_r1 with its marker": (
        "none",
        "deepseek_r1",
        "<think>\nHm.\n</think>\n\nOK.",
        [reasoning("Hm."), text("OK.")],
    ),
    "deepseek_v31": ("deepseek_v31", "think", DEEPSEEK % (DEEPSEEK_V31 % ADD + DEEPSEEK_V31 % NOW), CALLS),
    "kimi_k2": (
        "kimi_k2",
        "think",
        f"<think>Hm.</think>OK.{KIMI % (KIMI_CALL % ('add', 3, ARGUMENTS) + KIMI_CALL % ('now', 4, ''))}",
        [reasoning("Hm."), text("OK."), *CALLS],
    ),
    "harmony": (
        "harmony",
        "harmony",
        f"<|channel|>analysis<|message|>Hm.<|end|>{CHANNEL}commentary<|message|>Wait.<|end|>"
        f"{CHANNEL}commentary to=functions.add <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
        [reasoning("Hm."), text("Wait."), call(*ADD)],
    ),
    "harmony, recipient in role": (
        "harmony",
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.add<|channel|>commentary json"
        f"<|message|>{ARGUMENTS}",
        [reasoning("Hm."), call(*ADD)],
    ),
    "harmony, two texts": (
        "harmony",
        "harmony",
        f"<|channel|>commentary<|message|>Wait.<|end|>{CHANNEL}final<|message|>So.",
        [text("Wait.\nSo.")],
    ),
    "harmony, final": (
        "harmony",
        "harmony",
        f"<|channel|>analysis<|message|>Hm.\nHm.<|end|>{CHANNEL}final<|message|>So.",
        [reasoning("Hm.\nHm."), text("So.")],
    ),
    "think, cut off": ("none", "think", "<think>\nHm. <b> \n", [reasoning("Hm. <b>")]),
    "think, twice": (
        "none",
        "think",
        "<think>a</think>b<think>c</think> d",
        [reasoning("a"), text("b"), reasoning("\nc"), text("\nd")],
    ),
}

MALFORMED = {
    "not JSON": ("hermes", "<tool_call>\nadd(1, 2)\n</tool_call>"),
    "Python's quotes": ("hermes", "<tool_call>{'name': 'add', 'arguments': {}}</tool_call>"),
    "Python's quotes in arguments": ("hermes", HERMES % ("add", "{'a': 1}")),
    "arguments in a list": ("hermes", HERMES % ("add", "[1, 2]")),
    "arguments in text": ("hermes", HERMES % ("add", '"1 and 2"')),
    "name is a number": ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    "name is a sentence": ("hermes", HERMES % ("add it", "{}")),
    "half of a surrogate pair in name": ("hermes", HERMES % ("\\ud83d'", "{}")),
    "no name": ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    "empty": ("hermes", "<tool_call>\n</tool_call>"),
    "empty list": ("mistral", "[TOOL_CALLS] []"),
    "unbalanced": ("qwen3_coder", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</param"),
    "no function": ("qwen3_coder", "<tool_call>\nadd\n</tool_call>"),
    "no name in XML": ("glm45", "<tool_call>\n</tool_call>"),
    "not Gemma's JSON": ("gemma4", "<|tool_call>call:add{a:1,,}<tool_call|>"),
    "not a number of JSON": ("gemma4", "<|tool_call>call:add{a:NaN}<tool_call|>"),
    "no call of Python": ("pythonic", "<|python_start|>[a=1]<|python_end|>"),
    "positional argument": ("pythonic", "[add(1)]"),
    "expression": ("pythonic", "[add(a=f(1))]"),
    "bytes": ("pythonic", '[add(a=b"1")]'),
    "infinity": ("pythonic", "[add(a=1e999)]"),
    "unhashable": ("pythonic", "[add(a={[]: 1})]"),
    "long attribute": ("pythonic", f"[a{'.a' * 3000}(b=1)]"),
    "nested functions": ("hermes", "<tool_call>" + '{"function":' * 3000),
    "deep": ("pythonic", f"[add(a={'(' * 3000}1{')' * 3000})]"),
    "deep JSON": ("hermes", HERMES % ("add", f'"{"[" * 100_000}"')),
    "text after Mistral's marker": ("mistral", "[TOOL_CALLS] are what I cannot make."),
    "Kimi without arguments": ("kimi_k2", "<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"),
    "channel of a tool that is not a function": ("harmony", "<|channel|>analysis to=python code<|message|>print(1)"),
}


def make(
    tokenizer: PreTrainedTokenizerBase,
    tool_calls: str = "hermes",
    reasoning_format: str = "think",
    *,
    tools: Sequence[dict[str, Any]] = TOOLS,
    **options: Any,
) -> OutputParser:
    output_format, _ = output_notations.choose(tokenizer, tool_calls, reasoning_format)
    return OutputParser(output_format, tools=tools, **options)


def run(parser: OutputParser, pieces: Iterable[str]) -> list[OutputDelta]:
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return deltas + parser.finish()


def cut(output: str, size: int) -> list[str]:
    return [output[start : start + size] for start in range(0, len(output), size)]


def join(deltas: Iterable[OutputDelta]) -> Parts:
    parts: list[list[str]] = []
    for delta in deltas:
        match delta:
            case ToolCallDelta(name=str(name), arguments=arguments):
                parts.append(["call", name, arguments])
            case ToolCallDelta(arguments=arguments):
                parts[-1][2] += arguments
            case TextDelta(content) | ReasoningDelta(content):
                kind = "text" if isinstance(delta, TextDelta) else "reasoning"
                if parts and parts[-1][0] == kind:
                    parts[-1][1] += content
                else:
                    parts.append([kind, content])
    return [tuple(part) for part in parts]


@pytest.mark.parametrize("case", CASES)
def test_output_in_pieces_of_every_size_gives_its_parts(tokenizer: PreTrainedTokenizerBase, case: str) -> None:
    tool_calls, reasoning_format, output, parts = CASES[case]
    for size in [*range(1, 40), len(output)]:
        parser = make(tokenizer, tool_calls, reasoning_format)
        assert join(run(parser, cut(output, size))) == parts


def test_cases_cover_every_notation() -> None:
    assert {case[0] for case in CASES.values()} == {"none", *TOOL_CALLS}
    assert {case[1] for case in CASES.values()} == {"none", *REASONING}


@pytest.mark.parametrize("case", MALFORMED)
def test_output_that_is_no_call_is_text(tokenizer: PreTrainedTokenizerBase, case: str) -> None:
    tool_calls, output = MALFORMED[case]
    for pieces in ([output], cut(output, 1), cut(output, 7)):
        assert join(run(make(tokenizer, tool_calls), pieces)) == [text(output)]


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("hermes", HERMES % ADD),
        ("mistral", f"[TOOL_CALLS]add[ARGS]{ARGUMENTS}"),
        ("llama3_json", f'{{"name": "add", "parameters": {ARGUMENTS}}}'),
        ("deepseek_v31", DEEPSEEK % (DEEPSEEK_V31 % ADD)),
        ("kimi_k2", KIMI_CALL % ("add", 0, ARGUMENTS)),
        ("harmony", f"<|channel|>commentary to=functions.add json<|message|>{ARGUMENTS}"),
    ],
)
def test_arguments_are_streamed_as_they_are_written(tokenizer: PreTrainedTokenizerBase, name: str, output: str) -> None:
    parser = make(tokenizer, name)
    begin = output.index(ARGUMENTS)
    head = parser.feed(output[: begin + 6])
    assert head[0] == ToolCallDelta(0, id=head[0].id, name="add")  # type: ignore[union-attr]
    assert head[1:] == [ToolCallDelta(0, ARGUMENTS[:6])]
    assert parser.feed(ARGUMENTS[6:9]) == [ToolCallDelta(0, ARGUMENTS[6:9])]
    assert not parser.has_tool_calls
    parser.feed(output[begin + 9 :])
    assert parser.has_tool_calls


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("hermes", r"call_[0-9a-f]{24}"), ("mistral", r"[A-Za-z0-9]{9}"), ("kimi_k2", r"functions\.(add|now):\d")],
)
def test_ids_have_the_form_that_the_template_demands(
    tokenizer: PreTrainedTokenizerBase, name: str, pattern: str
) -> None:
    envelope = TOOL_CALLS[name].envelope
    assert envelope is not None
    deltas = run(make(tokenizer, name), [envelopes.write(envelope, [ADD, NOW])])
    ids = [delta.id for delta in deltas if isinstance(delta, ToolCallDelta) and delta.id]
    assert len(set(ids)) == 2
    assert all(re.fullmatch(pattern, id_) for id_ in ids)


@pytest.mark.parametrize("name", [name for name, notation in TOOL_CALLS.items() if notation.envelope])
def test_envelope_of_each_notation_is_parsed(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    envelope = TOOL_CALLS[name].envelope
    assert envelope is not None
    calls = [ADD] if name == "harmony" else [ADD, NOW]
    assert join(run(make(tokenizer, name), [envelopes.write(envelope, calls)])) == [call(*item) for item in calls]


def test_id_that_the_model_wrote_is_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    [head, *_] = run(make(tokenizer, "kimi_k2"), [KIMI_CALL % ("add", 7, "{}")])
    assert head == ToolCallDelta(0, id="functions.add:7", name="add")
    [head, *_] = run(make(tokenizer, "mistral"), ["[TOOL_CALLS]now[CALL_ID]Abcdef123[ARGS]{}"])
    assert head == ToolCallDelta(0, id="Abcdef123", name="now")


JSON_ARGUMENTS = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)


@given(st.lists(JSON_ARGUMENTS, min_size=1, max_size=3), st.integers(1, 12), st.booleans(), st.data())
def test_any_arguments_in_any_envelope_are_streamed_unchanged(
    tokenizer: PreTrainedTokenizerBase,
    arguments: list[dict[str, Any]],
    size: int,
    ascii_only: bool,
    data: st.DataObject,
) -> None:
    name = data.draw(st.sampled_from([name for name, notation in TOOL_CALLS.items() if notation.envelope]))
    envelope = TOOL_CALLS[name].envelope
    assert envelope is not None
    texts = [json.dumps(value, ensure_ascii=ascii_only) for value in arguments]
    output = envelopes.write(envelope, [("add", text) for text in (texts[:1] if name == "harmony" else texts)])
    parts = join(run(make(tokenizer, name), cut(output, size)))
    assert parts == [call("add", text) for text in (texts[:1] if name == "harmony" else texts)]


@pytest.mark.parametrize(
    "output", [f"{HERMES % ADD}\n{HERMES % NOW}", '<tool_call>[{"name": "now"}, {"name": "add"}]</tool_call> Hi']
)
def test_parser_without_parallel_calls_stops_after_the_first(tokenizer: PreTrainedTokenizerBase, output: str) -> None:
    for size in (1, 5, len(output)):
        parser = make(tokenizer, parallel_tool_calls=False)
        [part] = join(run(parser, cut(output, size)))
        assert part[0] == "call"
        assert parser.stopped


def test_calls_without_tools_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    output = f"<think>Hm.</think>{HERMES % ADD}"
    assert join(run(make(tokenizer, tools=()), [output])) == [reasoning("Hm."), text(HERMES % ADD)]


@pytest.mark.parametrize(
    ("reasoning_format", "prompt", "output", "parts"),
    [
        ("think", "<|assistant|><think>\n", "Hm.\n</think>\n\nHi", [reasoning("Hm."), text("Hi")]),
        ("think", "<|assistant|><think>\n", "<think>\nHm.</think>Hi", [reasoning("Hm."), text("Hi")]),
        ("think", "<|assistant|><think>\n\n</think>\n\n", "Hi", [text("Hi")]),
        ("think", "<think>a</think>b<|end|><|assistant|>", "Hi", [text("Hi")]),
        ("think", "<|assistant|>", "Hi</think>", [text("Hi</think>")]),
        ("deepseek_r1", "<|assistant|>", "Hm.</think>Hi", [reasoning("Hm."), text("Hi")]),
        ("deepseek_r1", "<|assistant|></think>", "Hi", [text("Hi")]),
        ("gemma4", "<|turn>model\n<|channel>thought\n<channel|>", "Hi", [text("Hi")]),
        (
            "harmony",
            f"{CHANNEL}analysis<|message|>",
            f"Hm.<|end|>{CHANNEL}final<|message|>Hi",
            [reasoning("Hm."), text("Hi")],
        ),
    ],
)
def test_prompt_that_begins_the_reasoning_is_continued(
    tokenizer: PreTrainedTokenizerBase, reasoning_format: str, prompt: str, output: str, parts: Parts
) -> None:
    for size in (1, 3, len(output)):
        parser = make(tokenizer, "none", reasoning_format, prompt=prompt)
        assert parser.in_reasoning is (parts[0][0] == "reasoning" and reasoning_format != "none")
        assert join(run(parser, cut(output, size))) == parts


@pytest.mark.parametrize(
    ("continued", "output", "parts"),
    [
        ("It is", " so. ", [text(" so.")]),
        ("<think>\nHm", "m.</think>Hi", [reasoning("m."), text("Hi")]),
        ("<think>\nHm</think>It is", " so.", [text(" so.")]),
    ],
)
def test_message_that_is_continued_keeps_its_space(
    tokenizer: PreTrainedTokenizerBase, continued: str, output: str, parts: Parts
) -> None:
    parser = make(tokenizer, prompt=f"<|assistant|>{continued}", continued=continued)
    assert join(run(parser, cut(output, 1))) == parts


@pytest.mark.parametrize(
    ("tokens", "prompt", "count"),
    [
        (["<think>", "\n", "Hm", ".", "\n", "</think>", "\n\n", "Hi"], "", 4),
        (["<", "think", ">", "Hm", " <", "b", "</", "think", ">", "Hi"], "", 3),
        (["<think>Hm", "", "é.</think>Hi", "Ho"], "", 3),
        (["Hm", ".", "</think>", "Hi"], "<think>\n", 2),
        (["Hm", ".", "</thi"], "<think>\n", 3),
        (["Hi", "<think"], "", 0),
    ],
    ids=["special", "split", "characters", "prompt", "cut-off", "none"],
)
def test_reasoning_tokens_are_those_with_text_of_the_reasoning(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], prompt: str, count: int
) -> None:
    parser = make(tokenizer, prompt=prompt)
    run(parser, tokens)
    assert parser.reasoning_tokens == count


@pytest.mark.parametrize(
    "output",
    [
        "word " * 1500,
        " " * 6_000,
        "<" * 6_000,
        f"<think>{'a < b' * 1200}",
        "<tool_call>" + '{"name": "add", "arguments": {"note": "' + "x\\n" * 2000,
        '<tool_call>{"name": "' + "x" * 6_000,
        "[TOOL_CALLS]" + "x" * 6_000,
        "<function=add>" + "<parameter" * 600,
    ],
    ids=["text", "spaces", "markers", "reasoning", "arguments", "name", "header", "xml"],
)
@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "mistral", "llama3_json"])
def test_text_held_back_is_bounded(tokenizer: PreTrainedTokenizerBase, name: str, output: str) -> None:
    """Each search sees what is held back and the new text only, so that the whole takes linear time."""
    parser = make(tokenizer, name)
    longest = 0
    for character in output:
        parser.feed(character)
        longest = max(longest, len(parser._input._text))
    assert longest < 200
    parser.finish()


WORDS = st.integers(0, 10**6).map(lambda number: f"w{number}")
MARKERS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<think>", "</think>", "<function=add>", "</function>", "<parameter=note>"),
        *("</parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]", "add"),
        *("[THINK]", "[/THINK]", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "<|tool_call>call:", "{", "}"),
        *(
            "<tool_call|>",
            "<|channel>thought\n",
            "<channel|>",
            "<｜tool▁call▁begin｜>",
            "function<｜tool▁sep｜>",
            "[",
            "]",
        ),
        *(
            "```json\n",
            "```",
            "<｜tool▁call▁end｜>",
            "<|tool_call_begin|>",
            "functions.add:0",
            "<|tool_call_end|>",
            "(",
        ),
        *("<|tool_call_argument_begin|>", "<|start|>assistant", "<|channel|>", "analysis", "<|message|>", "<|end|>"),
        *("commentary to=functions.add", '{"name": "add", "arguments": ', '{"name": "add", "parameters": ', "{}", ")"),
        *(HERMES % ADD, QWEN, GLM, '"', "\\", "'", ", ", ":", "\n", " ", "```tool_code", "add(a=1", "[add(note='"),
    ]
)


@given(st.lists(MARKERS | WORDS, max_size=25), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_any_output_in_any_pieces_gives_the_same_and_keeps_all_words(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], sizes: list[int], data: st.DataObject
) -> None:
    tool_calls = data.draw(st.sampled_from(["none", *TOOL_CALLS]))
    reasoning_format = data.draw(st.sampled_from(["none", *REASONING]))
    output = "".join(tokens)
    pieces: list[str] = []
    position = 0
    while position < len(output):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(output[position : position + size])
        position += size
    whole = join(run(make(tokenizer, tool_calls, reasoning_format), [output]))
    assert join(run(make(tokenizer, tool_calls, reasoning_format), pieces)) == whole
    if not {"qwen3_coder", "glm45", "gemma3", "gemma4", "pythonic"} & {tool_calls}:
        kept = json.dumps(whole, ensure_ascii=False)
        assert all(token in kept for token in tokens if token.startswith("w"))
