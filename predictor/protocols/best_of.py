"""Choose the most probable of several completions of one prompt: `best_of`."""

from collections.abc import Iterator, Sequence

from predictor.types import Completion


def best(completions: Sequence[Completion], *, n: int, candidates: int) -> Iterator[Completion]:
    """Yield the `n` completions of each prompt with the largest mean log probability of their tokens, best first.

    Args:
        completions: `candidates` of the first prompt, then of the next; with log probabilities, unless all are chosen.
        n: number of completions per prompt.
        candidates: number to choose from.
    """
    for first in range(0, len(completions), candidates):
        group = completions[first : first + candidates]
        yield from group if n == candidates else sorted(group, key=_mean_logprob, reverse=True)[:n]


def _mean_logprob(completion: Completion) -> float:
    return sum(token.logprob or 0.0 for token in completion.tokens) / max(1, len(completion.tokens))
