"""Incremental detokenization and stop strings."""

from collections.abc import Sequence

from predictor.generation.tokenizer import Tokenizer
from predictor.types import UNFINISHED_CHARACTER


class Detokenizer:
    """Incremental detokenizer of one sequence; it never splits a character or a possible stop string.

    Args:
        tokenizer: the model's.
        stop: strings that end the completion.
        min_tokens: number of token ids before which stop strings are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._longest_stop = max(map(len, stop), default=0)
        self._token_ids: list[int] = []
        # Offsets into `_token_ids`, as vLLM names them: text up to `_read_offset` has been returned, and the ids from
        # `_prefix_offset` to there are decoded again as left context of new ids.
        self._prefix_offset = 0
        self._read_offset = 0
        self._held = ""
        """Text held back because it may begin a stop string."""
        self.stopped = False
        """Whether a stop string was found; text from there on is dropped."""

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """Return the text that is now certain, "" if none.

        Args:
            token_ids: the next ids of the sequence.
            last: no ids follow; return all text held back.
        """
        if self.stopped:
            return ""
        self._token_ids.extend(token_ids)
        text = self._held + self._decode(last)
        self._held = ""
        if len(self._token_ids) < self._min_tokens:
            return text
        if (end := self._stop_position(text)) is not None:
            self.stopped = True
            return text[:end]
        if not last:
            certain = len(text) - self._partial_stop_length(text)
            text, self._held = text[:certain], text[certain:]
        return text

    def _decode(self, last: bool) -> str:
        """Return the text of new ids, "" while they end inside a character.

        The ids decoded before are decoded again with the new ones, and their text cut off, since many tokenizers
        decode a token differently at the beginning of a text.
        """
        prefix = self._text(self._token_ids[self._prefix_offset : self._read_offset])
        text = self._text(self._token_ids[self._prefix_offset :])
        if len(text) <= len(prefix) or (text.endswith(UNFINISHED_CHARACTER) and not last):
            return ""
        self._prefix_offset, self._read_offset = self._read_offset, len(self._token_ids)
        return text[len(prefix) :]

    def _text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _stop_position(self, text: str) -> int | None:
        return min((position for stop in self._stop if (position := text.find(stop)) >= 0), default=None)

    def _partial_stop_length(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that is a proper prefix of a stop string."""
        for length in range(min(self._longest_stop - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
