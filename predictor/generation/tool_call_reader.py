"""Read the tool calls in a region of a model's output."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex

from predictor.generation import python_calls
from predictor.generation.incremental_text import PYTHON_STRUCTURE, IncrementalText, Malformed, Reads, load_json
from predictor.generation.output_format import CallIds, Content, Region
from predictor.generation.tokenizer import ChatTokenizer
from predictor.types import ToolCallDelta

_NAME = regex.compile(r"[^\s\"'<>{}()\[\]\\]{1,256}")
_ARGUMENTS = frozenset({"arguments", "parameters"})
_OTHER_KEYS = frozenset({"type", "id", "index"})
_OBJECT_START = regex.compile(r'\{\s{0,64}["}]')
_MISTRAL_ID = regex.compile(r"[A-Za-z0-9]{9}")
_KIMI_ID = regex.compile(r"functions\..{1,256}:\d{1,9}")


class ToolCallReader:
    """Reads tool calls as deltas.

    Args:
        text: the completion.
        tokenizer: the model's.
        tools: that may be called.
        call_ids: form of the ids.
        parallel: there may be several calls.
        emit: receives what is certain.
    """

    def __init__(
        self,
        text: IncrementalText,
        tokenizer: ChatTokenizer,
        tools: Sequence[Mapping[str, Any]],
        *,
        call_ids: CallIds,
        parallel: bool,
        emit: Callable[[ToolCallDelta], None],
    ) -> None:
        self._emit = emit
        self._input = text
        self._tokenizer = tokenizer
        self._tools = [dict(tool) for tool in tools]
        self._names = {tool.get("function", tool).get("name") for tool in self._tools}
        self._call_ids = call_ids
        self._parallel = parallel
        self._ids: set[str] = set()
        self.num_complete = 0
        """Number of calls whose arguments are complete."""
        self._lead = ""
        """Text to put before what cannot be read: the marker."""

    @property
    def count(self) -> int:
        """Number of calls, the last of which may be incomplete."""
        return len(self._ids)

    @property
    def stopped(self) -> bool:
        """Whether no further call is allowed."""
        return self.num_complete > 0 and not self._parallel

    def read(self, region: Region, match: Any) -> Reads[str]:
        """Read all calls of a region, whose start was taken as `match`.

        Returns:
            Text that is no call, and that was taken too.
        """
        self._lead = "" if region.bare else match[0]
        self._input.record()
        try:
            match region.content:
                case Content.ARGUMENTS:
                    yield from self._read_arguments(match["name"], match.groupdict().get("id"), end=region.end)
                case Content.OBJECTS:
                    yield from self._read_objects(known_only=region.bare)
                case Content.PYTHON:
                    calls = python_calls.parse((yield from self._read_python(region)))
                    self._add_calls(calls, known_only=region.bare)
                case _:
                    self._add_calls(self._apply(region, match[0] + (yield from self._read_to_end(region))))
        except Malformed:
            return self._lead + self._input.recorded()
        self._input.recorded()
        if region.end is not None and not self.stopped and region.content in (Content.ARGUMENTS, Content.OBJECTS):
            # Models may close more brackets than they opened.
            yield from self._input.match(regex.compile(rf"[\s\]}}]{{0,64}}(?:{region.end})", regex.DOTALL))
        return ""

    def _read_arguments(self, name: str, id_: str | None = None, *, end: str | None = None) -> Reads[None]:
        """Read the arguments of a call, whose beginning and fragments become deltas as soon as they are certain."""
        if (yield from self._input.peek()) == "{":
            if (yield from self._input.match(_OBJECT_START, take=False)) is None:
                raise Malformed
            self._begin_call(name, id_)
            yield from self._input.json_value(self._add_arguments)
        else:
            is_empty = (
                end is not None
                and (yield from self._input.match(regex.compile(end, regex.DOTALL), take=False)) is not None
            )
            arguments = "{}" if is_empty else (yield from self._read_whole_arguments())
            self._begin_call(name, id_)
            self._add_arguments(arguments)
        self.num_complete += 1
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
            elif key in _ARGUMENTS and name and len(self._ids) == count:
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
            self._add_call(name, arguments or "{}")

    def _read_python(self, region: Region) -> Reads[str]:
        parts: list[str] = []
        if region.end is None:
            yield from self._input.balanced(parts.append, PYTHON_STRUCTURE)
        else:
            yield from self._input.find(regex.compile(region.end, regex.DOTALL), parts.append)
        return "".join(parts)

    def _read_to_end(self, region: Region) -> Reads[str]:
        parts: list[str] = []
        end = yield from self._input.find(regex.compile(region.end or "(?!)", regex.DOTALL), parts.append)
        text = "".join(parts)
        if end is not None:
            return text + str(end[0])
        if region.end is not None and not (region.last_end and text.rstrip().endswith(region.last_end)):
            raise Malformed
        return text

    def _apply(self, region: Region, text: str) -> list[tuple[str, Any]]:
        """Return the names and the arguments that transformers finds in the text of a region."""
        try:
            message = self._tokenizer.parse_response(text, dict(region.template), prefix="", tools=self._tools)
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
                self._add_call(name, arguments)

    def _add_call(self, name: str, arguments: str) -> None:
        self._begin_call(name)
        self._add_arguments(arguments)
        self.num_complete += 1

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
        self._emit(ToolCallDelta(index, id=id_, name=name))

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
        self._emit(ToolCallDelta(len(self._ids) - 1, text))


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
