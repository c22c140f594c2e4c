"""Keep control tokens in the texts of a chat from acting as such: only the chat template may write turns.

transformers' `sanitize_control_tokens` does the same, but reads the added tokens again for every chat (0.1 s for a
vocabulary with 6,000 of them), and also escapes what templates look for in messages, such as `<think>`.
"""

import re
from typing import Any

from predictor.generation.tokenizer import ChatTokenizer

BREAK = "\ufdd0"
"""Separates texts that are encoded on their own. Unicode reserves it for such internal use; in a chat it is dropped."""


class ControlTokens:
    """The control tokens of a model.

    Args:
        tokenizer: the model's. Its special tokens are control tokens, of more than one character.
        written: text that the chat template writes. Other added tokens in it are control tokens too.
        read: text that the chat template looks for in messages, so that it may occur there: `</think>`.
    """

    def __init__(self, tokenizer: ChatTokenizer, written: str = "", read: str = "") -> None:
        texts = {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or (token.content in written and token.content not in read and not token.content.isspace())
        }
        longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def escape(self, value: Any) -> Any:
        """Return a JSON value with BREAK inside each control token of its strings, keys of objects included."""
        if isinstance(value, str):
            return self._break(value.replace(BREAK, ""))
        if isinstance(value, dict):
            return {self.escape(name): self.escape(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.escape(item) for item in value]
        return value

    def _break(self, text: str) -> str:
        # What follows the first character may be a control token too.
        return self._pattern.sub(lambda match: match[0][0] + BREAK + self._break(match[0][1:]), text)
