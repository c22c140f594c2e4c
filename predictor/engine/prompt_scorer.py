"""Log probabilities of prompt tokens, computed from the hidden states of the steps that compute the prompts.

A step computes the logits of each sequence's last row only. Here the model's head runs again on the rows of the prompts
to score, a few at a time, so that no tensor of prompt x vocabulary is made.
"""

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from predictor.engine.causal_lm import CausalLM
from predictor.engine.sampler import SequenceSampler, token_logprobs
from predictor.types import SamplingParams, TokenLogprob

CHUNK_LOGITS = 2**22
"""Largest number of logits computed at a time, unless a single row has more."""


class _SequenceState(Protocol):
    request_id: str
    initial_tokens: list[int]
    """The prompt, and after it the tokens that the sequence had generated when it left a full cache."""
    position_offset: int
    """Tokens in the cache after the step."""


class ScheduledSequence(Protocol):
    """A sequence of a step."""

    state: _SequenceState
    query_length: int
    """Number of its rows."""


class _Row(NamedTuple):
    """Row of a step, whose logits predict `token_id`."""

    position: int
    """In the step."""
    token_id: int
    sampler: SequenceSampler


class PromptScorer:
    """Scores the prompts of the sequences in `samplers`.

    Args:
        model: whose decoder returns an output with `last_hidden_state`, which the head turns into logits.
        vocabulary_tokens: rows of the input embedding. An LM head may have more, which are never sampled.
        find_sampler: returns the sampler of a sequence; None: its log probabilities have no reader, as on ranks other
            than 0, which compute their part of the logits.
    """

    def __init__(
        self,
        model: CausalLM,
        vocabulary_tokens: int,
        find_sampler: Callable[[str], SequenceSampler | None] = lambda _: None,
    ) -> None:
        self.samplers: dict[str, SequenceSampler] = {}
        """By request id, the sequences whose prompts are not completely scored."""
        self._find_sampler = find_sampler
        self._model = model
        self._vocabulary_tokens = vocabulary_tokens
        self._decoder: nn.Module = model.get_decoder()
        self._output: Any = None
        self._decoder.register_forward_hook(self._keep_output)

    def _keep_output(self, _: nn.Module, __: Any, output: Any) -> None:
        if self.samplers:
            self._output = output

    def add(self, request_id: str, prompt_tokens: int) -> None:
        """Score the prompt of a new sequence."""
        unread = SequenceSampler(SamplingParams(prompt_logprobs=0), prompt_tokens, ())
        self.samplers[request_id] = self._find_sampler(request_id) or unread

    def retain(self, *request_ids: Container[str]) -> None:
        """Forget all sequences except these."""
        for request_id in [known for known in self.samplers if not any(known in ids for ids in request_ids)]:
            del self.samplers[request_id]

    def score(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Add the log probabilities of the last forward pass to the samplers.

        Args:
            sequences: of the step, in the order of their rows.
        """
        output, self._output = self._output, None
        rows: list[_Row] = []
        first_row = 0
        complete = []
        for sequence in sequences:
            state = sequence.state
            if sampler := self.samplers.get(state.request_id):
                rows += _unscored_rows(sequence, sampler, first_row)
                if state.position_offset >= sampler.prompt_tokens - 1:
                    complete.append(state.request_id)
            first_row += sequence.query_length
        size = max(1, CHUNK_LOGITS // self._vocabulary_tokens)
        for begin in range(0, len(rows), size):
            self._score_rows(output, rows[begin : begin + size])
        for request_id in complete:
            self.samplers.pop(request_id, None)

    def _score_rows(self, output: Any, rows: Sequence[_Row]) -> None:
        positions, token_ids, samplers = zip(*rows, strict=True)
        logits = self._logits(output, positions)
        logits[:, self._vocabulary_tokens :] = -torch.inf
        tops = [sampler.num_prompt_logprobs or 0 for sampler in samplers]
        logprobs = token_logprobs(logits.log_softmax(dim=-1), token_ids, tops)
        for sampler, logprob in zip(samplers, logprobs, strict=True):
            sampler.prompt_logprobs.append(logprob)

    def _logits(self, output: Any, rows: Sequence[int]) -> torch.Tensor:
        """Return float32 logits, (rows, vocabulary), by the model's own code for what follows its decoder."""
        hidden_states = output.last_hidden_state[:, list(rows)]
        input_ids = torch.zeros(1, len(rows), dtype=torch.long, device=hidden_states.device)
        with _returning(self._decoder, dataclasses.replace(output, last_hidden_state=hidden_states)):
            logits: torch.Tensor = self._model.forward(input_ids=input_ids, use_cache=False).logits[0]
        return logits.float()


def _unscored_rows(sequence: ScheduledSequence, sampler: SequenceSampler, first_row: int) -> list[_Row]:
    """Return the rows of a sequence that predict tokens of its prompt, without those that are scored already.

    A sequence that left a full cache computes its rows again.
    """
    tokens, end = sequence.state.initial_tokens, sequence.state.position_offset
    if not sampler.prompt_logprobs:
        sampler.prompt_logprobs.append(TokenLogprob(tokens[0], None))
    start = end - sequence.query_length
    positions = range(max(start, len(sampler.prompt_logprobs) - 1), min(end, sampler.prompt_tokens - 1))
    return [_Row(first_row + position - start, tokens[position + 1], sampler) for position in positions]


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Make a module return `output` instead of computing it."""
    # Modules that accelerate places on a device have a `forward` of their own.
    own = vars(module).get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
