"""Incremental detokenization and stop strings."""

from collections.abc import Sequence

from predictor.generation.tokenizer import Tokenizer

UNFINISHED_CHARACTER = "�"
"""What decoding gives for bytes that need the next token to become a character."""


class Detokenizer:
    """Token ids to text, piece by piece: a piece never ends inside a character, nor inside a possible stop string.

    Args:
        tokenizer: the model's.
        stop: texts that end the completion.
        min_tokens: so many ids must have come before a stop string counts.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._ids: list[int] = []
        self._context = 0
        """Ids before this one were decoded to text that is done with."""
        self._decoded = 0
        """Ids from `_context` up to here are decoded, and are the left context of the next."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string has been met; text from there on is dropped."""

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that is now certain, "" if none.

        Args:
            token_ids: the next ids of the sequence.
            last: nothing follows; whatever was held back comes out.
        """
        if self.stopped:
            return ""
        self._ids.extend(token_ids)
        text = self._held + self._decode(last)
        self._held = ""
        if len(self._ids) < self._min_tokens:
            return text
        if (end := self._stop_position(text)) is not None:
            self.stopped = True
            return text[:end]
        if not last:
            certain = len(text) - self._possible_stop(text)
            text, self._held = text[:certain], text[certain:]
        return text

    def _decode(self, last: bool) -> str:
        """New text of the ids pushed.

        The ids decoded last are decoded again with the new ones, and their text cut off, since many tokenizers
        write a token differently at the beginning of a text.
        """
        before = self._text(self._ids[self._context : self._decoded])
        after = self._text(self._ids[self._context :])
        if len(after) <= len(before) or (after.endswith(UNFINISHED_CHARACTER) and not last):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return after[len(before) :]

    def _text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _stop_position(self, text: str) -> int | None:
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        return min(found, default=None)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        return next(
            (
                length
                for length in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stop)
            ),
            0,
        )
