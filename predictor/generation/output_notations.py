"""The notations in which families of models write reasoning and tool calls, and how a model's are found.

The settings `tool_call_format` and `reasoning_format` take their names.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import regex

from predictor.generation.call_envelope import CallEnvelope
from predictor.generation.output_format import CallIds, Content, Notation, OutputFormat, Region
from predictor.generation.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)

AUTO, NONE, TOKENIZER = "auto", "none", "tokenizer"

_NAME = r"(?P<name>[\w./-]{1,128})"
_JSON_NEXT = r"(?=\s{0,8}[\[{])"
_FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_HERMES = CallEnvelope(
    '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", between_calls="\n", marker="<tool_call>"
)
_BARE_JSON = CallEnvelope('{"name": "', '", "parameters": ', "}", between_calls="; ")
_BARE_OBJECTS = Region(content=Content.OBJECTS, start=r"(?:\[\s{0,8})?\{", bare=True)
_TAGGED_JSON = Region(content=Content.OBJECTS, start=f"<tool_call>{_JSON_NEXT}", end="</tool_call>")


def _template(**tool_calls: Any) -> dict[str, Any]:
    """Return a response template of transformers with one kind of calls; all other text is its content."""
    return {"start_anchor_pattern": "(?!)", "fields": {"tool_calls": {"repeats": True, **tool_calls}, "content": {}}}


_QWEN_XML = _template(
    open_pattern=r"<function=(?P<name>[^>\n]+)>",
    close_pattern=r"</function>\s*(?:</tool_call>|(?=<function=|<tool_call>)|\Z)",
    content="xml-inline",
    content_args={"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?(?:</parameter>|\Z)"},
    transform=_FUNCTION,
)
_GLM_XML = _template(
    open_pattern=r"<tool_call>\s*(?P<name>[^\s<]+)",
    close_pattern=r"</arg_value>\s*</tool_call>",
    content="xml-inline",
    content_args={"tag_pattern": r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>(?P<value>.*?)(?:</arg_value>|\Z)"},
    transform=_FUNCTION,
)
_GEMMA = _template(
    open_pattern=r"<\|tool_call>\s*call:(?P<name>[^\s{]+)",
    close="<tool_call|>",
    content="json",
    content_args={"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
    transform=_FUNCTION,
)


def _deepseek(start: str, envelope: CallEnvelope) -> Notation:
    call = Region(content=Content.ARGUMENTS, start=start, end=r"\s{0,4}(?:```)?\s{0,4}<｜tool▁call▁end｜>")
    section = Region(content=Content.MARKER, start="<｜tool▁calls▁begin｜>|<｜tool▁calls▁end｜>")
    return Notation(regions=(call, section), envelope=envelope)


_MISTRAL_REGIONS = (
    Region(content=Content.OBJECTS, start=rf"\[TOOL_CALLS\]{_JSON_NEXT}"),
    Region(
        content=Content.ARGUMENTS,
        start=rf"\[TOOL_CALLS\]\s{{0,4}}{_NAME}(?:\[CALL_ID\](?P<id>\w{{1,64}}))?(?:\[ARGS\]|(?=\{{))",
    ),
)
_HARMONY_START = r"(?:<\|start\|>assistant)?"
_HARMONY_BODY = r"\s?(?:<\|constrain\|>)?\w{0,32}<\|message\|>"
_HARMONY_END = r"(?:<\|end\|>|<\|call\|>|<\|return\|>)"
_HARMONY_TO = rf"\s?to=(?:functions\.)?{_NAME}"
_HARMONY = Notation(
    regions=(
        Region(
            content=Content.ARGUMENTS,
            start=rf"{_HARMONY_START}<\|channel\|>(?:commentary|analysis){_HARMONY_TO}{_HARMONY_BODY}"
            rf"|{_HARMONY_START}{_HARMONY_TO}<\|channel\|>(?:commentary|analysis){_HARMONY_BODY}",
            end=_HARMONY_END,
        ),
        Region(
            content=Content.REASONING,
            start=rf"{_HARMONY_START}<\|channel\|>analysis<\|message\|>",
            end=_HARMONY_END,
        ),
        Region(
            content=Content.MARKER,
            start=rf"{_HARMONY_START}<\|channel\|>(?:final|commentary){_HARMONY_BODY}|{_HARMONY_END}",
        ),
    ),
    envelope=CallEnvelope(
        "<|channel|>commentary to=functions.",
        " <|constrain|>json<|message|>",
        end="<|call|>",
        marker="<|channel|>commentary to=",
    ),
    end_tokens=("<|call|>", "<|return|>"),
    reasoning_marks=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    text_start="<|channel|>final<|message|>",
)

TOOL_CALLS: Mapping[str, Notation] = {
    "hermes": Notation(
        regions=(Region(content=Content.OBJECTS, start="<tool_call>", end="</tool_call>"),), envelope=_HERMES
    ),
    "qwen3_coder": Notation(
        regions=(
            Region(
                content=Content.TEMPLATE,
                # Models may forget the outer tag.
                start=r"(?:<tool_call>\s{0,8})?<function=",
                end=r"</function>\s{0,8}(?:</tool_call>|(?=<function=|<tool_call>))",
                last_end="</function>",
                template=_QWEN_XML,
            ),
            _TAGGED_JSON,
        ),
        envelope=replace(_HERMES, excluded=("<function=",)),
    ),
    "glm45": Notation(
        regions=(
            Region(
                content=Content.TEMPLATE,
                start=r"<tool_call>\s{0,8}[\w./-]{1,128}\s{0,8}(?=<arg_key>)",
                end=r"</arg_value>\s{0,8}</tool_call>",
                template=_GLM_XML,
            ),
            Region(
                content=Content.ARGUMENTS,
                start=rf"<tool_call>\s{{0,8}}{_NAME}\s{{0,8}}(?=</tool_call>)",
                end="</tool_call>",
            ),
            _TAGGED_JSON,
        ),
        envelope=_HERMES,
    ),
    "mistral": Notation(
        regions=_MISTRAL_REGIONS,
        envelope=CallEnvelope("[TOOL_CALLS]", "[ARGS]", marker="[TOOL_CALLS]"),
        call_ids=CallIds.ALPHANUMERIC_9,
    ),
    "mistral_list": Notation(
        regions=_MISTRAL_REGIONS,
        envelope=CallEnvelope(
            '{"name": "',
            '", "arguments": ',
            "}",
            begin="[TOOL_CALLS][",
            end="]",
            between_calls=", ",
            marker="[TOOL_CALLS]",
        ),
        call_ids=CallIds.ALPHANUMERIC_9,
    ),
    "llama3_json": Notation(
        regions=(Region(content=Content.OBJECTS, start=r"<\|python_tag\|>"), _BARE_OBJECTS),
        envelope=_BARE_JSON,
        end_tokens=("<|eom_id|>",),
    ),
    "pythonic": Notation(
        regions=(
            Region(content=Content.PYTHON, start=r"<\|python_start\|>(?=\s{0,8}\[)", end=r"<\|python_end\|>"),
            Region(content=Content.OBJECTS, start=r"<\|python_start\|>(?=\s{0,8}\{)", end=r"<\|python_end\|>"),
            Region(content=Content.PYTHON, start=r"\[\s{0,8}[A-Za-z_][\w.]{0,127}\(", bare=True),
            _BARE_OBJECTS,
        ),
        envelope=_BARE_JSON,
    ),
    "deepseek_v3": _deepseek(
        rf"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{_NAME}\s{{0,4}}```json",
        CallEnvelope(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            begin="<｜tool▁calls▁begin｜>",
            end="<｜tool▁calls▁end｜>",
            between_calls="\n",
            marker="<｜tool▁calls▁begin｜>",
            excluded=("<｜tool▁call▁begin｜>",),
        ),
    ),
    "deepseek_v31": _deepseek(
        rf"<｜tool▁call▁begin｜>{_NAME}<｜tool▁sep｜>",
        CallEnvelope(
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            begin="<｜tool▁calls▁begin｜>",
            end="<｜tool▁calls▁end｜>",
            marker="<｜tool▁calls▁begin｜>",
            excluded=("<｜tool▁call▁begin｜>",),
        ),
    ),
    "kimi_k2": Notation(
        regions=(
            Region(
                content=Content.ARGUMENTS,
                start=r"<\|tool_call_begin\|>\s{0,4}(?P<id>(?:functions\.)?(?P<name>[\w./-]{1,128})(?::\d{1,9})?)"
                r"\s{0,4}<\|tool_call_argument_begin\|>",
                end=r"<\|tool_call_end\|>",
            ),
            Region(content=Content.MARKER, start=r"<\|tool_calls_section_begin\|>|<\|tool_calls_section_end\|>"),
        ),
        envelope=CallEnvelope(
            "<|tool_call_begin|>functions.",
            ":0<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            begin="<|tool_calls_section_begin|>",
            end="<|tool_calls_section_end|>",
            marker="<|tool_calls_section_begin|>",
            excluded=("<|tool_call_begin|>",),
        ),
        call_ids=CallIds.NAME_AND_INDEX,
    ),
    "gemma4": Notation(
        regions=(
            Region(content=Content.TEMPLATE, start=r"<\|tool_call>\s{0,8}call:", end=r"<tool_call\|>", template=_GEMMA),
            Region(content=Content.OBJECTS, start=rf"<\|tool_call>{_JSON_NEXT}", end=r"<tool_call\|>"),
        ),
        envelope=CallEnvelope('<|tool_call>{"name": "', '", "arguments": ', "}<tool_call|>", marker="<|tool_call>"),
        end_tokens=("<|tool_response>",),
    ),
    "gemma3": Notation(regions=(Region(content=Content.PYTHON, start="```tool_code", end="```"),)),
    "harmony": _HARMONY,
}
"""Notations of tool calls, by name."""


def _tags(start: str, end: str, *, begins_in_reasoning: bool = False) -> Notation:
    region = Region(content=Content.REASONING, start=regex.escape(start), end=regex.escape(end))
    return Notation(regions=(region,), begins_in_reasoning=begins_in_reasoning, reasoning_marks=(start, end))


REASONING: Mapping[str, Notation] = {
    "think": _tags("<think>", "</think>"),
    "deepseek_r1": _tags("<think>", "</think>", begins_in_reasoning=True),
    "mistral": _tags("[THINK]", "[/THINK]"),
    "gemma4": _tags("<|channel>thought\n", "<channel|>"),
    "harmony": _HARMONY,
}
"""Notations of reasoning, by name."""

_TOOL_CALL_SIGNS = (
    (("<|channel|>", "<|message|>"), "harmony"),
    (("<|tool_call_argument_begin|>",), "kimi_k2"),
    (("<｜tool▁call▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁call▁begin｜>",), "deepseek_v31"),
    (("<arg_key>",), "glm45"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("<|tool_call>",), "gemma4"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral"),
    (("[TOOL_CALLS]",), "mistral_list"),
    (("<|python_start|>",), "pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (("```tool_code",), "gemma3"),
)
"""Texts that a chat template contains, all of them, and the notation that they show; the first one counts."""


def choose(
    tokenizer: ChatTokenizer, tool_call_format: str = AUTO, reasoning_format: str = AUTO
) -> tuple[OutputFormat, dict[str, str]]:
    """Choose the notations of a model: those that are set, else those of the tokenizer or of the chat template.

    Returns:
        The format, and its names as properties of the model.
    """
    template = _chat_template(tokenizer)
    own = _own_notation(tokenizer) if AUTO in (tool_call_format, reasoning_format) else None
    notations: dict[str, Notation | None] = {}
    names = {}
    for setting, chosen, table, detect in (
        ("reasoning_format", reasoning_format, REASONING, _detect_reasoning),
        ("tool_call_format", tool_call_format, TOOL_CALLS, _detect_tool_calls),
    ):
        from_tokenizer = own is not None and chosen == AUTO
        names[setting] = TOKENIZER if from_tokenizer else detect(template) if chosen == AUTO else chosen
        notations[setting] = own if from_tokenizer else table.get(names[setting])
    output_format = OutputFormat(
        tokenizer=tokenizer, reasoning=notations["reasoning_format"], tool_calls=notations["tool_call_format"]
    )
    logger.info("format of reasoning: %s, of tool calls: %s", names["reasoning_format"], names["tool_call_format"])
    return output_format, names


def _chat_template(tokenizer: ChatTokenizer) -> str:
    if not tokenizer.chat_template:
        return ""
    templates = tokenizer.chat_template
    return "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)


def _detect_tool_calls(template: str) -> str:
    return next((name for signs, name in _TOOL_CALL_SIGNS if all(sign in template for sign in signs)), NONE)


def _detect_reasoning(template: str) -> str:
    if _detect_tool_calls(template) == "harmony":
        return "harmony"
    if "</think>" in template:
        # A template that only removes reasoning, and shows no start of it, is of a model that always reasons.
        return "think" if "<think>" in template else "deepseek_r1"
    return "mistral" if "[THINK]" in template else "gemma4" if "<|channel>" in template else NONE


def _own_notation(tokenizer: ChatTokenizer) -> Notation | None:
    """Return what the tokenizer's response template describes; None if there is none that works."""
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        return None
    try:
        tokenizer.get_response_parser(template, prefix="")
        return Notation(regions=tuple(_own_regions(template)))
    # Templates are published with models, and may have any error.
    except Exception as error:  # noqa: BLE001
        logger.warning(
            "the tokenizer's response_template does not work: %s. What the chat template contains is used instead",
            error,
        )
        return None


def _own_regions(template: Mapping[str, Any]) -> list[Region]:
    regions = []
    for name, field in template["fields"].items():
        start, end = _pattern(field, "open"), _pattern(field, "close")
        if name in ("reasoning_content", "thinking", "reasoning"):
            if start is None or end is None:
                raise ValueError(f"the field {name} needs a start and an end")
            regions.append(Region(content=Content.REASONING, start=start, end=end))
        elif name == "tool_calls":
            if start is None:
                raise ValueError("the field tool_calls needs a start")
            regions.append(Region(content=Content.TEMPLATE, start=start, end=end, template=template))
        elif name == "content":
            regions += [Region(content=Content.MARKER, start=text) for text in (start, end) if text is not None]
    return regions


def _pattern(field: Mapping[str, Any], place: str) -> str | None:
    """Return the regular expression of a field's start or end."""
    literals = field.get(place)
    pattern = field.get(f"{place}_pattern")
    if literals is not None:
        literals = [literals] if isinstance(literals, str) else sorted(literals, key=len, reverse=True)
        pattern = "|".join(map(regex.escape, literals))
    if pattern is not None and regex.compile(pattern).match(""):
        raise ValueError(f"{place}_pattern {pattern!r} matches an empty text")
    return pattern
