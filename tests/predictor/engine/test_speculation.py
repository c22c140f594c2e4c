"""How many tokens are guessed."""

from dataclasses import dataclass, field

import pytest

from predictor.engine.speculation import MAX_GUESSES, Speculation, num_worthwhile

REPEATING = [1, 2, 3] * 10


@dataclass
class State:
    request_id: str
    initial_tokens: list[int] = field(default_factory=lambda: list(REPEATING))
    generated_tokens: list[int] = field(default_factory=list)
    max_new_tokens: int | None = None


@pytest.mark.parametrize(
    ("acceptance", "num_sequences", "expected"),
    [(1.0, 1, 7), (0.5, 1, 4), (0.1, 1, 1), (0.04, 1, 0), (0.9, 8, 7), (0.5, 8, 1), (0.25, 8, 0), (0.5, 32, 0)],
)
def test_num_worthwhile_needs_more_certainty_for_more_guesses_and_sequences(
    acceptance: float, num_sequences: int, expected: int
) -> None:
    assert num_worthwhile(acceptance, num_sequences) == expected


def test_speculation_guesses_with_the_expectation_at_first_and_more_after_success() -> None:
    speculation = Speculation(8)
    speculation.guess([State("a")])
    assert speculation.guesses == {"a": [1, 2, 3, 1]}
    speculation.record("a", 4)
    speculation.guess([State("a")])
    assert len(speculation.guesses["a"]) > 4
    assert (speculation.num_drafts, speculation.num_draft_tokens, speculation.num_accepted_tokens) == (1, 4, 4)


def test_speculation_stops_where_guesses_fail_and_tries_again_later() -> None:
    speculation = Speculation(8)
    steps: list[int] = []
    for _ in range(200):
        speculation.guess([State("a")])
        steps.append(len(speculation.guesses.get("a", ())))
        if speculation.guesses:
            speculation.record("a", 0)
    # The rows of failed guesses cost little: at most a guess in ten steps.
    assert sum(steps[20:]) <= 180 / 10
    assert any(steps[-50:])
    for _ in range(60):
        speculation.guess([State("a")])
        if speculation.guesses:
            speculation.record("a", len(speculation.guesses["a"]))
    assert len(speculation.guesses["a"]) == MAX_GUESSES


def test_speculation_ends_before_the_last_token() -> None:
    speculation = Speculation(8)
    expected = {1: 0, 2: 1, 3: 2, 100: 4}
    for limit, count in expected.items():
        speculation.guess([State("a", generated_tokens=[1, 2, 3], max_new_tokens=3 + limit)])
        assert len(speculation.guesses.get("a", ())) == count


def test_speculation_limits_the_rows_of_a_step_to_the_likeliest_guesses() -> None:
    speculation = Speculation(8)
    states = [State("a"), State("b")]
    speculation.guess(states)
    speculation.record("a", len(speculation.guesses["a"]))
    speculation.record("b", 0)
    speculation.guess(states)
    assert {request_id: len(guesses) for request_id, guesses in speculation.guesses.items()} == {"a": 5, "b": 1}
    speculation.guess([*states, *(State(str(number)) for number in range(6))])
    assert speculation.guesses == {}


def test_speculation_forgets_sequences_that_have_ended() -> None:
    speculation = Speculation(8)
    speculation.guess([State("a"), State("b")])
    speculation.retain({"b"}, {"c"})
    assert set(speculation._histories) == {"b"}
