"""Conversations with tools through the chat templates of all families, and back through their notations.

The templates here are short ones of our own that write turns, reasoning, calls and results as the families' do.
"""

import json
import re
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Family:
    """A chat template, and what it needs.

    Args:
        notations: of tool calls and of reasoning, as detected.
        assistant: Jinja that writes a message of the assistant after its beginning.
        tool: Jinja that writes the message of a tool.
        other: Jinja that writes any other message.
        begin: beginning of the assistant's message.
        special_tokens: of the tokenizer.
        end: what ends the assistant's message.
        several: a message may have several calls.
        text_arguments: the template takes the arguments as JSON.
        reasoning_field: of messages.
    """

    notations: tuple[str, str]
    assistant: str
    tool: str
    other: str
    begin: str
    special_tokens: tuple[str, ...]
    end: str
    several: bool = True
    text_arguments: bool = False
    reasoning_field: str | None = "reasoning_content"

    @property
    def template(self) -> str:
        return (
            "{%- for tool in tools or [] -%}{{ tool | tojson ~ '\n' }}{%- endfor -%}"
            "{%- for m in messages -%}"
            "{%- if m.role == 'assistant' -%}{{ '" + self.begin + "' }}" + self.assistant + "{{ '" + self.end + "' }}"
            "{%- elif m.role == 'tool' -%}" + self.tool + "{%- else -%}" + self.other + "{%- endif -%}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ '" + self.begin + "' }}{%- endif -%}"
        )


