"""Interface between the engine and the step loop that runs its sequences.

One implementation exists, `BatchingManager`. With tensor parallelism, each rank has one; sequences are submitted to
that of rank 0.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from predictor.engine.sampler import SequenceSampler
from predictor.engine.speculation import Speculation
from predictor.types import Caller


@dataclass(slots=True)
class EngineOutput:
    """State of one sequence after a step."""

    token_ids: list[int]
    """All generated tokens so far, not only the new ones."""
    finished: bool
    error: str | None
    queue_seconds: float | None
    """From the submission to the first step that computed some of the prompt; None: not scheduled yet."""


class Executor(Protocol):
    """Step loop over one model; sequences are identified by a request id."""

    @property
    def cache_tokens(self) -> int:
        """Capacity of the KV cache in tokens; 0 before the start."""

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that running sequences hold, 0..1; blocks cached for prefix sharing count as free."""

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""

    @property
    def step_count(self) -> int:
        """Steps since the start, without those that failed."""

    @property
    def failed_step_count(self) -> int:
        """Steps that failed since the start, with their sequences, or the newest one for lack of memory."""

    @property
    def speculation(self) -> Speculation:
        """Counts of guessed tokens."""

    @property
    def is_running(self) -> bool:
        """Whether the step loop's thread is alive."""

    @property
    def is_accepting(self) -> bool:
        """Whether the step loop runs and accepts sequences."""

    @property
    def has_pending(self) -> bool:
        """Whether a step is due."""

    def start(self) -> None:
        """Allocate the KV cache and start the step loop; blocks.

        Raises:
            StartupError: the KV cache does not fit.
        """

    def stop(self, timeout_seconds: float) -> None:
        """End the step loop at the next step, and wait for its thread for `timeout_seconds` at most."""

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampler: SequenceSampler,
        *,
        max_tokens: int | None,
        end_token_ids: Collection[int],
        on_output: Callable[[EngineOutput], None],
        caller: Caller | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a sequence; `on_output` is called on the running event loop after each of its steps.

        Waiting sequences start in the order of `fair_queue`, by caller and priority.

        Raises:
            EngineStopped: the step loop has ended.
        """

    def cancel(self, request_id: str) -> None:
        """Remove a sequence from the batch at the next step; `on_output` is not called again."""

    def queue_seconds(self, request_id: str) -> float | None:
        """Seconds that a running sequence waited for its first step; None: it is not running."""

    def plain_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the logits of a forward pass over one sequence without the KV cache, (tokens, vocabulary).

        No sequence may be running: the step loop uses the same model.
        """

    def end_plain_passes(self) -> None:
        """Release followers from taking part in `plain_logits`, which may not be called afterwards."""

    def follow(self) -> None:
        """On a rank other than 0, take part in rank 0's plain passes and steps until its step loop ends.

        An error of a step ends the process.
        """
