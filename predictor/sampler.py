"""Choose the next token of each sequence, each by its own temperature, top_k and top_p; tensors in, tensors out.

A logits processor for transformers' batching manager, in place of its own three. Those sort every row's whole
vocabulary twice and draw from it, greedy rows included, which takes a CPU longer than the model (285 ms for 32 rows of
151 936 tokens, 2 cores). Here greedy rows are left as they are, and a sampled row becomes its choice: the manager then
takes the largest logit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by them would overflow."""

NUCLEUS_TOKENS = 1024
"""Where top_p alone is asked for: so many are sorted first, and all only if these are not probable enough."""


def processors() -> ContinuousBatchingLogitsProcessorList:
    """A list with nothing but a sampler, as the manager wants it.

    `do_sample` must be off in the manager's generation config, so that it takes the largest logit.
    """
    listed = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Sampler()]))
    listed.tensors_required = 1  # the list counts only processors that it has converted itself
    return listed


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Per-request parameters reach it through `add_request`; between the two calls of a step it remembers the rows."""

    supported_kwargs: ClassVar[dict[str, type]] = {"temperature": float, "top_k": int, "top_p": float}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._rows: list[Mapping[str, Any]] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Nothing travels in the tensor."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """Remember the parameters of the rows that come next, in their order."""
        self._rows = [request.state.logit_processor_kwargs for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Replace each sampled row of `scores` (rows, vocabulary) by its choice."""
        del tensor_arg
        # Not strict: sequences in the middle of their prompt have rows too, after these, which nobody reads.
        for row, parameters in zip(scores, self._rows, strict=False):
            if parameters["temperature"] >= GREEDY_BELOW:
                token = draw(row, **parameters)
                row.fill_(-torch.inf)
                row[token] = 0.0
        return scores


def draw(logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """A token id, drawn from the most probable ones.

    Args:
        logits: float32, (vocabulary,).
        temperature: at least GREEDY_BELOW.
        top_k: most probable tokens to choose from; 0 is all.
        top_p: of those, the fewest that together have this probability, 0 < top_p <= 1; at least one.
    """
    logits = logits / temperature
    token_ids: torch.Tensor | None = None
    if top_k or top_p < 1:
        kept, token_ids = logits.topk(min(top_k or NUCLEUS_TOKENS, logits.numel()))
        total = (kept if top_k else logits).logsumexp(dim=-1)
        if not top_k and kept.logsumexp(dim=-1) < total + math.log(top_p):
            kept, token_ids = logits.sort(descending=True)
        before = (kept - total).exp().cumsum(dim=-1).roll(1)
        before[0] = 0
        logits = kept.masked_fill(before >= top_p, -torch.inf)
    # The Gumbel-max trick: the largest of logit + Gumbel noise is a draw from the softmax, without computing it.
    choice = (logits - torch.empty_like(logits).exponential_().log_()).argmax()
    return choice if token_ids is None else token_ids[choice]
