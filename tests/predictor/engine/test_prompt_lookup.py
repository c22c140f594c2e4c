import random

import pytest

from predictor.engine.prompt_lookup import PromptLookup


def lookup(prompt: list[int], output: list[int] | None = None) -> PromptLookup:
    made = PromptLookup()
    made.read(prompt, output or [])
    return made


@pytest.mark.parametrize(
    ("prompt", "guess"),
    [
        ([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], [4, 5, 6]),
        ([1, 2, 3, 4, 9, 7, 2, 3, 5, 9, 1, 2, 3], [4, 9, 7]),  # three tokens before a later match of two
        ([8, 2, 3, 4, 9, 7, 2, 3, 5, 6, 1, 2, 3], [5, 6, 1]),  # the latest of two matches
        ([1, 2, 9, 1, 2], [9, 1, 2]),
        ([1, 2, 1, 2], [1, 2, 1]),  # goes on with the period
        ([7, 7, 7], [7, 7, 7]),
        ([1, 2, 3, 4, 5], []),
        ([1, 2, 1], []),
        ([1], []),
        ([], []),
    ],
)
def test_prompt_lookup_guesses_what_followed_the_longest_latest_match(prompt: list[int], guess: list[int]) -> None:
    assert lookup(prompt).guess(3) == guess


def test_prompt_lookup_of_no_guesses_is_empty() -> None:
    assert lookup([1, 2, 1, 2]).guess(0) == []


def test_prompt_lookup_reads_tokens_once_also_after_they_have_become_the_prompt() -> None:
    text = random.Random(1).choices(range(4), k=200)
    stepwise = lookup(text[:50])
    for end in range(51, 120):
        stepwise.read(text[:50], text[50:end])
        assert stepwise.guess(5) == lookup(text[:end]).guess(5)
    # The sequence has left a full cache, and starts again with its output as a part of the prompt.
    for end in range(120, 200):
        stepwise.read(text[:119], text[119:end])
        assert stepwise.guess(5) == lookup(text[:end]).guess(5)
