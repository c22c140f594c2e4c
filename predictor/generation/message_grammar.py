"""Grammar of an assistant's message: reasoning, then tool calls, structured output or text.

Tool calls are in the model's own notation, with the names of the request's tools and arguments that follow their
schemas. What a request leaves free stays free: text around the calls, and reasoning before them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from predictor.errors import InvalidRequest
from predictor.generation.call_envelope import CallEnvelope
from predictor.generation.output_format import OutputFormat
from predictor.types import Chat, GrammarKind, StructuredOutput

Literal = Callable[[str], str]
"""Writes a text as Lark's symbols, special tokens in it as such."""

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

_TEXT = "/(?s:.*)/"
_LINE_FEEDS = r"/\n{0,2}/"
"""Between reasoning and what follows, if nothing else is between them."""


class ReasoningState(Enum):
    """Where the reasoning of a message is when the completion begins."""

    ENDED = auto()
    """There is none, or it ended in the prompt."""
    POSSIBLE = auto()
    """The completion may begin with it."""
    OPEN = auto()
    """The prompt has begun it."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Marks of the reasoning, and where it is."""

    open: str = ""
    close: str = ""
    state: ReasoningState = ReasoningState.ENDED


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """The calls that a message may have."""

    envelope: CallEnvelope
    schemas: Mapping[str, Mapping[str, Any]]
    """JSON schema of the arguments, by the name of the tool."""
    required: bool
    """Whether the message consists of calls."""
    parallel: bool
    """Whether there may be several."""


@dataclass(frozen=True, slots=True)
class MessageGrammar:
    """What a message must follow; at least one of `calls` and `answer` is not None."""

    reasoning: Reasoning = field(default_factory=Reasoning)
    calls: ToolCalls | None = None
    answer: StructuredOutput | None = None
    """Structure of the text."""
    text_start: str = ""
    """What the model writes before the text."""

    def constraints(self) -> Iterator[tuple[str, StructuredOutput]]:
        """Yield what has a notation of its own, and its name for users; it is the next of the subgrammars."""
        if self.calls is not None:
            for name, schema in self.calls.schemas.items():
                part = self.calls.envelope.to_schema(name, schema) if self._calls_are_json else schema
                yield f"JSON schema of tool {name!r}", StructuredOutput(GrammarKind.JSON_SCHEMA, json.dumps(part))
        if self.answer is not None:
            yield self.answer.kind, self.answer

    @property
    def _calls_are_json(self) -> bool:
        """Whether a call is one JSON object, which is the only form that a grammar separates from a JSON answer."""
        return bool(self.calls and not self.calls.required and self.answer and not self.calls.envelope.marker)

    def to_lark(self, literal: Literal) -> str:
        """Return the grammar in Lark's notation, whose subgrammars `@part0` and so on are `constraints`."""
        rules = [*self._message_rules(literal), *self._reasoning_rules(literal)]
        if self._calls_are_json and self.calls is not None:
            rules.append("calls: " + " | ".join(f"@part{index}" for index in range(len(self.calls.schemas))))
        elif self.calls is not None:
            rules += _call_rules(self.calls, literal)
        return "\n".join(rules)

    def _message_rules(self, literal: Literal) -> Iterator[str]:
        start = literal(self.text_start)
        if self.calls is None:
            yield from self._start(f"{start} @part0")
        elif self.calls.required:
            yield from self._start("calls")
        elif self.answer is not None:
            yield from self._start(f"calls | {start} @part{len(self.calls.schemas)}")
        elif self.text_start:
            yield f"TEXT: {_TEXT}"
            yield from self._start(f"calls | {start} TEXT")
        else:
            yield from self._text_rules(self.calls.envelope, literal)

    def _start(self, body: str) -> Iterator[str]:
        line_feeds = "" if self.text_start else _LINE_FEEDS
        match self.reasoning.state:
            case ReasoningState.ENDED:
                yield f"start: {body}"
            case ReasoningState.POSSIBLE:
                yield f"start: (reasoning {line_feeds})? ({body})"
            case ReasoningState.OPEN:
                yield f"start: thought {line_feeds} ({body})"

    def _text_rules(self, envelope: CallEnvelope, literal: Literal) -> Iterator[str]:
        """Yield rules of text, and of calls, which begin where the text contains the envelope's marker."""
        marks = [mark for mark in map(literal, envelope.excluded) if not _has_token(mark)]
        yield f"TEXT: {_TEXT}" + "".join(f" & ~({_TEXT} {mark} {_TEXT})" for mark in marks)
        opening = literal(self.reasoning.open)
        first = "TEXT"
        if self.reasoning.state is ReasoningState.POSSIBLE and not _has_token(opening):
            # As text, reasoning could contain what begins a call.
            first = "FIRST"
            yield f"FIRST: TEXT & ~(/\\s*/ {opening} {_TEXT})"
        if not envelope.marker:
            yield f"PLAIN: {first} & ~(/\\s*[\\[{{]/ {_TEXT})"
            yield from self._start("calls | PLAIN")
            return
        yield from _called("called", "TEXT", envelope, literal)
        match self.reasoning.state:
            case ReasoningState.ENDED:
                yield "start: called* TEXT"
            case ReasoningState.OPEN:
                yield "start: thought called* TEXT"
            case ReasoningState.POSSIBLE if first == "TEXT":
                yield "start: reasoning? called* TEXT"
            case ReasoningState.POSSIBLE:
                yield "start: reasoning called* TEXT | first_called called* TEXT | FIRST"
                yield from _called("first_called", "FIRST", envelope, literal)

    def _reasoning_rules(self, literal: Literal) -> Iterator[str]:
        reasoning = self.reasoning
        if reasoning.state is ReasoningState.POSSIBLE:
            yield f"reasoning: {literal(reasoning.open)} thought"
        if reasoning.state is not ReasoningState.ENDED:
            yield from _until("thought", _TEXT, reasoning.close, literal)


