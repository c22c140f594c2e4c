"""Text that arrives in pieces, for parsers written as generators that wait for more.

Each character is looked at a bounded number of times, whatever the size of the pieces.
"""

import json
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import regex

T = TypeVar("T")
Reads = Generator[None, None, T]
"""Yields while it waits for more text; returns a T."""
Emit = Callable[[str], None]
"""Receives a part of the text as soon as it is certain."""

_SPACE = regex.compile(r"\s*")
_SCALAR = regex.compile(r"[^\s,\]}]*")
_JSON_STRUCTURE = regex.compile(r'["{}\[\]]')
PYTHON_STRUCTURE = regex.compile(r"""["'{}\[\]()]""")
_STRING_END = {'"': regex.compile(r'["\\]'), "'": regex.compile(r"['\\]")}


class Malformed(Exception):
    """The text is not what a parser expects."""


class IncrementalText:
    """Text that is pushed in pieces and taken from the front."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._ended = False
        self._recorded: list[str] | None = None

    def push(self, text: str) -> None:
        """Add text to the end."""
        self._text = self._text[self._position :] + text
        self._position = 0

    def end(self) -> None:
        """Declare that no text follows."""
        self._ended = True

    @property
    def is_empty(self) -> bool:
        """Whether all text so far was taken."""
        return self._position == len(self._text)

    def record(self) -> None:
        """Remember what is taken from now on."""
        self._recorded = []

    def recorded(self) -> str:
        """Return what was taken since `record`, and stop remembering."""
        text = "".join(self._recorded or ())
        self._recorded = None
        return text

    def peek(self) -> Reads[str]:
        """Take whitespace, and return the next character without taking it; "" at the end."""
        while True:
            end = _SPACE.match(self._text, self._position).end()
            self._take(end)
            if end < len(self._text):
                return self._text[end]
            if self._ended:
                return ""
            yield

    def expect(self, character: str) -> Reads[None]:
        """Take whitespace and this character.

        Raises:
            Malformed: another one is next.
        """
        if (yield from self.peek()) != character:
            raise Malformed
        self._take(self._position + 1)

    def find(self, pattern: Any, emit: Emit) -> Reads[Any]:
        """Take text up to and including the next match of a pattern that matches no empty text.

        Args:
            pattern: of `regex`.
            emit: receives the text before the match.

        Returns:
            The match; None if the text ends before.
        """
        while True:
            match = pattern.search(self._text, self._position, partial=not self._ended)
            start = len(self._text) if match is None else match.start()
            if start > self._position:
                emit(self._take(start))
            if match is not None and not match.partial:
                self._take(match.end())
                return match
            if self._ended:
                return None
            yield

    def match(self, pattern: Any, *, take: bool = True) -> Reads[Any]:
        """Return the match of a pattern at the front, and take it if wished; None if there is none."""
        while True:
            match = pattern.match(self._text, self._position, partial=not self._ended)
            if match is None:
                return None
            if not match.partial:
                if take:
                    self._take(match.end())
                return match
            yield

    def json_value(self, emit: Emit) -> Reads[None]:
        """Take a value of JSON; only brackets and quotes are checked.

        Raises:
            Malformed: the text ends before the value does.
        """
        if (first := (yield from self.peek())) == "":
            raise Malformed
        if first in '{["':
            yield from self.balanced(emit, _JSON_STRUCTURE)
            return
        while True:
            end = _SCALAR.match(self._text, self._position).end()
            emit(self._take(end))
            if self._ended or end < len(self._text):
                return
            yield

    def json_string(self) -> Reads[str]:
        """Take a string of JSON and return its value.

        Raises:
            Malformed: there is none.
        """
        if (yield from self.peek()) != '"':
            raise Malformed
        parts: list[str] = []
        yield from self.json_value(parts.append)
        return str(load_json("".join(parts)))

    def balanced(self, emit: Emit, structure: Any) -> Reads[None]:
        """Take a string, or text in brackets with the strings and brackets inside.

        Args:
            emit: receives the text.
            structure: pattern of `regex` that matches quotes and brackets; the next character is one.

        Raises:
            Malformed: the text ends before.
        """
        depth, quote = 0, ""
        position = self._position
        while True:
            while (match := (_STRING_END[quote] if quote else structure).search(self._text, position)) is not None:
                position = match.end()
                character = match[0]
                if character == "\\":
                    position += 1
                elif character in _STRING_END:
                    quote = "" if quote else character
                else:
                    depth += 1 if character in "{[(" else -1
                if not quote and depth <= 0 and character != "\\":
                    emit(self._take(position))
                    return
                if position >= len(self._text):
                    break
            # An escaped character may be in the next piece.
            escaped = max(0, position - len(self._text))
            if not self.is_empty:
                emit(self._take(len(self._text)))
            if self._ended:
                raise Malformed
            yield
            position = self._position + escaped

    def _take(self, end: int) -> str:
        text = self._text[self._position : end]
        self._position = end
        if self._recorded is not None and text:
            self._recorded.append(text)
        return text


def load_json(text: str) -> Any:
    """Parse JSON, with control characters in its strings, which models write.

    Raises:
        Malformed: it is not JSON.
    """
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise Malformed from error
