"""Separate reasoning, text and tool calls in what a model writes in a chat.

Models mark them in notations of their own; an `OutputFormat` describes one. Streams and whole responses use the same
parser, so that they agree. What cannot be parsed is text: nothing is lost, and nothing raises an error.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from predictor.generation import python_calls
from predictor.generation.incremental_text import (
    PYTHON_STRUCTURE,
    IncrementalText,
    Malformed,
    Reads,
    load_json,
)
from predictor.generation.output_format import CallIds, Content, OutputFormat, Region
from predictor.types import OutputDelta, ReasoningDelta, TextDelta, ToolCallDelta

_NAME = regex.compile(r"[^\s\"'<>{}()\[\]\\]{1,256}")
_ARGUMENTS = frozenset({"arguments", "parameters"})
_OTHER_KEYS = frozenset({"type", "id", "index"})
_OBJECT_START = regex.compile(r'\{\s{0,64}["}]')
_MISTRAL_ID = regex.compile(r"[A-Za-z0-9]{9}")
_KIMI_ID = regex.compile(r"functions\..{1,256}:\d{1,9}")


class OutputParser:
    """Incremental parser of one completion.

    Args:
        output_format: of the model.
        prompt: the rendered chat, whose end may begin the reasoning.
        tools: that may be called; without any, all calls are text.
        continued: the text of the assistant's message that the completion continues; None: it begins a new one.
        parallel_tool_calls: there may be several calls.
    """

    def __init__(
        self,
        output_format: OutputFormat,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        continued: str | None = None,
        parallel_tool_calls: bool = True,
    ) -> None:
        self._format = output_format
        self._tools = [dict(tool) for tool in tools]
        self._names = {tool.get("function", tool).get("name") for tool in self._tools}
        self._parallel_tool_calls = parallel_tool_calls
        self._regions = output_format.regions(tools=bool(tools))
        self._input = IncrementalText()
        self._call_ids = output_format.tool_calls.call_ids if output_format.tool_calls else CallIds.ANY
        self._ids: set[str] = set()
        self._num_complete = 0
        self._lead = ""
        """Text to put before what cannot be parsed: the marker."""
        opened = output_format.open_reasoning(prompt, continued)
        self._text = _TrimmedText(started=continued is not None and opened is None)
        self._reasoning = _TrimmedText()
        self._deltas: list[OutputDelta] = []
        self._uncounted_tokens = 0
        self._has_read_reasoning = False
        self.in_reasoning = opened is not None
        """Whether the text so far ends inside the reasoning."""
        self.reasoning_tokens = 0
        """Tokens of the reasoning, without those of its markers."""
        self.special_tokens = output_format.special_tokens
        """Special tokens, by id, whose text the parser needs."""
        self._parsing = self._parse(opened, begins=continued is None)
        self._resume()

    @property
    def has_tool_calls(self) -> bool:
        """Whether there are tool calls, the last of them complete as well."""
        return 0 < self._num_complete == len(self._ids)

    @property
    def stopped(self) -> bool:
        """Whether the message is complete, since it has the only tool call allowed."""
        return self._num_complete > 0 and not self._parallel_tool_calls

    def feed(self, text: str, *, num_tokens: int = 1) -> list[OutputDelta]:
        """Return what is now certain.

        Args:
            text: next part of the completion.
            num_tokens: number of tokens that it comes from.
        """
        self._input.push(text)
        self._uncounted_tokens += num_tokens
        return self._advance(resolved=bool(text))

    def finish(self) -> list[OutputDelta]:
        """Return the rest; the completion has ended."""
        self._input.end()
        return self._advance(resolved=True)

    def _advance(self, *, resolved: bool) -> list[OutputDelta]:
        self._has_read_reasoning = False
        if not self.stopped:
            self._resume()
        if self._has_read_reasoning:
            self.reasoning_tokens += self._uncounted_tokens
        # The text of other tokens is part of a marker, of a character or of a stop string, so far.
        if self._has_read_reasoning or (resolved and self._input.is_empty):
            self._uncounted_tokens = 0
        deltas, self._deltas = self._deltas, []
        return deltas

    def _resume(self) -> None:
        next(self._parsing, None)

    def _parse(self, opened: Region | None, *, begins: bool) -> Reads[None]:
        if opened is not None:
            if begins and (yield from self._input.peek()):
                # Models may repeat the marker that ends the prompt.
                yield from self._input.match(regex.compile(opened.start))
            yield from self._read_reasoning(opened)
        bare = _Alternatives([region for region in self._regions if region.bare])
        marked = _Alternatives([region for region in self._regions if not region.bare])
        while not self.stopped:
            if bare.regions and not self._text.started and not self._ids and (yield from self._input.peek()):
                match = yield from self._input.match(bare.pattern, take=False)
                if match is not None:
                    yield from self._read_calls(bare.matched(match), match)
                    continue
            match = yield from self._input.find(marked.pattern, self._add_text)
            if match is None:
                return
            region = marked.matched(match)
            if region.content is Content.REASONING:
                yield from self._read_reasoning(region)
            elif region.is_tool_call:
                yield from self._read_calls(region, match)

    def _read_reasoning(self, region: Region) -> Reads[None]:
        self.in_reasoning = True
        self._text.end_section()
        self._reasoning.end_section()
        if (yield from self._input.find(regex.compile(region.end), self._add_reasoning)) is not None:
            self.in_reasoning = False

    def _read_calls(self, region: Region, match: Any) -> Reads[None]:
        """Read all calls of a region; what is not one becomes text."""
        self._lead = "" if region.bare else match[0]
        self._input.record()
        try:
            match region.content:
                case Content.ARGUMENTS:
                    yield from self._read_arguments(match["name"], match.groupdict().get("id"), end=region.end)
                    self._end_call()
                case Content.OBJECTS:
                    yield from self._read_objects(known_only=region.bare)
                case Content.PYTHON:
                    calls = python_calls.parse((yield from self._read_python(region)))
                    self._add_calls(calls, known_only=region.bare)
                case _:
                    self._add_calls(self._apply(region, match[0] + (yield from self._read_to_end(region))))
        except Malformed:
            self._add_text(self._lead + self._input.recorded())
            return
        self._input.recorded()
        self._text.end_section()
        if region.end is not None and not self.stopped and region.content in (Content.ARGUMENTS, Content.OBJECTS):
            # Models may close more brackets than they opened.
            yield from self._input.match(regex.compile(rf"[\s\]}}]{{0,64}}(?:{region.end})"))

    def _read_arguments(self, name: str, id_: str | None = None, *, end: str | None = None) -> Reads[None]:
        """Read the arguments of a call, whose beginning and fragments become deltas as soon as they are certain."""
        if (yield from self._input.peek()) == "{":
            if (yield from self._input.match(_OBJECT_START, take=False)) is None:
                raise Malformed
            self._begin_call(name, id_)
            yield from self._input.json_value(self._add_arguments)
        else:
            is_empty = end is not None and (yield from self._input.match(regex.compile(end), take=False)) is not None
            arguments = "{}" if is_empty else (yield from self._read_whole_arguments())
            self._begin_call(name, id_)
            self._add_arguments(arguments)
        self._input.record()

    def _read_whole_arguments(self) -> Reads[str]:
        parts: list[str] = []
        yield from self._input.json_value(parts.append)
        text = "".join(parts)
        return text if text.startswith("{") else _object_text(load_json(text))

    def _read_objects(self, *, known_only: bool) -> Reads[None]:
        in_list = found = False
        while not self.stopped:
            character = yield from self._input.peek()
            if character == "[" and not in_list and not found:
                yield from self._input.expect("[")
                in_list = True
            elif character == "{":
                yield from self._read_object(known_only=known_only)
                self._end_call()
                found = True
                self._input.record()
            elif found and character and character in (",]" if in_list else ";"):
                yield from self._input.expect(character)
                in_list = in_list and character != "]"
            else:
                break
        if not found:
            raise Malformed

    def _read_object(self, *, known_only: bool, nested: bool = False) -> Reads[None]:
        """Read an object with `name` and `arguments`, in any order; also as the `function` of another object."""
        name, arguments, count = "", "", len(self._ids)
        separator = "{"
        while separator != "}":
            yield from self._input.expect(separator)
            key = yield from self._input.json_string()
            yield from self._input.expect(":")
            first = yield from self._input.peek()
            if key == "name" or (key == "function" and first == '"'):
                name = self._checked((yield from self._input.json_string()), known_only=known_only)
            elif key in _ARGUMENTS and name:
                yield from self._read_arguments(name)
            elif key in _ARGUMENTS:
                arguments = yield from self._read_whole_arguments()
            elif key == "function" and not nested:
                yield from self._read_object(known_only=known_only, nested=True)
            elif known_only and key not in _OTHER_KEYS:
                raise Malformed
            else:
                yield from self._input.json_value(_ignore)
            separator = "}" if (yield from self._input.peek()) == "}" else ","
        yield from self._input.expect("}")
        if len(self._ids) == count:
            if not name or (known_only and not arguments):
                raise Malformed
            self._begin_call(name)
            self._add_arguments(arguments or "{}")

    def _read_python(self, region: Region) -> Reads[str]:
        parts: list[str] = []
        if region.end is None:
            yield from self._input.balanced(parts.append, PYTHON_STRUCTURE)
        else:
            yield from self._input.find(regex.compile(region.end), parts.append)
        return "".join(parts)

    def _read_to_end(self, region: Region) -> Reads[str]:
        parts: list[str] = []
        end = yield from self._input.find(regex.compile(region.end or "(?!)"), parts.append)
        if end is None and region.end is not None:
            raise Malformed
        return "".join(parts) + (end[0] if end is not None else "")

    def _apply(self, region: Region, text: str) -> list[tuple[str, Any]]:
        """Return the names and the arguments that transformers finds in the text of a region."""
        try:
            message = self._format.tokenizer.parse_response(text, dict(region.template), prefix="", tools=self._tools)
            functions = [call["function"] for call in _flat(message["tool_calls"])]
            return [(function["name"], function["arguments"]) for function in functions]
        # Parsers and transforms of a template may raise anything for what models write.
        except Exception as error:
            raise Malformed from error

    def _add_calls(self, calls: Sequence[tuple[str, Any]], *, known_only: bool = False) -> None:
        if not calls:
            raise Malformed
        checked = [(self._checked(name, known_only=known_only), _object_text(arguments)) for name, arguments in calls]
        for name, arguments in checked:
            if not self.stopped:
                self._begin_call(name)
                self._add_arguments(arguments)
                self._end_call()

    def _checked(self, name: object, *, known_only: bool) -> str:
        if isinstance(name, str) and (name in self._names or (not known_only and _NAME.fullmatch(name))):
            return name
        raise Malformed

    def _begin_call(self, name: str, given_id: str | None = None) -> None:
        index = len(self._ids)
        id_ = self._id(name, given_id)
        self._ids.add(id_)
        self._lead = ""
        self._input.recorded()
        self._deltas.append(ToolCallDelta(index, id=id_, name=name))

    def _id(self, name: str, given: str | None) -> str:
        """Return a new id in the form that the chat template demands, as the model wrote it if it did."""
        if given in self._ids:
            given = None
        match self._call_ids:
            case CallIds.NAME_AND_INDEX:
                return given if given and _KIMI_ID.fullmatch(given) else f"functions.{name}:{len(self._ids)}"
            case CallIds.ALPHANUMERIC_9:
                return given if given and _MISTRAL_ID.fullmatch(given) else uuid.uuid4().hex[:9]
        return f"call_{uuid.uuid4().hex[:24]}"

    def _add_arguments(self, text: str) -> None:
        self._deltas.append(ToolCallDelta(len(self._ids) - 1, text))

    def _end_call(self) -> None:
        self._num_complete += 1

    def _add_text(self, text: str) -> None:
        if trimmed := self._text.push(text):
            self._deltas.append(TextDelta(trimmed))

    def _add_reasoning(self, text: str) -> None:
        self._has_read_reasoning = True
        if trimmed := self._reasoning.push(text):
            self._deltas.append(ReasoningDelta(trimmed))


class _TrimmedText:
    """Text without the whitespace around it; one line feed is between its sections.

    Args:
        started: the text continues other text.
    """

    def __init__(self, *, started: bool = False) -> None:
        self.started = started
        """Whether there was any text but whitespace."""
        self._inside = started
        self._space: list[str] = []
        """Whitespace held back until text follows."""

    def push(self, text: str) -> str:
        """Return what is certain to be inside."""
        if not self._inside:
            text = text.lstrip()
        inside = text.rstrip()
        space = text[len(inside) :]
        if not inside:
            self._space.append(space)
            return ""
        inside = "".join(self._space) + inside
        self.started = self._inside = True
        self._space = [space]
        return inside

    def end_section(self) -> None:
        """End a section; what follows is separate from it."""
        if self.started:
            self._inside = False
            self._space = ["\n"]


class _Alternatives:
    """Regions one of which may begin at a place."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = regions
        starts = (f"(?P<region{index}>{region.start})" for index, region in enumerate(regions))
        self.pattern = regex.compile("|".join(starts) or "(?!)", regex.DOTALL)

    def matched(self, match: Any) -> Region:
        """Return the region whose start is this match of `pattern`."""
        return next(region for index, region in enumerate(self.regions) if match.start(f"region{index}") >= 0)


def _object_text(value: object) -> str:
    """Return arguments as JSON of an object; models may encode them twice, or write null."""
    if isinstance(value, str):
        value = load_json(value)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise Malformed
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if _is_unicode(text) else json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed from error


def _is_unicode(text: str) -> bool:
    """Whether there are no halves of surrogate pairs, which cannot be sent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _flat(value: Any) -> list[Any]:
    return [item for element in value for item in _flat(element)] if isinstance(value, list) else [value]


def _ignore(_: str) -> None:
    pass