def _called(name: str, text: str, envelope: CallEnvelope, literal: Literal) -> Iterator[str]:
    """Yield the rules of a text up to a call, and of this call and all that follow it directly."""
    beginning = (envelope.begin + envelope.before_name).removeprefix(envelope.marker)
    yield from _until(f"{name}_marker", text, envelope.marker, literal)
    yield f"{name}: {name}_marker {literal(beginning)} rest_of_calls"


def _until(name: str, text: str, end: str, literal: Literal) -> Iterator[str]:
    """Yield the rule of a text up to the first `end`."""
    symbols = literal(end)
    # Text does not match special tokens, so that only others need a lazy match.
    yield f"{name}: {text} {symbols}" if _has_token(symbols) else f"{name}[suffix={symbols}]: {text}"


def _has_token(symbols: str) -> bool:
    return "<[" in symbols


def _call_rules(calls: ToolCalls, literal: Literal) -> Iterator[str]:
    envelope = calls.envelope
    more = f"({literal(envelope.between_calls + envelope.before_name)} call)*" if calls.parallel else ""
    yield f"calls: {literal(envelope.begin + envelope.before_name)} rest_of_calls"
    yield f"rest_of_calls: call {more} {literal(envelope.end)}"
    names = " | ".join(f"call{index}" for index in range(len(calls.schemas)))
    yield f"call: ({names}) {literal(envelope.after_arguments)}"
    for index, name in enumerate(calls.schemas):
        written = json.dumps(name, ensure_ascii=False)[1:-1]
        yield f"call{index}: {literal(written + envelope.before_arguments)} @part{index}"


def for_chat(
    chat: Chat, prompt: str, output_format: OutputFormat | None, answer: StructuredOutput | None
) -> MessageGrammar | None:
    """Return what the message must follow that a chat requests; None if nothing.

    Args:
        chat: the request.
        prompt: the rendered chat.
        output_format: in which the model writes reasoning and tool calls, if known.
        answer: structure of the message's text.

    Raises:
        InvalidRequest: the calls cannot be restricted in this format.
    """
    enforced = [tool for tool in chat.tools if chat.requires_tool_call or _name(tool) in chat.strict_tools]
    envelope = output_format.envelope if output_format else None
    if enforced and envelope is None:
        raise _without_envelope(chat, output_format)
    calls = None
    if envelope is not None and (enforced or (chat.tools and answer)):
        schemas = {_name(tool): _arguments(tool) if tool in enforced else ANY_OBJECT for tool in chat.tools}
        calls = ToolCalls(envelope, schemas, chat.requires_tool_call, chat.parallel_tool_calls)
    if calls is None and answer is None:
        return None
    text_start = output_format.text_start if output_format and not chat.continue_final_message else ""
    return MessageGrammar(_reasoning(chat, prompt, output_format), calls, answer, text_start)


def _without_envelope(chat: Chat, output_format: OutputFormat | None) -> InvalidRequest:
    reason = "tool calls of this model's format cannot be restricted"
    if output_format is None or output_format.tool_calls is None:
        reason = "the format of this model's tool calls is unknown; the server's --tool_call_format sets it"
    if chat.requires_tool_call:
        return InvalidRequest(f"tool_choice: a call cannot be required, since {reason}. Use auto.", "tool_choice")
    return InvalidRequest(f"tools: strict is not possible, since {reason}. Omit strict.", "tools")


def _name(tool: Mapping[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


def _arguments(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments; a tool without one takes none."""
    parameters = tool["function"].get("parameters")
    if parameters is None:
        return _NO_ARGUMENTS
    types = parameters.get("type", "object")
    if "object" not in ([types] if isinstance(types, str) else types):
        raise InvalidRequest(
            f"tools: the type of the parameters of {_name(tool)!r} is not object. Set it to object.", "tools"
        )
    return {**parameters, "type": "object"}


def _reasoning(chat: Chat, prompt: str, output_format: OutputFormat | None) -> Reasoning:
    if output_format is None or output_format.reasoning_marks is None:
        return Reasoning()
    begin, end = output_format.reasoning_marks
    if output_format.open_reasoning(prompt, chat.continued_text) is not None:
        state = ReasoningState.OPEN
    elif chat.continue_final_message or prompt.rstrip().endswith(end):
        state = ReasoningState.ENDED
    else:
        state = ReasoningState.POSSIBLE
    return Reasoning(begin, end, state)
