"""The order between callers, on a batch that is simulated here: one token per sequence and step."""

from collections import Counter

from predictor.engine.fair_queue import PATIENCE_TOKENS, RESERVED_TOKENS, FairQueue
from predictor.types import Caller

ALICE, BOB = Caller("alice"), Caller("bob")


def add(queue: FairQueue, caller: Caller | None, *request_ids: str, priority: int = 0) -> None:
    for request_id in request_ids:
        queue.add(request_id, caller, priority)


def order(queue: FairQueue, running: list[str], waiting: list[str], tokens: int = 10) -> list[str]:
    """The order of a step; all sequences in the batch decode."""
    queue.begin_step(running, waiting)
    return queue.order([], [(request_id, tokens) for request_id in waiting])


def test_order_of_equal_callers_alternates() -> None:
    queue = FairQueue()
    add(queue, ALICE, "a1", "a2", "a3")
    add(queue, BOB, "b1", "b2", "b3")
    assert order(queue, [], ["a1", "a2", "a3", "b1", "b2", "b3"]) == ["a1", "b1", "a2", "b2", "a3", "b3"]


def test_order_follows_the_cost_in_tokens() -> None:
    queue = FairQueue()
    add(queue, ALICE, "a1", "a2")
    add(queue, BOB, "b1", "b2", "b3")
    queue.begin_step([], ["a1", "a2", "b1", "b2", "b3"])
    lengths = [("a1", 2 * RESERVED_TOKENS), ("a2", 10), ("b1", 10), ("b2", 10), ("b3", 10)]
    assert queue.order([], lengths) == ["b1", "a1", "b2", "b3", "a2"]


def test_order_of_one_caller_is_that_of_arrival_also_for_sequences_that_returned() -> None:
    queue = FairQueue()
    add(queue, ALICE, "a1", "a2", "a3")
    assert order(queue, ["a1"], ["a2", "a3"]) == ["a2", "a3"]
    add(queue, BOB, "b1")
    assert order(queue, [], ["a2", "a3", "b1", "a1"]) == ["a1", "b1", "a2", "a3"]


def test_order_puts_the_rest_of_a_prompt_before_the_callers_waiting_sequences() -> None:
    queue = FairQueue()
    add(queue, ALICE, "a1", "a2")
    add(queue, ALICE, "a3", priority=-1)
    queue.begin_step(["a1"], ["a2", "a3"])
    assert queue.order([("a1", 500)], [("a2", 10), ("a3", 10)]) == ["a1", "a3", "a2"]


def test_newcomer_is_entitled_and_gets_the_place_of_the_caller_that_uses_most() -> None:
    queue = FairQueue()
    add(queue, ALICE, "a1", "a2", "a3")
    add(queue, None, "n1")
    queue.begin_step(["a1", "n1", "a2"], ["a3"])
    assert queue.entitled(["a3"]) == []
    add(queue, BOB, "b1")
    queue.begin_step(["a1", "n1", "a2"], ["a3", "b1"])
    assert queue.entitled(["a3", "b1"]) == ["b1"]
    assert queue.victim(["a1", "n1", "a2"], ["b1"]) == "a2"
    assert queue.victim(["a1", "n1"], ["b1"]) is None, "a caller keeps its last sequence"


def test_idle_caller_saves_nothing_and_owes_nothing() -> None:
    queue = FairQueue()
    add(queue, ALICE, *(f"a{number}" for number in range(9)))
    for _ in range(100):
        queue.begin_step(["a0", "a1"], ["a2", "a3"])
        queue.charge("a0", 100)
    add(queue, BOB, *(f"b{number}" for number in range(9)))
    first = order(queue, [], ["a2", "a3", "a4", "b0", "b1", "b2"])
    assert Counter(name[0] for name in first[:4]) == {"a": 2, "b": 2}


def test_caller_beyond_its_share_is_not_entitled() -> None:
    queue = FairQueue()
    add(queue, ALICE, "a1", "a2", "a3")
    add(queue, BOB, "b1", "b2")
    queue.begin_step([], ["a1", "a2", "a3", "b1"])
    queue.charge("b1", 50)
    queue.begin_step(["a1", "a2"], ["a3", "b2"])
    assert queue.entitled(["a3", "b2"]) == []
    queue.charge("a1", 50)
    queue.begin_step(["a1", "a2"], ["a3", "b2"])
    assert queue.entitled(["a3", "b2"]) == ["b2"]


def test_caller_that_falls_far_behind_is_entitled_to_another_place() -> None:
    queue = FairQueue()
    add(queue, ALICE, "a1", "a2")
    add(queue, BOB, "b1", "b2")
    for _ in range(2):
        queue.begin_step(["a1", "a2", "b1"], ["b2"])
        assert queue.entitled(["b2"]) == []
        queue.charge("a1", PATIENCE_TOKENS // 2 - RESERVED_TOKENS)
    queue.charge("a1", 2 * RESERVED_TOKENS + 1)
    queue.begin_step(["a1", "a2", "b1"], ["b2"])
    assert queue.entitled(["b2"]) == ["b2"]
    assert queue.victim(["a1", "a2", "b1"], ["b2"]) == "a2"


def test_caller_does_not_get_its_own_place() -> None:
    queue = FairQueue()
    add(queue, ALICE, "a1", "a2")
    add(queue, BOB, "b1", "b2", "b3")
    queue.begin_step(["a1", "a2", "b1", "b2"], ["b3"])
    queue.charge("a1", 2 * PATIENCE_TOKENS)
    assert queue.entitled(["b3"]) == ["b3"]
    assert queue.victim(["a1", "a2", "b1", "b2"], ["b3"]) == "a2"
    assert queue.victim(["a1", "b1", "b2"], ["b3"]) is None


def test_sequence_that_neither_runs_nor_waits_is_forgotten() -> None:
    queue = FairQueue()
    add(queue, ALICE, "a1", "a2", "a3")
    queue.retain(["a1"], {"a3": None})
    assert ["a1" in queue, "a2" in queue, "a3" in queue] == [True, False, True]
    queue.retain()
    assert queue._tickets == {}