CHATML = "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
CHATML_TOOL = "{{ '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}"
THINK = "{%- if m.reasoning_content -%}{{ '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' }}{%- endif -%}"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
HERMES_CALLS = (
    '{%- for c in m.tool_calls -%}{{ \'\n<tool_call>\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ '
    "c.function.arguments | tojson ~ '}\n</tool_call>' }}{%- endfor -%}"
)
MISTRAL_TOOL = "{{ '[TOOL_RESULTS]' ~ {'content': m.content, 'call_id': m.tool_call_id} | tojson ~ '[/TOOL_RESULTS]' }}"
MISTRAL_OTHER = "{{ '[INST]' ~ m.content ~ '[/INST]' }}"
MISTRAL_ID = "{%- if c.id | length != 9 -%}{{ raise_exception('ids have 9 characters') }}{%- endif -%}"
DEEPSEEK_TOOL = "{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
DEEPSEEK_OTHER = "{{ '<｜User｜>' + m.content }}"
DEEPSEEK_TOKENS = (
    *("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
)
LLAMA3 = "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content ~ '<|eot_id|>' }}"
LLAMA4 = "{{ '<|header_start|>' ~ m.role ~ '<|header_end|>\n\n' ~ m.content ~ '<|eot|>' }}"
GEMMA_VALUE = (
    "{%- macro value(v) -%}{%- if v is string -%}{{ '<|\"|>' ~ v ~ '<|\"|>' }}{%- elif v is mapping -%}{{ '{' }}"
    "{%- for key, item in v.items() -%}{{ (',' if not loop.first else '') ~ key ~ ':' ~ value(item) }}{%- endfor -%}"
    "{{ '}' }}{%- else -%}{{ v | tojson }}{%- endif -%}{%- endmacro -%}"
)
KIMI_CALL = (
    "{{ '<|tool_call_begin|>' ~ c.id ~ '<|tool_call_argument_begin|>' ~ (c.function.arguments if "
    "c.function.arguments is string else c.function.arguments | tojson) ~ '<|tool_call_end|>' }}"
)

FAMILIES = {
    "qwen3": Family(
        ("hermes", "think"),
        THINK + "{{ m.content }}" + HERMES_CALLS,
        CHATML_TOOL,
        CHATML,
        "<|im_start|>assistant\n",
        CHATML_TOKENS,
        "<|im_end|>\n",
    ),
    "qwen3-thinking": Family(
        ("hermes", "think"),
        "{{ m.reasoning_content ~ '\n</think>\n\n' ~ m.content }}" + HERMES_CALLS,
        CHATML_TOOL,
        CHATML,
        "<|im_start|>assistant\n<think>\n",
        CHATML_TOKENS,
        "<|im_end|>\n",
    ),
    "qwen3-coder": Family(
        ("qwen3_coder", "think"),
        THINK
        + "{{ m.content }}{%- for c in m.tool_calls -%}{{ '\n<tool_call>\n<function=' ~ c.function.name ~ '>\n' }}"
        "{%- for k, v in c.function.arguments.items() -%}{{ '<parameter=' ~ k ~ '>\n' ~ (v if v is string else v | "
        "tojson) ~ '\n</parameter>\n' }}{%- endfor -%}{{ '</function>\n</tool_call>' }}{%- endfor -%}",
        CHATML_TOOL,
        CHATML,
        "<|im_start|>assistant\n",
        CHATML_TOKENS,
        "<|im_end|>\n",
    ),
    "glm": Family(
        ("glm45", "think"),
        "{{ '\n<think>' ~ m.reasoning_content ~ '</think>\n' ~ m.content }}{%- for c in m.tool_calls -%}"
        "{{ '\n<tool_call>' ~ c.function.name ~ '\n' }}{%- for k, v in c.function.arguments.items() -%}"
        "{{ '<arg_key>' ~ k ~ '</arg_key>\n<arg_value>' ~ (v if v is string else v | tojson) ~ '</arg_value>\n' }}"
        "{%- endfor -%}{{ '</tool_call>' }}{%- endfor -%}",
        "{{ '<|observation|>\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}",
        "{{ '<|' ~ m.role ~ '|>\n' ~ m.content }}",
        "<|assistant|>",
        ("<|assistant|>", "<|user|>", "<|observation|>"),
        "",
    ),
    "mistral": Family(
        ("mistral", "mistral"),
        "{%- if m.reasoning_content -%}{{ '[THINK]' ~ m.reasoning_content ~ '[/THINK]' }}{%- endif -%}{{ m.content }}"
        "{%- for c in m.tool_calls -%}" + MISTRAL_ID + "{{ '[TOOL_CALLS]' ~ c.function.name ~ '[ARGS]' ~ "
        "c.function.arguments | tojson }}{%- endfor -%}",
        MISTRAL_TOOL,
        MISTRAL_OTHER,
        "",
        (
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[THINK]",
            "[/THINK]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
            "</s>",
        ),
        "</s>",
    ),
    "mistral-list": Family(
        ("mistral_list", "none"),
        "{{ m.content }}{%- if m.tool_calls -%}{{ '[TOOL_CALLS] [' }}{%- for c in m.tool_calls -%}"
        + MISTRAL_ID
        + '{{ \'{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ c.function.arguments | tojson ~ \', "id": "\' '
        "~ c.id ~ '\"}' ~ (', ' if not loop.last else ']') }}{%- endfor -%}{%- endif -%}",
        MISTRAL_TOOL,
        MISTRAL_OTHER,
        "",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"),
        "</s>",
        reasoning_field=None,
    ),
    "llama3": Family(
        ("llama3_json", "none"),
        '{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}{{ \'{"name": "\' ~ c.function.name ~ '
        "'\", \"parameters\": ' ~ c.function.arguments | tojson ~ '}' }}{%- endfor -%}{%- else -%}{{ m.content }}{%- endif -%}"
        "{%- if '<|python_tag|>' in m.content -%}{%- endif -%}",
        LLAMA3.replace("m.role", "'ipython'"),
        LLAMA3,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
        "<|eot_id|>",
        several=False,
        reasoning_field=None,
    ),
    "llama4": Family(
        ("pythonic", "none"),
        "{%- if m.tool_calls -%}{{ '<|python_start|>[' }}{%- for c in m.tool_calls -%}{{ c.function.name ~ '(' }}"
        "{%- for k, v in c.function.arguments.items() -%}{{ k ~ '=' ~ v | tojson ~ (', ' if not loop.last else '') }}"
        "{%- endfor -%}{{ ')' ~ (', ' if not loop.last else ']') }}{%- endfor -%}{{ '<|python_end|>' }}"
        "{%- else -%}{{ m.content }}{%- endif -%}",
        LLAMA4.replace("m.role", "'ipython'"),
        LLAMA4,
        "<|header_start|>assistant<|header_end|>\n\n",
        ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|python_start|>", "<|python_end|>"),
        "<|eot|>",
        reasoning_field=None,
    ),
    "deepseek-r1": Family(
        ("deepseek_v3", "deepseek_r1"),
        "{{ m.content.split('</think>')[-1] }}{%- if m.tool_calls -%}{{ '<｜tool▁calls▁begin｜>' }}"
        "{%- for c in m.tool_calls -%}{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + "
        "'\n```json\n' + c.function.arguments + '\n```<｜tool▁call▁end｜>' }}{%- endfor -%}{{ '<｜tool▁calls▁end｜>' }}{%- endif -%}",
        DEEPSEEK_TOOL,
        DEEPSEEK_OTHER,
        "<｜Assistant｜>",
        DEEPSEEK_TOKENS,
        "<｜end▁of▁sentence｜>",
        text_arguments=True,
        reasoning_field=None,
    ),
    "deepseek-v31": Family(
        ("deepseek_v31", "think"),
        "{{ '</think>' ~ m.content.split('</think>')[-1] }}{%- if m.tool_calls -%}{{ '<｜tool▁calls▁begin｜>' }}"
        "{%- for c in m.tool_calls -%}{{ '<｜tool▁call▁begin｜>' ~ c.function.name ~ '<｜tool▁sep｜>' ~ "
        "c.function.arguments ~ '<｜tool▁call▁end｜>' }}{%- endfor -%}{{ '<｜tool▁calls▁end｜>' }}{%- endif -%}",
        DEEPSEEK_TOOL,
        DEEPSEEK_OTHER,
        "<｜Assistant｜><think>",
        DEEPSEEK_TOKENS,
        "<｜end▁of▁sentence｜>",
        text_arguments=True,
        reasoning_field=None,
    ),
    "kimi": Family(
        ("kimi_k2", "think"),
        "{{ '<think>' ~ m.reasoning_content ~ '</think>' ~ m.content }}{%- if m.tool_calls -%}"
        "{{ '<|tool_calls_section_begin|>' }}{%- for c in m.tool_calls -%}" + KIMI_CALL + "{%- endfor -%}"
        "{{ '<|tool_calls_section_end|>' }}{%- endif -%}",
        "{{ '<|im_system|>## Return of ' ~ m.tool_call_id ~ '\n' ~ m.content ~ '<|im_end|>' }}",
        "{{ '<|im_user|>' ~ m.content ~ '<|im_end|>' }}",
        "<|im_assistant|>assistant<|im_middle|>",
        (
            *("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"),
            *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
            "<|tool_call_argument_begin|>",
        ),
        "<|im_end|>",
    ),
    "gemma4": Family(
        ("gemma4", "gemma4"),
        GEMMA_VALUE + "{%- if m.get('reasoning') or m.get('reasoning_content') -%}{{ '<|channel>thought\n' ~ "
        "(m.get('reasoning') or m.get('reasoning_content')) ~ '\n<channel|>' }}{%- endif -%}"
        "{%- for c in m.tool_calls -%}{{ '<|tool_call>call:' ~ c.function.name ~ value(c.function.arguments) ~ '<tool_call|>' }}{%- endfor -%}"
        "{{ m.content }}",
        "{{ '<|tool_response>response:tool{value:<|\"|>' ~ m.content ~ '<|\"|>}<tool_response|>' }}",
        "{{ '<|turn>' ~ m.role ~ '\n' ~ m.content ~ '<turn|>\n' }}",
        "<|turn>model\n",
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>"),
        "<turn|>\n",
    ),
    "gpt-oss": Family(
        ("harmony", "harmony"),
        "{%- if m.tool_calls -%}{%- if m.content and m.thinking -%}{{ raise_exception('both') }}{%- endif -%}"
        "{{ '<|channel|>analysis<|message|>' ~ (m.content or m.thinking) ~ '<|end|>' }}{%- set c = m.tool_calls[0] -%}"
        "{{ '<|start|>assistant to=functions.' ~ c.function.name ~ '<|channel|>commentary json<|message|>' ~ "
        "c.function.arguments | tojson ~ '<|call|>' }}{%- else -%}"
        "{{ '<|channel|>final<|message|>' ~ m.content ~ '<|end|>' }}{%- endif -%}",
        "{{ '<|start|>functions.tool to=assistant<|channel|>commentary<|message|>' ~ m.content | tojson ~ '<|end|>' }}",
        "{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}",
        "<|start|>assistant",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"),
        "",
        several=False,
        reasoning_field="thinking",
    ),
}

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


def call(index: int, name: str, arguments: Any, ids: str) -> dict[str, Any]:
    id_ = f"functions.{name}:{index}" if ids == "kimi_k2" else f"call{index:05}"
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def tokenizer_of(family: Family) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO_MODEL, chat_template=family.template)
    tokenizer.add_special_tokens({"extra_special_tokens": list(family.special_tokens)})
    return tokenizer


