"""Fence around the steps of transformers' continuous batching in which guessed tokens are verified.

The guesses of a sequence are rows of its step, after its newest token. The rows are sampled one after another, each
with the tokens before it, and the first one that differs from the guess after it is the last one that counts: exactly
the tokens, log probabilities and states of samplers that as many steps would give. Keys and values of guesses that were
wrong are behind the sequence's end, and are overwritten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

from predictor.engine.causal_lm import CausalLM
from predictor.engine.greedy_runner import GreedyRunner
from predictor.engine.speculation import Speculation
from predictor.engine.step_sampler import StepSampler
from predictor.kernels import attention, tensor_parallel
from predictor.kernels.cpu.linear import LMHead

PROBED_ROWS = (2, 8, 32)
"""Rows of the passes that show whether the results of rows depend on each other."""


def unavailable_reason(model: CausalLM, cache: Any) -> str | None:
    """Return why guesses cannot be verified exactly; None: they can.

    Args:
        model: that computes the steps, while none runs.
        cache: the batching manager's.
    """
    if model.device.type != "cpu":
        return "steps on a GPU are queued before the tokens of the last one are known"
    if tensor_parallel.size() > 1:
        return "ranks share the model"
    # The allocator of sliding windows is a subclass.
    if any(type(each) is not FullAttentionCacheAllocator for each in cache.cache_allocators.values()):
        return "a sliding window overwrites keys that a wrong guess would need again"
    if not attention.reads_in_place(model):
        return "no C kernel computes the attention of these weights on this CPU"
    if not has_independent_rows(model):
        return "the kernels of these weights compute a row differently in steps of one row and of several"
    return None


def has_independent_rows(model: CausalLM) -> bool:
    """Return whether a token's logits are bit by bit the same, however many others are computed with it."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    token_ids = torch.linspace(0, vocabulary - 1, max(PROBED_ROWS), dtype=torch.long, device=model.device)[:, None]
    with torch.no_grad(), attention.plain(model):
        single = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in token_ids[:2]])
        return all(
            torch.equal(single, model(input_ids=token_ids[:rows], use_cache=False).logits[:2]) for rows in PROBED_ROWS
        )


@dataclass(slots=True)
class _Draft:
    """Guesses of one sequence of a step."""

    request: Any
    guesses: list[int]
    place: int
    """Of the sequence among those that get a token."""
    first_row: int
    """Of the logits after the first guess, among those of the step."""
    num_accepted: int = 0

    @property
    def row(self) -> int:
        """Of the logits after the last accepted guess."""
        return self.first_row + self.num_accepted - 1


class SpeculativeRunner(GreedyRunner):
    """Computes steps, and verifies the guesses in them.

    Args:
        processor: the batching manager's.
        lm_head: as of `GreedyRunner`.
        sampler: of the steps.
        speculation: that makes the guesses.
    """

    def __init__(self, processor: Any, lm_head: LMHead | None, sampler: StepSampler, speculation: Speculation) -> None:
        super().__init__(processor, lm_head, sampler)
        self._cache = processor.cache
        self._speculation = speculation

    def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
        if not self._speculation.guesses:
            super().compute_batch(model, batch_data)
            return
        rows, drafts = self._plan(batch_data["logits_indices"])
        inputs = {**batch_data, "logits_indices": rows}
        num_sequences = len(batch_data["logits_indices"])
        for draft in drafts:
            draft.request.state.position_offset -= len(draft.guesses)
        if (chosen := self.choose(model, inputs)) is not None:
            self.inputs_and_outputs.output_ids[0, :num_sequences].copy_(chosen[:num_sequences])
            self._sampler.step_count += 1
            token_ids = chosen.tolist()
            self._verify(drafts, lambda pending: [token_ids[draft.row] for draft in pending])
        else:
            logits = self.forward(model, inputs)
            self.sample(logits[:num_sequences], batch_data)
            self._verify(drafts, lambda pending: self._sample_rows(logits, pending))

    def _sample_rows(self, logits: torch.Tensor, drafts: Sequence[_Draft]) -> list[int]:
        scores = logits[[draft.row for draft in drafts]]
        self._sampler.sample(scores, [draft.request.state for draft in drafts])
        token_ids: list[int] = scores.argmax(dim=-1).tolist()
        return token_ids

    def _plan(self, logits_indices: torch.Tensor) -> tuple[torch.Tensor, list[_Draft]]:
        """Return the rows whose logits are needed: of each sequence's newest token, and then those of all guesses."""
        io = self.inputs_and_outputs
        requests = {request.state.request_id: request for request in io.requests_in_batch}
        rows: list[int] = logits_indices.tolist()
        drafts = []
        for place, (request_id, last_row) in enumerate(io.req_id_to_new_token_position.items()):
            if guesses := self._speculation.guesses.get(request_id, []):
                drafts.append(_Draft(requests[request_id], guesses, place, len(rows)))
                rows[place] = last_row - len(guesses)
                rows += range(rows[place] + 1, last_row + 1)
        return torch.tensor(rows), drafts

    def _verify(self, drafts: Sequence[_Draft], choose: Callable[[Sequence[_Draft]], list[int]]) -> None:
        """Accept the guesses that are right, one row of each sequence after another.

        Args:
            drafts: of the step, whose sequences' first rows are sampled.
            choose: samples from the row of each draft after its last accepted guess.
        """
        output_ids = self.inputs_and_outputs.output_ids[0]
        pending = [draft for draft in drafts if _accept(draft, int(output_ids[draft.place]))]
        while pending:
            token_ids = choose(pending)
            for draft, token_id in zip(pending, token_ids, strict=True):
                output_ids[draft.place] = token_id
            pending = [draft for draft, token_id in zip(pending, token_ids, strict=True) if _accept(draft, token_id)]
        for draft in drafts:
            self._end(draft)

    def _end(self, draft: _Draft) -> None:
        """Count the tokens that are in the cache now, and the blocks of it that they complete."""
        state = draft.request.state
        num_tokens = 1 + draft.num_accepted
        state.position_offset -= num_tokens
        draft.request.complete_blocks = self._cache.count_new_complete_blocks(state, num_tokens)
        state.position_offset += num_tokens
        self._speculation.record(state.request_id, draft.num_accepted)


def _accept(draft: _Draft, token_id: int) -> bool:
    """Return whether a sampled token is the next guess and goes on; then it belongs to the sequence."""
    state = draft.request.state
    if draft.num_accepted == len(draft.guesses) or token_id != draft.guesses[draft.num_accepted]:
        return False
    if token_id in state._eos_token_ids:
        return False
    state.generated_tokens.append(token_id)
    state.position_offset += 1
    draft.num_accepted += 1
    return True
