"""Incremental detokenization and stop strings."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from predictor.generation.tokenizer import Tokenizer
from predictor.types import UNFINISHED_CHARACTER

MAX_CONTEXT_TOKENS = 8
"""Most tokens of the prompt that `left_context` returns."""
MAX_PENDING_TOKENS = 8
"""Tokens that may wait for the end of a character. UTF-8 has at most 4 bytes, and a token at least one."""
_LONGEST_CHARACTER = 4


def left_context(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """Return the shortest tail of a prompt with which its continuation is decoded as in the whole text.

    Many tokenizers remove the space of a text's first token, so the first token of a continuation needs one before it.
    A tail that begins inside a character would decode to something else than in the whole text.

    Returns:
        At most MAX_CONTEXT_TOKENS token ids; none if the prompt ends in a special token, since a text that follows one
        is encoded like a text of its own.
    """
    tail: list[int] = []
    for length in range(1, min(len(prompt), MAX_CONTEXT_TOKENS) + 1):
        tail = list(prompt[-length:])
        text = tokenizer.decode(tail, skip_special_tokens=True)
        if text and not text.startswith(UNFINISHED_CHARACTER):
            return tail
        if length == 1 and not text and tokenizer.decode(tail, skip_special_tokens=False):
            return []
    return tail


class ContinuationDecoder:
    """Decodes tokens as a continuation of other ones, its left context.

    Args:
        tokenizer: the model's.
        context: token ids, as of `left_context`.
        skip_special_tokens: special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = list(context)
        self._context_text = self._text(context)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Make `token_ids` the context, unless they have no text."""
        if text := self._text(token_ids):
            self._context, self._context_text = list(token_ids), text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` add to the context's.

        They may also complete a character in which the context ends; then that character is part of the text.
        """
        text = self._text([*self._context, *token_ids])
        known = self._context_text
        if not text.startswith(known):
            known = known.rstrip(UNFINISHED_CHARACTER)
        return text[len(known) :]

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=self._skip_special_tokens)


class Detokenizer:
    """Incremental detokenizer of one sequence; it never splits a character or a possible stop string.

    Args:
        tokenizer: the model's.
        context: token ids before the sequence, as of `left_context`.
        stop: strings that end the completion.
        min_tokens: number of token ids before which stop strings are ignored.
        special_tokens: texts, by id, of the special tokens that are part of the text; others have none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        special_tokens: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._decoder = ContinuationDecoder(tokenizer, context, skip_special_tokens=True)
        self._stop = stop
        self._min_tokens = min_tokens
        self._longest_stop = max(map(len, stop), default=0)
        self._num_tokens = 0
        self._pending: list[int] = []
        """Ids whose text has not been returned: they end inside a character."""
        self._held = ""
        """Text held back because it may begin a stop string."""
        self.found_stop: str | None = None
        """Stop string that was found; text from there on is dropped."""

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """Return the text that is now certain, "" if none.

        Args:
            token_ids: the next ids of the sequence.
            last: no ids follow; return all text held back.
        """
        if self.found_stop is not None:
            return ""
        text, self._held = self._held, ""
        for token_id in token_ids:
            self._num_tokens += 1
            if token_id in self._special_tokens:
                text += self._flush() + self._special_tokens[token_id]
                # A text that follows a special token is encoded like a text of its own.
                self._decoder = ContinuationDecoder(self._tokenizer, (), skip_special_tokens=True)
                continue
            self._pending.append(token_id)
            text += self._decode()
        if last:
            text += self._flush()
        if self._num_tokens < self._min_tokens:
            return text
        if found := min(((text.find(stop), stop) for stop in self._stop if stop in text), default=None):
            end, self.found_stop = found
            return text[:end]
        if not last:
            certain = len(text) - self._partial_stop_length(text)
            text, self._held = text[:certain], text[certain:]
        return text

    def _flush(self) -> str:
        """Return the text of the pending ids, though they may end inside a character."""
        text = self._decoder.decode(self._pending)
        self._pending.clear()
        return text

    def _decode(self) -> str:
        """Return the text of the pending ids, "" while they end inside a character.

        If too many wait, return that of the first ones whatever it is: not every sequence of bytes is text.
        """
        text = self._decoder.decode(self._pending)
        if text and not text.endswith(UNFINISHED_CHARACTER):
            self._decoder.advance(self._pending)
            self._pending.clear()
            return text
        if len(self._pending) <= MAX_PENDING_TOKENS:
            return ""
        first = len(self._pending) - (_LONGEST_CHARACTER - 1)
        self._decoder.advance(self._pending[:first])
        del self._pending[:first]
        return text[: max(0, len(text) - len(self._decoder.decode(self._pending)))]

    def _partial_stop_length(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that is a proper prefix of a stop string."""
        for length in range(min(self._longest_stop - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
