"""Token buckets on a clock that moves by hand."""

from dataclasses import replace

import pytest

from predictor.errors import RateLimited
from predictor.generation.rate_limits import RateLimits
from predictor.types import Caller

ALICE = Caller("alice", requests_per_minute=2, tokens_per_minute=60)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> RateLimits:
    return RateLimits(clock)


def refusal(limits: RateLimits, caller: Caller) -> tuple[str, int] | None:
    """Limit and Retry-After of a request; None if it is accepted."""
    try:
        limits.take_request(caller)
    except RateLimited as error:
        return error.limit, error.retry_after_seconds
    return None


def test_requests_are_refused_until_the_bucket_has_one(limits: RateLimits, clock: Clock) -> None:
    assert [refusal(limits, ALICE) for _ in range(4)] == [None, None, *[("requests_per_minute", 30)] * 2]
    clock.seconds = 29.5
    assert refusal(limits, ALICE) == ("requests_per_minute", 1)
    clock.seconds = 30.0
    assert refusal(limits, ALICE) is None
    assert refusal(limits, Caller("bob", requests_per_minute=1)) is None
    clock.seconds = 3600.0
    assert [refusal(limits, ALICE) is None for _ in range(3)] == [True, True, False], "one minute is kept at most"


def test_request_that_takes_more_tokens_than_are_left_leaves_a_debt(limits: RateLimits, clock: Clock) -> None:
    assert refusal(limits, ALICE) is None
    limits.take_tokens(ALICE, 100)
    assert refusal(limits, ALICE) == ("tokens_per_minute", 41)
    clock.seconds = 41.0
    assert refusal(limits, ALICE) is None


def test_refused_request_is_not_counted(limits: RateLimits, clock: Clock) -> None:
    limits.take_tokens(ALICE, 60)
    assert [refusal(limits, ALICE) for _ in range(3)] == [("tokens_per_minute", 1)] * 3
    clock.seconds = 1.0
    assert [refusal(limits, ALICE) for _ in range(2)] == [None, None]


def test_changed_limit_keeps_what_was_used(limits: RateLimits, clock: Clock) -> None:
    assert [refusal(limits, ALICE) for _ in range(2)] == [None, None]
    clock.seconds = 1.0
    assert refusal(limits, replace(ALICE, requests_per_minute=60)) is None
    assert refusal(limits, replace(ALICE, requests_per_minute=60)) == ("requests_per_minute", 1)
    assert [refusal(limits, Caller("alice")) for _ in range(100)] == [None] * 100
