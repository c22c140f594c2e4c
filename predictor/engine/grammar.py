"""Grammars: restrict the tokens of a sequence to those with which its text follows a compiled llguidance grammar."""

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from predictor.errors import InvalidRequest

_NOTHING_ALLOWED = "NoExtensionBias"
"""llguidance's error if the grammar allows no token."""


class Grammar:
    """A compiled grammar; any number of sequences can follow it."""

    def __init__(self, matcher: LLMatcher, vocabulary_tokens: int) -> None:
        self._matcher = matcher
        self._vocabulary_tokens = vocabulary_tokens

    def token_mask(self) -> "GrammarMask":
        """Return the mask of one sequence."""
        return GrammarMask(self._matcher.deep_copy(), self._vocabulary_tokens)


class GrammarMask:
    """Tokens with which the output of one sequence follows a grammar.

    Args:
        matcher: at the beginning of the grammar.
        vocabulary_tokens: number of tokens of the matcher.
    """

    def __init__(self, matcher: LLMatcher, vocabulary_tokens: int) -> None:
        self._matcher = matcher
        self._num_consumed = 0
        self._bits = np.zeros((vocabulary_tokens + 31) // 32, dtype=np.int32)

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> NDArray[np.uint8]:
        """Return the bits of the tokens that the grammar allows, valid until the next call; see `TokenMask`.

        Raises:
            InvalidRequest: the grammar is too complex, or allows no token.
        """
        del prompt_ids
        matcher = self._matcher
        matcher.consume_tokens(list(output_ids[self._num_consumed :]))
        self._num_consumed = len(output_ids)
        matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if matcher.is_error():
            reason = summary(matcher.get_error())
            if reason == _NOTHING_ALLOWED:
                raise InvalidRequest("No text matches the structured output. Correct it.")
            raise InvalidRequest(f"The structured output is too complex: {reason}.")
        return self._bits.view(np.uint8)


def summary(message: str) -> str:
    """Return the first line of llguidance's message, and the reason at its end if there is one."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ": ".join(part.rstrip(".:") for part in (*lines[:1], *reasons))
