"""Find the notation in which a model writes reasoning and tool calls."""

from typing import Any

from predictor.generation import call_envelope
from predictor.generation.output_parser import OutputFormat
from predictor.generation.tokenizer import ChatTokenizer

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


def detect(tokenizer: ChatTokenizer) -> OutputFormat | None:
    """Return the format that the chat template shows; None if it shows none."""
    template = tokenizer.get_chat_template(None, [{}]) if tokenizer.chat_template else ""
    return OutputFormat(tokenizer, HERMES, call_envelope.HERMES) if "<tool_call>" in template else None
