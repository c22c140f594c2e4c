"""Separate reasoning, text and tool calls in what a model writes in a chat.

Models mark them in notations of their own; an `OutputFormat` describes one. Streams and whole responses use the same
parser, so that they agree. What cannot be parsed is text: nothing is lost, and nothing raises an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import regex

from predictor.generation.incremental_text import IncrementalText, Reads
from predictor.generation.output_format import CallIds, Content, OutputFormat, Region
from predictor.generation.tool_call_reader import ToolCallReader
from predictor.types import OutputDelta, ReasoningDelta, TextDelta


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
        self._regions = output_format.regions(tools=bool(tools))
        self._input = IncrementalText()
        self._calls = ToolCallReader(
            self._input,
            output_format.tokenizer,
            tools,
            call_ids=output_format.tool_calls.call_ids if output_format.tool_calls else CallIds.ANY,
            parallel=parallel_tool_calls,
            emit=self._emit,
        )
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
        return 0 < self._calls.num_complete == self._calls.count

    @property
    def stopped(self) -> bool:
        """Whether the message is complete, since it has the only tool call allowed."""
        return self._calls.stopped

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
            if bare.regions and not self._text.started and not self._calls.count and (yield from self._input.peek()):
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
            else:
                self._text.end_section()

    def _read_reasoning(self, region: Region) -> Reads[None]:
        self.in_reasoning = True
        self._text.end_section()
        self._reasoning.end_section()
        if (yield from self._input.find(regex.compile(region.end, regex.DOTALL), self._add_reasoning)) is not None:
            self.in_reasoning = False

    def _read_calls(self, region: Region, match: Any) -> Reads[None]:
        count = self._calls.count
        rest = yield from self._calls.read(region, match)
        if self._calls.count > count:
            self._text.end_section()
        self._add_text(rest)

    def _emit(self, delta: OutputDelta) -> None:
        self._deltas.append(delta)

    def _add_text(self, text: str) -> None:
        if trimmed := self._text.push(text):
            self._emit(TextDelta(trimmed))

    def _add_reasoning(self, text: str) -> None:
        self._has_read_reasoning = True
        if trimmed := self._reasoning.push(text):
            self._emit(ReasoningDelta(trimmed))


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
