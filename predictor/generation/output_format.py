"""Description of how a model marks reasoning and tool calls in what it writes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

import regex

from predictor.generation.call_envelope import CallEnvelope
from predictor.generation.tokenizer import ChatTokenizer

_MAX_PREFILL = 256
"""Characters at the end of a prompt that may begin or end the reasoning."""


class Content(Enum):
    """What a region of the output contains."""

    REASONING = "reasoning"
    MARKER = "marker"
    """Nothing; what matches `start` is dropped."""
    ARGUMENTS = "arguments"
    """JSON arguments of one call, whose name is the group `name` of `start`."""
    OBJECTS = "objects"
    """JSON objects with name and arguments, one by one or in a list."""
    PYTHON = "python"
    """Calls of Python functions."""
    TEMPLATE = "template"
    """Calls that transformers parses by the region's response template."""


class CallIds(StrEnum):
    """Form of the ids of tool calls: some chat templates accept only their own when the calls are sent back."""

    ANY = "any"
    ALPHANUMERIC_9 = "9 letters or digits"
    """Mistral."""
    NAME_AND_INDEX = "functions.NAME:INDEX"
    """Kimi."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Part of the output that is not plain text.

    `start` and `end` are regular expressions that match a bounded length, and never an empty text.
    """

    content: Content
    start: str
    end: str | None = None
    """None: the content itself shows where it ends."""
    last_end: str | None = None
    """Text that ends the region too if the output ends with it."""
    bare: bool = False
    """No marker: `start` is part of the content. Only at the start of the message, and only known tools are called."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """For `Content.TEMPLATE`, of transformers, with a field `tool_calls`."""

    @property
    def is_tool_call(self) -> bool:
        """Whether the region contains tool calls."""
        return self.content not in (Content.REASONING, Content.MARKER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notation:
    """How models of one family write reasoning, or tool calls, or both."""

    regions: tuple[Region, ...]
    begins_in_reasoning: bool = False
    """The output begins with reasoning, with or without a marker."""
    envelope: CallEnvelope | None = None
    """How calls with JSON arguments may be written, for grammars."""
    reasoning_marks: tuple[str, str] | None = None
    """What the model writes before and after the reasoning, for grammars."""
    text_start: str = ""
    """What the model writes before the text of a message, for grammars."""
    call_ids: CallIds = CallIds.ANY
    end_tokens: tuple[str, ...] = ()
    """Special tokens that end the message, in addition to the model's end of sequence."""

    @property
    def markers(self) -> str:
        """Text that contains all markers."""
        texts = [text for region in self.regions for text in _strings([region.start, region.end, region.template])]
        # In regular expressions, backslashes are before some characters.
        return "\0".join(texts + [text.replace("\\", "") for text in texts])


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """What the output of a model is parsed by.

    Args:
        tokenizer: the model's.
        reasoning: notation of the reasoning; None: it is text.
        tool_calls: notation of tool calls; None: they are text.
    """

    tokenizer: ChatTokenizer
    reasoning: Notation | None = None
    tool_calls: Notation | None = None
    special_tokens: Mapping[int, str] = field(init=False)
    """Special tokens, by id, that are markers."""
    end_token_ids: tuple[int, ...] = field(init=False)
    """Tokens that end the message, in addition to the model's end of sequence."""

    def __post_init__(self) -> None:
        # Found once: tokenizers build the table of their added tokens for each use.
        tokens = dict(self.tokenizer.added_tokens_decoder)
        markers = "\0".join(notation.markers for notation in self._notations)
        ends = {text for notation in self._notations for text in notation.end_tokens}
        special = {id_: token.content for id_, token in tokens.items() if token.special and token.content in markers}
        object.__setattr__(self, "special_tokens", special)
        object.__setattr__(self, "end_token_ids", tuple(id_ for id_, token in tokens.items() if token.content in ends))

    @property
    def envelope(self) -> CallEnvelope | None:
        """How calls with JSON arguments may be written; None if unknown."""
        return self.tool_calls.envelope if self.tool_calls else None

    @property
    def reasoning_marks(self) -> tuple[str, str] | None:
        """What the model writes before and after the reasoning; None if unknown."""
        return self.reasoning.reasoning_marks if self.reasoning else None

    @property
    def text_start(self) -> str:
        """What the model writes before the text of a message."""
        return next((notation.text_start for notation in self._notations if notation.text_start), "")

    @property
    def _notations(self) -> list[Notation]:
        return [notation for notation in (self.reasoning, self.tool_calls) if notation is not None]

    def regions(self, *, tools: bool) -> list[Region]:
        """Return the regions to look for; those of tool calls only if there are tools."""
        regions = [region for notation in self._notations for region in notation.regions]
        chosen = [
            region
            for region in regions
            if region.content is Content.MARKER
            or (region.content is Content.REASONING and self.reasoning is not None)
            or (region.is_tool_call and tools and self.tool_calls is not None)
        ]
        return [region for position, region in enumerate(chosen) if region not in chosen[:position]]

    def open_reasoning(self, prompt: str, continued: str | None) -> Region | None:
        """Return the region of the reasoning in which a completion begins; None if it does not.

        Args:
            prompt: the rendered chat.
            continued: the text of the assistant's message that the completion continues; None: it begins a new one.
        """
        text = prompt[-_MAX_PREFILL:] if continued is None else continued
        for region in self.reasoning.regions if self.reasoning else ():
            if region.content is not Content.REASONING or region.end is None:
                continue
            *_, rest = [None, *(text[match.end() :] for match in regex.finditer(region.start, text))]
            if rest is not None and not regex.search(region.end, rest) and (continued is not None or not rest.strip()):
                return region
            ended = regex.search(region.end if continued is not None else rf"(?:{region.end})\s*\Z", text)
            if self.reasoning and self.reasoning.begins_in_reasoning and ended is None:
                return region
        return None


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a value of JSON, except the names of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)
