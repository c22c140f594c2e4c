"""Sample the next token of one sequence: logits processors, log probabilities, temperature, top-k, top-p and min-p.

Works on one row of logits in place. A greedy row without processors stays unchanged; a sampled row is left with its
only finite logit at the sampled token, so that the largest logit is the next token in both cases.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import torch

from predictor.errors import InvalidRequest
from predictor.types import MIN_LOGPROB, SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by them would overflow."""

NUCLEUS_TOKENS = 1024
"""Number of most probable tokens sorted first if only top_p is set; all are sorted if these are not enough."""

_MIN_TOP_P = 1e-9


class LogitsProcessor(Protocol):
    """Changes the logits of one sequence, (vocabulary,), in place before a token is sampled."""

    def __call__(self, logits: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Process the logits of the token that follows the prompt and the output so far."""


class Penalties:
    """Repetition, presence and frequency penalty."""

    def __init__(self, sampling: SamplingParams) -> None:
        self._repetition = sampling.repetition_penalty or 1.0
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty

    def __call__(self, logits: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Lower the logits of tokens that occur already."""
        if self._repetition != 1.0:
            token_ids = torch.tensor([*prompt_ids, *output_ids], dtype=torch.long, device=logits.device).unique()
            # The embedding may have more rows than the LM head: those tokens can be in a prompt only.
            token_ids = token_ids[token_ids < logits.numel()]
            values = logits[token_ids]
            logits[token_ids] = torch.where(values > 0, values / self._repetition, values * self._repetition)
        if self._presence or self._frequency:
            outputs = torch.tensor(output_ids, dtype=torch.long, device=logits.device)
            output_token_ids, counts = outputs.unique(return_counts=True)
            logits[output_token_ids] -= self._presence + self._frequency * counts


class LogitBias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, logit_bias: Collection[tuple[int, float]]) -> None:
        self._logit_bias = dict(logit_bias)
        self._biases: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Add the biases."""
        del prompt_ids, output_ids
        if self._biases is None:
            biases = {token_id: bias for token_id, bias in self._logit_bias.items() if token_id < logits.numel()}
            self._biases = torch.zeros_like(logits)
            self._biases[list(biases)] = torch.tensor(list(biases.values()), device=logits.device)
        logits += self._biases


class AllowedTokens:
    """Excludes all tokens but some."""

    def __init__(self, token_ids: Collection[int]) -> None:
        self._token_ids = token_ids
        self._excluded: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Set the logits of all other tokens to minus infinity.

        Raises:
            InvalidRequest: the allowed tokens are excluded already.
        """
        del prompt_ids, output_ids
        if self._excluded is None:
            self._excluded = torch.ones_like(logits, dtype=torch.bool)
            self._excluded[[token_id for token_id in self._token_ids if token_id < logits.numel()]] = False
        logits.masked_fill_(self._excluded, -torch.inf)
        if logits.max() == -torch.inf:
            raise InvalidRequest(
                "No token may follow: min_tokens or excluded tokens contradict allowed_token_ids. Omit them.",
                "allowed_token_ids",
            )


