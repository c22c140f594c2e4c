"""Guesses of a sequence's next tokens: those that followed the same n-gram earlier, in its prompt or its output."""

from collections.abc import Sequence

NGRAM_TOKENS = (3, 2)
"""Lengths of the n-grams that are looked up, the first that is found counts."""


class PromptLookup:
    """Index of the n-grams of one sequence, which takes constant time for each of its tokens."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        """By n-gram, the position of the token that followed it last."""

    def read(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Add the tokens after those that were read before; both together are the sequence."""
        num_read, num_prompt = len(self._token_ids), len(prompt_ids)
        self._add(prompt_ids[num_read:])
        self._add(output_ids[max(0, num_read - num_prompt) :])

    def _add(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            for ngram in self._suffixes():
                self._followers[ngram] = len(self._token_ids)
            self._token_ids.append(token_id)

    def guess(self, count: int) -> list[int]:
        """Return `count` tokens that may come next; none if the sequence does not end with an n-gram that it repeats.

        Tokens after its end are taken from the guess itself, so that the guess goes on repeating what repeats.
        """
        known = len(self._token_ids)
        position = next((self._followers[ngram] for ngram in self._suffixes() if ngram in self._followers), known)
        token_ids = self._token_ids[position : position + count]
        if not token_ids:
            return []
        period = known - position
        while len(token_ids) < count:
            token_ids.append(token_ids[len(token_ids) - period])
        return token_ids

    def _suffixes(self) -> list[tuple[int, ...]]:
        token_ids = self._token_ids
        return [tuple(token_ids[-size:]) for size in NGRAM_TOKENS if len(token_ids) >= size]
