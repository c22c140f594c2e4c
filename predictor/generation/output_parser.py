"""Separate reasoning, text and tool calls in what a model writes in a chat.

Models mark them in notations of their own; an `OutputFormat` describes one. Streams and whole responses use the same
parser, so that they agree.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from predictor.generation.call_envelope import CallEnvelope
from predictor.generation.tokenizer import ChatTokenizer, ResponseParser
from predictor.types import OutputDelta, ReasoningDelta, TextDelta, ToolCallDelta


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """Notation in which a model writes reasoning and tool calls.

    Args:
        tokenizer: the model's.
        response_template: of transformers, with the fields `content`, `reasoning_content` and `tool_calls`.
        envelope: how a call with JSON arguments is written; None if there is no such notation.
    """

    tokenizer: ChatTokenizer
    response_template: Mapping[str, Any]
    envelope: CallEnvelope | None = None

    def parser(self, prompt: str, tools: Sequence[Mapping[str, Any]], *, parallel_tool_calls: bool) -> "OutputParser":
        """Return a parser for one completion of a rendered chat; without tools, it finds no calls."""
        fields = {
            name: field for name, field in self.response_template["fields"].items() if tools or name != "tool_calls"
        }
        template = {**self.response_template, "fields": fields}
        parser = self.tokenizer.get_response_parser(template, prefix=prompt, tools=list(tools))
        return OutputParser(parser, parallel_tool_calls=parallel_tool_calls)


class OutputParser:
    """Incremental parser of one completion."""

    def __init__(self, parser: ResponseParser, *, parallel_tool_calls: bool = True) -> None:
        self._parser = parser
        self._parallel_tool_calls = parallel_tool_calls
        self._num_calls = 0
        self.in_reasoning = False
        """Whether the text so far ends inside the reasoning."""

    @property
    def has_tool_calls(self) -> bool:
        """Whether a tool call was found."""
        return self._num_calls > 0

    @property
    def stopped(self) -> bool:
        """Whether the message is complete, since it has the only tool call allowed."""
        return self.has_tool_calls and not self._parallel_tool_calls

    def feed(self, text: str) -> list[OutputDelta]:
        """Return what is now certain."""
        return self._convert(self._parser.feed(text))

    def finish(self) -> list[OutputDelta]:
        """Return the rest; the completion has ended."""
        return self._convert(self._parser.finalize()[1])

    def _convert(self, events: list[dict[str, Any]]) -> list[OutputDelta]:
        deltas: list[OutputDelta] = []
        for event in events:
            if self.stopped:
                break
            kind, field = event["type"], event["field"]
            if field == "reasoning_content":
                self.in_reasoning = kind != "region_close"
                if kind == "region_chunk":
                    deltas.append(ReasoningDelta(event["text"]))
            elif field == "content" and kind == "region_chunk":
                deltas.append(TextDelta(event["text"]))
            elif field == "tool_calls" and kind == "region_close":
                function = event["value"]["function"]
                arguments = json.dumps(function["arguments"], ensure_ascii=False)
                id_ = f"call_{uuid.uuid4().hex[:24]}"
                deltas.append(ToolCallDelta(self._num_calls, id=id_, name=function["name"]))
                deltas.append(ToolCallDelta(self._num_calls, arguments))
                self._num_calls += 1
        return deltas
