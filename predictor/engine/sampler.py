"""Choose the next token of each sequence, each by its own parameters; tensors in, tensors out.

A logits processor for transformers' batching manager, in place of its own three. Those sort every row's whole
vocabulary twice and draw from it, greedy rows included, which takes a CPU longer than the model (285 ms for 32 rows of
151 936 tokens, 2 cores). Here greedy rows are left as they are, and a sampled row becomes its choice: the manager then
takes the largest logit.
"""

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Self

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from predictor.types import MIN_LOGPROB, SamplingParams, TokenLogprob

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by them would overflow."""

NUCLEUS_TOKENS = 1024
"""Where top_p alone is asked for: so many are sorted first, and all only if these are not probable enough."""


_LEAST_TOP_P = 1e-9


class SequenceSampler:
    """How one sequence chooses its tokens; travels with it through the manager.

    Args:
        sampling: with nothing left open.
        prompt_tokens: length of the prompt; what follows it in the sequence is the completion.
        end_token_ids: tokens that would end the sequence, which `min_tokens` holds back.
    """

    def __init__(self, sampling: SamplingParams, prompt_tokens: int, end_token_ids: Collection[int]) -> None:
        self.logprobs: list[TokenLogprob] = []
        """One for each token chosen, where asked for."""
        self.failure: str | None = None
        """Why no token could be chosen; the sequence has to be given up then."""
        self._sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._end_token_ids = list(end_token_ids)
        self._generator: torch.Generator | None = None
        self._draws = (sampling.temperature or 0.0) >= GREEDY_BELOW
        self._has_penalties = bool(
            (sampling.repetition_penalty or 1.0) != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
        )

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        """The manager copies a sequence that it takes out of a full cache and forgets the original: one goes on."""
        return self

    def __call__(self, logits: torch.Tensor, sequence: Any) -> None:
        """Make the largest of `logits` the choice.

        Args:
            logits: float32, (vocabulary,); changed in place.
            sequence: the manager's state, whose tokens are the prompt and the completion so far.
        """
        sampling = self._sampling
        model = logits.log_softmax(dim=-1) if sampling.logprobs is not None else None
        if self._has_penalties or sampling.min_tokens:
            token_ids = sequence.initial_tokens + sequence.generated_tokens
            self._hold_back(logits, token_ids[: self._prompt_tokens], token_ids[self._prompt_tokens :])
        if self._draws:
            token = draw(
                logits,
                temperature=sampling.temperature or 0.0,
                top_k=sampling.top_k or 0,
                top_p=1.0 if sampling.top_p is None else sampling.top_p,
                generator=self._seeded(logits.device),
            )
            logits.fill_(-torch.inf)
            logits[token] = 0.0
        if model is not None:
            self.logprobs.append(_logprob(model, int(logits.argmax()), sampling.logprobs or 0))

    def _hold_back(self, logits: torch.Tensor, prompt: list[int], completion: list[int]) -> None:
        """Penalties, of the tokens that are there already, and the ends that come too early."""
        sampling = self._sampling
        if self._has_penalties:
            spoken, counts = torch.tensor(completion, dtype=torch.long, device=logits.device).unique(return_counts=True)
            penalty = sampling.repetition_penalty or 1.0
            if penalty != 1.0:
                seen = torch.tensor(prompt + completion, dtype=torch.long, device=logits.device).unique()
                logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            logits[spoken] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if len(completion) < sampling.min_tokens:
            logits[self._end_token_ids] = -torch.inf

    def _seeded(self, device: torch.device) -> torch.Generator | None:
        if self._generator is None and self._sampling.seed is not None:
            self._generator = torch.Generator(device).manual_seed(self._sampling.seed)
        return self._generator


def processors() -> ContinuousBatchingLogitsProcessorList:
    """A list with nothing but a sampler, as the manager wants it.

    `do_sample` must be off in the manager's generation config, so that it takes the largest logit, and each request
    must bring `chooser`, a `SequenceSampler`.
    """
    listed = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Sampler()]))
    listed.tensors_required = 1  # the list counts only processors that it has converted itself
    return listed


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Each request's `SequenceSampler` comes through `add_request`; kept between the two calls of a step."""

    supported_kwargs: ClassVar[dict[str, type]] = {"chooser": SequenceSampler}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._sequences: list[Any] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Nothing travels in the tensor."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """Remember the sequences of the rows that come next, in their order."""
        self._sequences = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._sequences), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Let each row of `scores` (rows, vocabulary) make its choice."""
        del tensor_arg
        # Not strict: sequences in the middle of their prompt have rows too, after these, which nobody reads.
        for row, sequence in zip(scores, self._sequences, strict=False):
            # A warm-up of the manager brings sequences of its own, without a chooser: greedy.
            chooser = sequence.logit_processor_kwargs.get("chooser")
            if chooser is None or chooser.failure:
                continue
            try:
                chooser(row, sequence)
            except Exception as error:
                # An error that gets out of here ends the step loop, and with it all other sequences.
                logger.exception("a sequence cannot choose its next token")
                chooser.failure = str(error) or type(error).__name__
        return scores


def draw(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """A token id, drawn from the most probable ones.

    Args:
        logits: float32, (vocabulary,).
        temperature: at least GREEDY_BELOW.
        top_k: most probable tokens to choose from; 0 is all.
        top_p: of those, the fewest that together have this probability, 0 <= top_p <= 1; at least one.
        generator: where the randomness comes from; None is torch's own.
    """
    logits = logits / temperature
    token_ids: torch.Tensor | None = None
    if top_k or top_p < 1:
        kept, token_ids = logits.topk(min(top_k or NUCLEUS_TOKENS, logits.numel()))
        total = (kept if top_k else logits).logsumexp(dim=-1)
        if not top_k and kept.logsumexp(dim=-1) < total + math.log(max(top_p, _LEAST_TOP_P)):
            kept, token_ids = logits.sort(descending=True)
        before = (kept - total).exp().cumsum(dim=-1).roll(1)
        before[0] = -1  # the most probable token stays, whatever top_p is
        logits = kept.masked_fill(before >= top_p, -torch.inf)
    # The Gumbel-max trick: the largest of logit + Gumbel noise is a draw from the softmax, without computing it.
    choice = (logits - torch.empty_like(logits).exponential_(generator=generator).log_()).argmax()
    return choice if token_ids is None else token_ids[choice]


def _logprob(model: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """What the model's log probabilities (vocabulary,) say of a token and of the `top` most probable ones."""
    model = model.nan_to_num(nan=MIN_LOGPROB).clamp(min=MIN_LOGPROB)
    values, token_ids = model.topk(min(top, model.numel()))
    return TokenLogprob(token_id, float(model[token_id]), tuple(zip(token_ids.tolist(), values.tolist(), strict=True)))
