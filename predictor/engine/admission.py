"""Whether further sequences have a place among those that run or wait.

Callers share the places. Every caller can always have its share of them by weight, and at least one, even if another
one fills the queue; places that are free belong to everyone. So at most twice the capacity is in use; with more callers
than places, the capacity and one for each.
"""

from collections import Counter
from typing import NoReturn

from predictor.errors import InvalidRequest, Overloaded, RateLimited
from predictor.types import Caller

RETRY_SECONDS = 1
"""Retry-After of a request beyond the limit of concurrent sequences; one of them may end at any time."""


def check(sequences: int, used: Counter[str | None], capacity: int, caller: Caller | None) -> None:
    """Check that further sequences of a caller have a place.

    Args:
        sequences: further ones, all of them or none.
        used: number of sequences that run or wait, by name of the caller.
        capacity: places for sequences, in the batch and in the queue.
        caller: None without API keys.

    Raises:
        InvalidRequest: more sequences than one request can have.
        RateLimited: the caller has its maximum of sequences.
        Overloaded: there are too few free places.
    """
    if sequences > capacity:
        _too_many(sequences, f"Request at most {capacity}.")
    if caller is not None and caller.concurrent_sequences is not None:
        limit = caller.concurrent_sequences
        if sequences > limit:
            _too_many(sequences, f"API key {caller.name} allows {limit} at a time.")
        if used[caller.name] + sequences > limit:
            raise RateLimited(
                f"API key {caller.name} has {used[caller.name]} of its {limit} concurrent sequences. Retry later.",
                "concurrent_sequences",
                RETRY_SECONDS,
            )
    in_use = used.total()
    if in_use + sequences > capacity and not _is_within_share(sequences, used, capacity, caller):
        raise Overloaded(f"Server overloaded: {in_use} of {capacity} sequence slots in use. Retry later.")


def _too_many(sequences: int, remedy: str) -> NoReturn:
    raise InvalidRequest(f"Too many completions in one request: {sequences}. {remedy}")


def _is_within_share(sequences: int, used: Counter[str | None], capacity: int, caller: Caller | None) -> bool:
    return caller is not None and used[caller.name] + sequences <= max(1, int(capacity * caller.share))
