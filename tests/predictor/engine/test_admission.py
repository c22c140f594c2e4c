from collections import Counter

import pytest

from predictor.engine import admission
from predictor.errors import InvalidRequest, Overloaded, RateLimited, RequestError
from predictor.types import Caller

ALICE, BOB = Caller("alice", share=0.75), Caller("bob", 1, 0.25, concurrent_sequences=3)
Used = dict[str | None, int]


@pytest.mark.parametrize(
    ("caller", "sequences", "used"),
    [
        (None, 16, {}),
        (None, 6, {None: 10}),
        (ALICE, 16, {}),
        (ALICE, 12, {"bob": 16}),
        (ALICE, 2, {"alice": 10, "bob": 16}),
        (BOB, 3, {"alice": 16}),
        (Caller("carol", share=0.001), 1, {"alice": 16}),
    ],
)
def test_check_with_a_free_place_or_within_the_share_passes(caller: Caller | None, sequences: int, used: Used) -> None:
    admission.check(sequences, Counter(used), 16, caller)


@pytest.mark.parametrize(
    ("caller", "sequences", "used", "error", "message"),
    [
        (None, 17, {}, InvalidRequest, "one request: 17. Request at most 16."),
        (None, 7, {None: 10}, Overloaded, "10 of 16 sequence slots in use"),
        (ALICE, 1, {"alice": 16}, Overloaded, "16 of 16 sequence slots in use"),
        (ALICE, 3, {"alice": 10, "bob": 16}, Overloaded, "26 of 16 sequence slots in use"),
        (None, 1, {"alice": 16}, Overloaded, "16 of 16 sequence slots in use"),
        (Caller("carol", share=0.001), 2, {"alice": 16}, Overloaded, "16 of 16 sequence slots in use"),
        (BOB, 4, {}, InvalidRequest, "one request: 4. API key bob allows 3 at a time."),
        (BOB, 2, {"bob": 2}, RateLimited, "API key bob has 2 of its 3 concurrent sequences"),
    ],
)
def test_check_without_a_place_raises(
    caller: Caller | None, sequences: int, used: Used, error: type[RequestError], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        admission.check(sequences, Counter(used), 16, caller)
    assert type(raised.value) is error