def conversation(family: Family, *, native: bool) -> list[dict[str, Any]]:
    """Return the conversation as clients send it, or as transformers takes it for this template."""
    reasoning = family.reasoning_field if native else "reasoning_content"
    text_arguments = family.text_arguments or not native
    calls = [("weather", ARGUMENTS)] + ([("now", {})] if family.several else [])
    messages = [USER]
    for turn in range(2):
        written = [
            call(
                2 * turn + index,
                name,
                json.dumps(arguments, ensure_ascii=False) if text_arguments else arguments,
                family.notations[0],
            )
            for index, (name, arguments) in enumerate(calls)
        ]
        thought = {reasoning: "I look it up."} if reasoning else {}
        messages.append({"role": "assistant", "content": "" if native else None, **thought, "tool_calls": written})
        messages += [{"role": "tool", "tool_call_id": item["id"], "content": "Sunny"} for item in written]
    messages.append({"role": "assistant", "content": "It is sunny.", **({reasoning: "Done."} if reasoning else {})})
    return [*messages, USER]


def decode(messages: list[dict[str, Any]]) -> Chat:
    [request] = decode_chat_completion(
        json.dumps({"model": "demo", "messages": messages, "tools": TOOLS}).encode()
    ).requests
    assert isinstance(request.prompt, Chat)
    return request.prompt


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_conversation_with_tools_is_rendered_as_transformers_renders_it(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    template = ChatTemplate(tokenizer)
    assert template.status == OK
    expected = tokenizer.apply_chat_template(
        conversation(family, native=True), tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert template.render(decode(conversation(family, native=False))) == expected


def test_turn_that_the_template_writes_is_parsed_back(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    template = ChatTemplate(tokenizer)
    output_format, names = output_notations.choose(tokenizer)
    assert (names["tool_call_format"], names["reasoning_format"]) == family.notations
    messages = conversation(family, native=False)
    prompt = template.render(decode(messages[:1]))
    chat = decode([*messages[:2], *(message for message in messages[2:4] if message["role"] == "tool")])
    whole = template._render(
        list(template._convert(chat.messages[:2])), tools=list(chat.tools), add_generation_prompt=False
    )
    assert whole.startswith(prompt)
    turn = whole.removeprefix(prompt).removesuffix(family.end)
    if not family.reasoning_field and family.notations[1] != "none":
        turn = f"I look it up.</think>{turn.removeprefix('</think>')}"
    parser = OutputParser(output_format, prompt, TOOLS)
    detokenizer = Detokenizer(tokenizer, special_tokens=parser.special_tokens)
    deltas: list[OutputDelta] = []
    for token_id in tokenizer.encode(turn, add_special_tokens=False):
        if token_id not in output_format.end_token_ids:
            deltas += parser.feed(detokenizer.push([token_id]))
    deltas += parser.feed(detokenizer.push([], last=True)) + parser.finish()
    assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == ""
    thought = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    assert thought == ("" if family.notations[1] == "none" else "I look it up.")
    found = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    heads = [delta for delta in found if delta.name]
    arguments = ["".join(delta.arguments for delta in found if delta.index == index) for index in range(len(heads))]
    calls = [(head.name, json.loads(text)) for head, text in zip(heads, arguments, strict=True)]
    assert calls == [("weather", ARGUMENTS), ("now", {})][: len(calls)]
    assert len(calls) == 1 + family.several
    # What the client sends back is accepted.
    replayed = [
        {"id": head.id, "type": "function", "function": {"name": head.name, "arguments": text}}
        for head, text in zip(heads, arguments, strict=True)
    ]
    results = [{"role": "tool", "tool_call_id": item["id"], "content": "Sunny"} for item in replayed]
    assistant = {"role": "assistant", "content": None, "reasoning_content": thought, "tool_calls": replayed}
    assert template.render(decode([USER, assistant, *results])).startswith(prompt)


def test_reasoning_beside_text_and_calls_is_left_out_if_the_template_rejects_it() -> None:
    template = ChatTemplate(tokenizer_of(FAMILIES["gpt-oss"]))
    messages = conversation(FAMILIES["gpt-oss"], native=False)[:3]
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
    tokenizer = tokenizer_of(FAMILIES["mistral"])
    tokens = tokenizer.encode("Hi[INST] é[TOOL_CALLS]x[/INST]é", add_special_tokens=False)
    assert Detokenizer(tokenizer).push(tokens, last=True) == "Hi éxé"
    kept = {tokenizer.convert_tokens_to_ids("[TOOL_CALLS]"): "[TOOL_CALLS]"}
    detokenizer = Detokenizer(tokenizer, special_tokens=kept, stop=["[TOOL_CALLS]x"])
    assert re.sub("x$", "", "".join(detokenizer.push([token]) for token in tokens)) == "Hi é"
    assert detokenizer.found_stop
    detokenizer = Detokenizer(tokenizer, special_tokens=kept)
    assert "".join(detokenizer.push([token]) for token in tokens) == "Hi é[TOOL_CALLS]xé"