class MinTokens:
    """Excludes the tokens that would end the sequence before `min_tokens`."""

    def __init__(self, min_tokens: int, end_token_ids: Collection[int]) -> None:
        self._min_tokens = min_tokens
        self._end_token_ids = list(end_token_ids)

    def __call__(self, logits: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Set the logits of end tokens to minus infinity while the output is too short."""
        del prompt_ids
        if len(output_ids) < self._min_tokens:
            # A token without a logit cannot be sampled, and its index would be an error.
            logits[[token_id for token_id in self._end_token_ids if token_id < logits.numel()]] = -torch.inf


class NoRepeatNgrams:
    """Excludes tokens that would repeat a sequence of `size` tokens."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, logits: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Set the logits of tokens that followed the last `size` - 1 ones before to minus infinity."""
        token_ids = torch.tensor([*prompt_ids, *output_ids], dtype=torch.long, device=logits.device)
        if len(token_ids) < self._size:
            return
        ngrams = token_ids.unfold(0, self._size, 1)
        last = token_ids[len(token_ids) - self._size + 1 :]
        repeated = ngrams[(ngrams[:, :-1] == last).all(dim=1), -1]
        logits[repeated[repeated < logits.numel()]] = -torch.inf


class BadWords:
    """Excludes the tokens that would end one of several sequences of tokens."""

    def __init__(self, bad_words_ids: Collection[Sequence[int]]) -> None:
        self._words = [(list(start), last) for *start, last in bad_words_ids]
        self._longest = max(map(len, bad_words_ids))

    def __call__(self, logits: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Set the logits of the last tokens of words whose start is the end of the text to minus infinity."""
        tail = [*prompt_ids[-self._longest :], *output_ids[-self._longest :]]
        ends = {last for start, last in self._words if tail[len(tail) - len(start) :] == start}
        logits[[last for last in ends if last < logits.numel()]] = -torch.inf


class SuppressTokens:
    """Excludes tokens, everywhere or as the first of the output only."""

    def __init__(self, token_ids: Sequence[int], *, first_only: bool = False) -> None:
        self._token_ids = list(token_ids)
        self._first_only = first_only

    def __call__(self, logits: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Set the logits of the tokens to minus infinity."""
        del prompt_ids
        if not (self._first_only and output_ids):
            logits[[token_id for token_id in self._token_ids if token_id < logits.numel()]] = -torch.inf


def _logits_processors(sampling: SamplingParams, end_token_ids: Collection[int]) -> Iterator[LogitsProcessor]:
    if sampling.logit_bias:
        yield LogitBias(sampling.logit_bias)
    if (sampling.repetition_penalty or 1.0) != 1.0 or sampling.presence_penalty or sampling.frequency_penalty:
        yield Penalties(sampling)
    if sampling.no_repeat_ngram_size:
        yield NoRepeatNgrams(sampling.no_repeat_ngram_size)
    if sampling.bad_words_ids:
        yield BadWords(sampling.bad_words_ids)
    if sampling.min_tokens:
        yield MinTokens(sampling.min_tokens, end_token_ids)
    if sampling.suppress_tokens:
        yield SuppressTokens(sampling.suppress_tokens)
    if sampling.begin_suppress_tokens:
        yield SuppressTokens(sampling.begin_suppress_tokens, first_only=True)
    if sampling.allowed_token_ids:
        yield AllowedTokens(sampling.allowed_token_ids)
    for create in sampling.logits_processors:
        yield create()


class SequenceSampler:
    """Samples the tokens of one sequence, by sampling parameters without defaults left to fill in.

    The tokens after the first `prompt_tokens` are the output. `end_token_ids` are excluded before `min_tokens`.
    With a `max_tokens` of 0 the token of the only step is not used, and not sampled.
    """

    def __init__(self, sampling: SamplingParams, prompt_tokens: int, end_token_ids: Collection[int]) -> None:
        self.logits_processors = list(_logits_processors(sampling, end_token_ids))
        """Applied in order."""
        self.logprobs: list[TokenLogprob] = []
        """One per sampled token, if requested."""
        self.prompt_tokens = prompt_tokens
        self.num_prompt_logprobs = sampling.prompt_logprobs
        """Number of most probable tokens to report at each position of the prompt; None: report nothing."""
        self.prompt_logprobs: list[TokenLogprob] = []
        """One per prompt token, if requested; `PromptScorer` appends them."""
        self.failure: BaseException | None = None
        """Error that ended sampling; the sequence has to be cancelled then."""
        self._sampling = sampling
        self._generator: torch.Generator | None = None
        self._is_greedy = (sampling.temperature or 0.0) < GREEDY_BELOW

    def __call__(self, logits: torch.Tensor, token_ids: Sequence[int] = ()) -> None:
        """Make the sampled token's logit the largest, in place, in float32 `logits` (vocabulary,).

        `token_ids` are prompt and output so far, needed only if there are logits processors.
        """
        sampling = self._sampling
        if sampling.max_tokens == 0:
            return
        logprobs = logits.log_softmax(dim=-1) if sampling.logprobs is not None else None
        if self.logits_processors:
            prompt_ids, output_ids = token_ids[: self.prompt_tokens], token_ids[self.prompt_tokens :]
            for process in self.logits_processors:
                process(logits, prompt_ids, output_ids)
        if not self._is_greedy:
            if self._generator is None and sampling.seed is not None:
                self._generator = torch.Generator(logits.device).manual_seed(sampling.seed)
            token_id = sample(
                logits,
                temperature=sampling.temperature or 0.0,
                top_k=sampling.top_k or 0,
                top_p=1.0 if sampling.top_p is None else sampling.top_p,
                min_p=sampling.min_p or 0.0,
                generator=self._generator,
            )
            logits.fill_(-torch.inf)
            logits[token_id] = 0.0
        if logprobs is not None:
            self.logprobs += token_logprobs(logprobs[None], [int(logits.argmax())], [sampling.logprobs or 0])


def sample(
    logits: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Sample a token id.

    Args:
        logits: float32, (vocabulary,).
        temperature: at least GREEDY_BELOW.
        top_k: number of most probable tokens to sample from; 0 is all.
        top_p: of those, the fewest that together have this probability, 0 <= top_p <= 1; at least one.
        min_p: of those, the ones with at least this fraction of the largest probability, 0 <= min_p <= 1.
        generator: source of randomness; None is torch's default.
    """
    logits = logits / temperature
    token_ids: torch.Tensor | None = None
    if top_k or top_p < 1:
        top_logits, token_ids = logits.topk(min(top_k or NUCLEUS_TOKENS, logits.numel()))
        total = (top_logits if top_k else logits).logsumexp(dim=-1)
        if not top_k and top_logits.logsumexp(dim=-1) < total + math.log(max(top_p, _MIN_TOP_P)):
            top_logits, token_ids = logits.sort(descending=True)
        cumulative = (top_logits - total).exp().cumsum(dim=-1).roll(1)
        cumulative[0] = -1  # always keep the most probable token
        logits = top_logits.masked_fill(cumulative >= top_p, -torch.inf)
    if min_p:
        # Logits differ by the logarithm of the ratio of their probabilities, whatever tokens were excluded before.
        logits = logits.masked_fill(logits < logits.max() + math.log(min_p), -torch.inf)
    # The Gumbel-max trick: the largest of logit + Gumbel noise is a sample of the softmax, without computing it.
    index = (logits - torch.empty_like(logits).exponential_(generator=generator).log_()).argmax()
    return index if token_ids is None else token_ids[index]


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
