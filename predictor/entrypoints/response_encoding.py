"""Encode responses without delaying the event loop: log probabilities of long prompts take seconds."""

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

from predictor.types import Completion, CompletionDelta

T = TypeVar("T")

MAX_INLINE_VALUES = 4096
"""Responses with up to this number of values are encoded on the event loop, within a few ms."""
VALUES_PER_TOKEN = 8
"""Values of a token with its log probability and some alternatives."""


def num_values(outputs: Iterable[Completion | CompletionDelta]) -> int:
    """Return the number of values in the tokens of outputs; their text is fast to encode."""
    return VALUES_PER_TOKEN * sum(len(output.prompt) + len(output.tokens) for output in outputs)


async def encode(values: int, work: Callable[[], T]) -> T:
    """Return the result of `work`, which encodes this number of values; in a thread if there are many."""
    return work() if values <= MAX_INLINE_VALUES else await asyncio.to_thread(work)
