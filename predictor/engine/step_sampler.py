"""Logits processor of the batching manager, which samples the tokens of a step."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Protocol

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from predictor.engine import causal_lm
from predictor.engine.batch_sampler import BatchSampler
from predictor.engine.causal_lm import CausalLM
from predictor.engine.prompt_scorer import PromptScorer, ScheduledSequence
from predictor.engine.sampler import Row, SequenceSampler, SequenceState
from predictor.engine.submission import Submission
from predictor.errors import RequestError
from predictor.kernels import tensor_parallel

logger = logging.getLogger(__name__)


class _SequenceState(SequenceState, Protocol):
    position_offset: int
    """Tokens in the cache after the step."""


class _ScheduledRequest(Protocol):
    state: _SequenceState


class StepSampler(ContinuousBatchingLogitsProcessor):
    """Logits processor that samples from the rows of a step.

    The manager's own processors sort every row, greedy rows included, which takes a CPU longer than the model. Here the
    manager takes the largest logit: greedy rows stay unchanged, and the logit of a sampled token becomes infinite.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"submission": Submission}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: CausalLM, step_sequences: Callable[[], Sequence[ScheduledSequence]]) -> None:
        self._model = model
        self.embedding_rows = int(model.get_input_embeddings().weight.shape[0])
        """Number of tokens that may be sampled."""
        self._step_sequences = step_sequences
        self.scorer = PromptScorer(model, self.embedding_rows, lambda request_id: self.samplers.get(request_id))
        self.samplers: dict[str, SequenceSampler] = {}
        """By request id, which a sequence keeps when it leaves a full cache and starts again."""
        self.step_count = 0
        self._sample = BatchSampler()
        self._states: list[_SequenceState] = []
        """Of the next step's rows, in their order."""

    def add(self, request_id: str, sampler: SequenceSampler) -> None:
        self.samplers[request_id] = sampler

    def remove(self, request_id: str) -> None:
        self.samplers.pop(request_id, None)

    def rewind(self, states: Iterable[_SequenceState]) -> None:
        """Forget what a failed step has sampled of sequences that start again, with the tokens of the steps before."""
        # The step may have failed before their tokens were copied to the device.
        self._sample = BatchSampler()
        for state in states:
            if sampler := self.samplers.get(state.request_id):
                del sampler.logprobs[len(state.initial_tokens) + len(state.generated_tokens) - sampler.prompt_tokens :]

    def fail(self, request_id: str, error: RequestError) -> None:
        """End a sequence with an error of the request."""
        if sampler := self.samplers.get(request_id):
            sampler.failure = error

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()  # not used

    def prepare_tensor_args(self, requests_with_new_token: Sequence[_ScheduledRequest]) -> torch.Tensor:
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    @property
    def needs_logits(self) -> bool:
        """Whether the next step needs more than the largest logit of each row."""
        samplers = (self.samplers.get(state.request_id) for state in self._states)
        return bool(self.scorer.samplers) or any(sampler.is_used for sampler in samplers if sampler)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Sample from each row of `scores` (rows, LM head), in place."""
        del tensor_arg
        if self.scorer.samplers:
            self._score_prompts()
        self.sample(scores, self._states)
        self.step_count += 1
        return scores

    def sample(self, scores: torch.Tensor, states: Sequence[_SequenceState]) -> None:
        """Sample from rows of logits (rows, LM head) in place, contiguous, at most one row of a sequence.

        Args:
            scores: float32, with at least as many rows as there are states; further ones are not used.
            states: of the rows' sequences, whose `position_offset` is the number of tokens before the sampled one.
        """
        # An LM head may have more rows than the embedding, which the next step would index with the token.
        scores[:, self.embedding_rows :] = -torch.inf
        # Other threads remove sequences at any time.
        samplers = dict(self.samplers)
        # Rows of sequences in the middle of their prompt come last and are not used. Sequences of the manager's warm-up
        # and cancelled ones have no sampler: greedy.
        rows = [
            Row(index, state.position_offset, state, sampler)
            for index, state in enumerate(states)
            if (sampler := samplers.get(state.request_id)) and sampler.is_used
        ]
        if rows:
            self._sample(scores, rows, min(self.embedding_rows, scores.shape[1]), samplers)

    def _score_prompts(self) -> None:
        sequences = self._step_sequences()
        try:
            self.scorer.score(sequences)
        except BaseException as error:
            # The other ranks have computed the logits, or wait for them.
            if tensor_parallel.size() > 1 or causal_lm.is_device_lost(self._model):
                raise
            logger.exception("the prompts of a step cannot be scored")
            for sequence in sequences:
                if sampler := self.scorer.samplers.pop(sequence.state.request_id, None):
                    sampler.failure = error
