"""Steps of a tensor-parallel model: every rank runs the batching manager's loop, and rank 0 chooses the tokens.

Rank 0 distributes new and cancelled sequences at the start of each step, and every rank schedules them alike. So
whatever the scheduler depends on has to arrive with them, and may change in the loop's thread only.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from predictor.kernels import tensor_parallel

logger = logging.getLogger(__name__)


class TokenBroadcast(ContinuousBatchingLogitsProcessor):
    """Last logits processor: gives every rank the tokens of rank 0, where the sequences' samplers are.

    Ranks whose logits differ in the last bit, or whose random numbers do, cannot diverge.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()  # not used

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Make rank 0's tokens the largest of `scores` (rows, vocabulary), in place."""
        del tensor_arg
        token_ids = tensor_parallel.broadcast(scores.argmax(dim=-1, keepdim=True))
        if tensor_parallel.rank():
            scores.fill_(-torch.inf).scatter_(1, token_ids, 0.0)
        return scores


def follow_driver(manager: Any) -> None:
    """Prepare a manager whose sequences all come from rank 0's and whose outputs have no reader."""
    manager.output_router.deliver = _discard
    manager.output_router.deliver_batch = _discard
    manager._wake_up_loop = _NoWait()


def end_follower() -> None:
    """On a rank other than 0, log the error that is handled and end the process, by which rank 0 knows."""
    if tensor_parallel.rank():
        logger.exception("a step failed")
        logging.shutdown()
        os._exit(1)


def _discard(output: object) -> None:
    """Discard an output, or several."""


class _NoWait:
    """Event of new work: while there is none, an idle follower waits for rank 0 in a collective operation instead."""

    def wait(self, timeout: float | None = None) -> None:
        """Return at once."""

    def set(self) -> None:
        """Do nothing."""

    def clear(self) -> None:
        """Do nothing."""
