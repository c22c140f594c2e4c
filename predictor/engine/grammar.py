"""Grammars: restrict the tokens of a sequence to those with which its text follows a compiled llguidance grammar."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray

from predictor.errors import InvalidRequest

_NOTHING_ALLOWED = "NoExtensionBias"
"""llguidance's error if the grammar allows no token."""

_BIAS_OF_OCTET = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32(0),
    -np.float32(np.inf),
)
"""Bias of the eight tokens of each octet of a mask, (256, 8)."""


class Grammar:
    """A compiled grammar; any number of sequences can follow it."""

    def __init__(self, matcher: LLMatcher, vocabulary_tokens: int) -> None:
        self._matcher = matcher
        self._vocabulary_tokens = vocabulary_tokens

    def logits_processor(self) -> "GrammarProcessor":
        """Return the logits processor of one sequence."""
        return GrammarProcessor(self._matcher.deep_copy(), self._vocabulary_tokens)


class GrammarProcessor:
    """Logits processor that allows only tokens with which the output follows a grammar.

    Args:
        matcher: at the beginning of the grammar.
        vocabulary_tokens: number of tokens of the matcher.
    """

    def __init__(self, matcher: LLMatcher, vocabulary_tokens: int) -> None:
        self._matcher = matcher
        self._num_consumed = 0
        self._bits = np.zeros((vocabulary_tokens + 31) // 32, dtype=np.int32)
        self._bias_of_octets = np.zeros((self._bits.nbytes, 8), dtype=np.float32)

    def __call__(self, logits: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Set the logits of tokens that the grammar does not allow to minus infinity.

        Raises:
            InvalidRequest: the grammar is too complex, or other constraints exclude all tokens that it allows.
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
        logits += self._bias(logits.device)[: len(logits)]
        if logits.max() == -torch.inf:
            raise InvalidRequest(
                "No token may follow: min_tokens or excluded tokens contradict the structured output. Omit them."
            )

    def _bias(self, device: torch.device) -> torch.Tensor:
        """Return 0 for each token that is allowed and minus infinity for the others, (tokens,).

        Eight tokens at a time, which is much faster than a mask of booleans.
        """
        octets = self._bits.view(np.uint8)
        if device.type != "cpu":
            return bias_on_device(octets, device)
        np.take(_BIAS_OF_OCTET, octets, axis=0, out=self._bias_of_octets)
        return torch.from_numpy(self._bias_of_octets).view(-1)


def bias_on_device(octets: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Return the bias of the tokens of a mask, (8 * octets,), copying only the mask to the device."""
    return _bias_of_octet(device)[torch.from_numpy(octets).to(device).int()].view(-1)


@cache
def _bias_of_octet(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(_BIAS_OF_OCTET).to(device)


def summary(message: str) -> str:
    """Return the first line of llguidance's message, and the reason at its end if there is one."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ": ".join(part.rstrip(".:") for part in (*lines[:1], *reasons))
