"""Find the notation in which a model writes reasoning and tool calls."""

from typing import Any

from predictor.generation.output_parser import OutputFormat
from predictor.generation.tokenizer import ChatTokenizer
from predictor.generation.tool_call_notation import ToolCallNotation

HERMES: dict[str, Any] = {
    "start_anchor_pattern": r"(?!)",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {},
    },
}
HERMES_CALLS = ToolCallNotation(
    trigger="<tool_call>", begin='<tool_call>\n{"name": "', middle='", "arguments": ', end="}\n</tool_call>"
)


def detect(tokenizer: ChatTokenizer) -> OutputFormat | None:
    """Return the format that the chat template shows; None if it shows none."""
    template = tokenizer.get_chat_template(None, [{}]) if tokenizer.chat_template else ""
    return OutputFormat(tokenizer, HERMES, HERMES_CALLS) if "<tool_call>" in template else None
