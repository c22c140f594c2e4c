"""Sampling parameters and state of one sequence, and which tokens may not follow."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from predictor.engine import noise
from predictor.errors import InvalidRequest
from predictor.types import MIN_LOGPROB, SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by them would overflow."""

_MIN_TOP_P = 1e-9
_LARGEST = 1e30
"""Limit of temperatures and penalties, and the smallest is its reciprocal: float32 has room for their effect."""


class TokenMask(Protocol):
    """Tokens that may follow a sequence."""

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> NDArray[np.uint8]:
        """Return a bit for each token, the first in the lowest bit of the first octet; tokens beyond may not follow."""


class NoRepeatNgrams:
    """Excludes tokens that would repeat a sequence of `size` tokens."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._followers: dict[tuple[int, ...], list[int]] = {}
        """Tokens that followed each sequence of `size` - 1 tokens."""
        self._num_read = size - 1

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Collection[int]:
        """Return the tokens that followed the last `size` - 1 ones before."""
        token_ids = [*prompt_ids, *output_ids]
        for end in range(self._num_read, len(token_ids)):
            start = tuple(token_ids[end - self._size + 1 : end])
            self._followers.setdefault(start, []).append(token_ids[end])
        self._num_read = max(self._num_read, len(token_ids))
        return self._followers.get(tuple(token_ids[max(0, len(token_ids) - self._size + 1) :]), ())


class BadWords:
    """Excludes the tokens that would end one of several sequences of tokens."""

    def __init__(self, bad_words_ids: Collection[Sequence[int]]) -> None:
        self._words = [(list(start), last) for *start, last in bad_words_ids]
        self._longest = max(map(len, bad_words_ids))

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Collection[int]:
        """Return the last tokens of words whose start is the end of the text."""
        tail = [*prompt_ids[-self._longest :], *output_ids[-self._longest :]]
        return [last for start, last in self._words if tail[len(tail) - len(start) :] == start]


class SequenceSampler:
    """How the tokens of one sequence are sampled, by sampling parameters without defaults left to fill in.

    The tokens after the first `prompt_tokens` are the output. `end_token_ids` are excluded before `min_tokens`.
    With a `max_tokens` of 0 the token of the only step is not used, and not sampled.
    """

    def __init__(self, sampling: SamplingParams, prompt_tokens: int, end_token_ids: Collection[int]) -> None:
        self.logprobs: list[TokenLogprob] = []
        """One per sampled token, if requested."""
        self.prompt_tokens = prompt_tokens
        self.num_prompt_logprobs = sampling.prompt_logprobs
        """Number of most probable tokens to report at each position of the prompt; None: report nothing."""
        self.prompt_logprobs: list[TokenLogprob] = []
        """One per prompt token, if requested; `PromptScorer` appends them."""
        self.failure: BaseException | None = None
        """Error that ended sampling; the sequence has to be cancelled then."""
        self.num_logprobs = sampling.logprobs
        """Number of most probable tokens to report with each sampled one; None: report nothing."""
        self.seed = noise.to_int64(int.from_bytes(os.urandom(8)) if sampling.seed is None else sampling.seed)
        self.temperature = min(sampling.temperature or 0.0, _LARGEST)
        self.top_k = sampling.top_k or 0
        self.top_p = 1.0 if sampling.top_p is None else max(sampling.top_p, _MIN_TOP_P)
        self.min_p = sampling.min_p or 0.0
        self.is_greedy = self.temperature < GREEDY_BELOW or self.top_k == 1 or self.top_p == _MIN_TOP_P
        self.logit_bias: Mapping[int, float] = dict(sampling.logit_bias)
        """Numbers added to the logits of tokens, before penalties."""
        repetition = min(max(sampling.repetition_penalty or 1.0, 1 / _LARGEST), _LARGEST)
        self.penalties = (repetition, sampling.presence_penalty, sampling.frequency_penalty)
        self.has_penalties = self.penalties != (1.0, 0.0, 0.0)
        self.token_masks: list[TokenMask] = [create() for create in sampling.token_masks]
        self._sampling = sampling
        self._end_token_ids = end_token_ids
        self._allowed_octets: NDArray[np.uint8] | None = None
        self._history_rules: list[NoRepeatNgrams | BadWords] = []
        if sampling.no_repeat_ngram_size:
            self._history_rules.append(NoRepeatNgrams(sampling.no_repeat_ngram_size))
        if sampling.bad_words_ids:
            self._history_rules.append(BadWords(sampling.bad_words_ids))

    @property
    def needs_host_tokens(self) -> bool:
        """Whether all tokens so far have to be on the host before the next one can be sampled."""
        return bool(self.token_masks or self._history_rules)

    @property
    def is_used(self) -> bool:
        """Whether anything has to be done, instead of taking the largest logit."""
        if self._sampling.max_tokens == 0 or self.failure is not None:
            return False
        sampling = self._sampling
        excludes = sampling.min_tokens or sampling.suppress_tokens or sampling.begin_suppress_tokens
        return bool(
            not self.is_greedy
            or self.num_logprobs is not None
            or self.has_penalties
            or self.logit_bias
            or excludes
            or sampling.allowed_token_ids
            or self.needs_host_tokens
        )

    def exclusions(
        self, vocabulary: int, num_outputs: int, prompt_ids: Sequence[int] = (), output_ids: Sequence[int] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8] | None]:
        """Return tokens that may not follow, and a bit for each token that may, as of `TokenMask`; None: all others.

        Args:
            vocabulary: number of tokens that have a logit.
            num_outputs: number of tokens of the output so far.
            prompt_ids: used only if the sampler needs host tokens, as `output_ids` are.
            output_ids: the output so far.

        Raises:
            InvalidRequest: no token may follow.
        """
        sampling = self._sampling
        excluded = list(sampling.suppress_tokens)
        if num_outputs == 0:
            excluded += sampling.begin_suppress_tokens
        if num_outputs < sampling.min_tokens:
            excluded += self._end_token_ids
        for rule in self._history_rules:
            excluded += rule(prompt_ids, output_ids)
        token_ids = np.array(excluded, dtype=np.int64)
        # A token without a logit cannot be sampled, and its index would be an error.
        token_ids = token_ids[token_ids < vocabulary]
        if not (sampling.allowed_token_ids or self.token_masks):
            return token_ids, None
        octets = self._allowed(vocabulary).copy()
        np.bitwise_and.at(octets, token_ids // 8, ~(1 << token_ids % 8).astype(np.uint8))
        if sampling.allowed_token_ids and not octets.any():
            raise InvalidRequest(
                "No token may follow: min_tokens or excluded tokens contradict allowed_token_ids. Omit them.",
                "allowed_token_ids",
            )
        for mask in self.token_masks:
            allowed = mask(prompt_ids, output_ids)[: len(octets)]
            octets[: len(allowed)] &= allowed
            octets[len(allowed) :] = 0
            if not octets.any():
                raise InvalidRequest(
                    "No token may follow: min_tokens or excluded tokens contradict the structured output. Omit them."
                )
        return token_ids[:0], octets

    def _allowed(self, vocabulary: int) -> NDArray[np.uint8]:
        if self._allowed_octets is None:
            allowed = np.ones(vocabulary, dtype=np.bool_)
            if token_ids := self._sampling.allowed_token_ids:
                allowed = np.isin(np.arange(vocabulary), token_ids)
            self._allowed_octets = np.packbits(allowed, bitorder="little")
        return self._allowed_octets


class SequenceState(Protocol):
    """The batching manager's state of a sequence."""

    request_id: str
    initial_tokens: list[int]
    """The prompt, and after it the tokens that the sequence had generated when it left a full cache."""
    generated_tokens: list[int]


