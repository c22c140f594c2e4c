"""Encode responses without delaying the event loop: log probabilities of long prompts take seconds."""

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

from predictor.types import Completion, CompletionDelta

T = TypeVar("T")

MAX_INLINE_TOKENS = 512
"""Responses with up to this number of prompt tokens are encoded on the event loop."""


async def encode(outputs: Iterable[Completion | CompletionDelta], work: Callable[[], T]) -> T:
    """Return the result of `work`, which encodes the outputs; in a thread if they have many prompt tokens."""
    num_tokens = sum(len(output.prompt) for output in outputs)
    return work() if num_tokens <= MAX_INLINE_TOKENS else await asyncio.to_thread(work)