@dataclass(frozen=True, slots=True)
class Row:
    """Row of a step's logits, and the sequence whose next token is sampled from it."""

    index: int
    position: int
    """Number of tokens before the next one."""
    state: SequenceState
    sampler: SequenceSampler

    @property
    def num_outputs(self) -> int:
        """Number of tokens of the output so far."""
        return self.position - self.sampler.prompt_tokens

    def texts(self) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt and of the output so far."""
        token_ids, end = self.state.initial_tokens + self.state.generated_tokens, self.sampler.prompt_tokens
        return token_ids[:end], token_ids[end:]


def token_logprobs(logprobs: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Return the log probability of one token for each row, with its rank and the most probable tokens.

    Args:
        logprobs: (rows, vocabulary).
        token_ids: one per row. The LM head may not have some tokens that can be in a prompt.
        tops: number of most probable tokens, for each row.
    """
    logprobs = logprobs.nan_to_num(nan=MIN_LOGPROB).clamp(min=MIN_LOGPROB)
    vocabulary = logprobs.shape[1]
    ids = torch.tensor(token_ids, device=logprobs.device)
    values = logprobs.gather(1, ids.clamp(max=vocabulary - 1)[:, None])
    values = values.masked_fill(ids[:, None] >= vocabulary, MIN_LOGPROB)
    ranks = (logprobs > values).sum(dim=1) + 1
    top_values, top_ids = logprobs.topk(min(max(tops), vocabulary))
    rows = zip(token_ids, values[:, 0].tolist(), ranks.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
    return [
        TokenLogprob(token_id, value, tuple(zip(best_ids[:top], best_values[:top], strict=True)), rank)
        for top, (token_id, value, rank, best_ids, best_values) in zip(tops, rows, strict=True)
    ]
