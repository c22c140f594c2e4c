"""Deficit round robin by caller over the sequences that wait for the batch, with tokens as cost.

In each round every caller is granted tokens, as many as its weight, and starts a waiting sequence once its grants cover
what it has used and what the sequence will use. The round in which that happens is computed instead of counted, so an
order costs one sort. What a sequence will generate is not known: one in the batch reserves `RESERVED_TOKENS`, and every
token is charged when it is computed.

Only the step loop's thread uses it: with tensor parallelism every rank has one, and all have to give the same order.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass

from predictor.types import Caller

RESERVED_TOKENS = 256
"""Charged in advance for a sequence in the batch. Without it, a caller would get every free place until its sequences
have generated as many tokens as those of the others."""
PATIENCE_TOKENS = 1024
"""Tokens by which a caller may fall behind another one before it gets one of the other's places in a full batch."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    """Caller and position of a sequence."""

    name: str | None
    """Of the caller; None without API keys."""
    weight: int
    priority: int
    number: int
    """By arrival."""


_NO_CALLER = _Ticket(None, 1, 0, 0)


class FairQueue:
    """Order between callers, of sequences that are identified by a request id.

    A caller comes before all others if it has nothing in the batch and used no more than its share, or if it has fallen
    far behind another one, whose sequences may be long. For it, `victim` names the sequence that has to leave a full
    batch.
    """

    def __init__(self) -> None:
        self._tickets: dict[str, _Ticket] = {}
        self._numbers = itertools.count(1)
        self._weights: defaultdict[str | None, int] = defaultdict(lambda: 1)
        self._used: defaultdict[str | None, float] = defaultdict(float)
        """By caller, the round whose grants cover all tokens computed so far."""
        self._round = 0.0
        """Rounds that have passed: a caller that was idle has missed their grants."""
        self._waiting: set[str | None] = set()
        self._running: Counter[str | None] = Counter()

    def add(self, request_id: str, caller: Caller | None, priority: int) -> None:
        """Register a new sequence; a lower priority starts earlier among those of its caller."""
        name, weight = (caller.name, caller.weight) if caller else (None, 1)
        self._weights[name] = weight
        self._tickets[request_id] = _Ticket(name, weight, priority, next(self._numbers))

    def __contains__(self, request_id: str) -> bool:
        """Return whether a sequence is registered."""
        return request_id in self._tickets

    def retain(self, *request_ids: Container[str]) -> None:
        """Forget all sequences except these."""
        for request_id in [known for known in self._tickets if not any(known in ids for ids in request_ids)]:
            del self._tickets[request_id]

    def charge(self, request_id: str, tokens: int) -> None:
        """Charge a sequence's caller for tokens of a step."""
        ticket = self._ticket(request_id)
        self._used[ticket.name] += tokens / ticket.weight

    def begin_step(self, running: Iterable[str], waiting: Iterable[str]) -> None:
        """Take over the sequences in the batch and those that wait for it."""
        self._running = Counter(self._ticket(request_id).name for request_id in running)
        callers = {self._ticket(request_id).name for request_id in waiting}
        for name in callers - self._waiting:
            self._used[name] = max(self._used[name], self._round)
        self._waiting = callers
        if callers:
            self._round = max(self._round, min(self._used[name] for name in callers))

    def entitled(self, waiting: Collection[str]) -> list[str]:
        """Return the next sequence of every caller for which another one's has to leave a full batch."""
        if len(self._waiting | self._running.keys()) < 2:
            return []
        first: dict[str | None, tuple[int, int, str]] = {}
        for request_id in waiting:
            ticket = self._ticket(request_id)
            if self._is_entitled(ticket.name):
                rank = (ticket.priority, ticket.number, request_id)
                first[ticket.name] = min(first.get(ticket.name, rank), rank)
        return [request_id for *_, request_id in first.values()]

    def victim(self, running: Sequence[str], entering: Iterable[str]) -> str | None:
        """Return, and count as waiting, the last sequence of the caller that uses most for its weight.

        None: no caller has two, except those of the entering sequences.
        """
        exempt = {self._ticket(request_id).name for request_id in entering}
        several = [name for name, count in self._running.items() if count > 1 and name not in exempt]
        if not several:
            return None
        heaviest = max(several, key=self._use)
        self._running[heaviest] -= 1
        return next(request_id for request_id in reversed(running) if self._ticket(request_id).name == heaviest)

    def order(self, running: Sequence[tuple[str, int]], waiting: Sequence[tuple[str, int]]) -> list[str]:
        """Return the request ids in the order in which they get a step's tokens.

        Args:
            running: sequences in the batch whose prompts are not computed yet, and the tokens left of each.
            waiting: sequences outside of it, in the order of their arrival, and the tokens of each prompt.
        """
        tickets = [self._ticket(request_id) for request_id, _ in (*running, *waiting)]
        if len({(ticket.name, ticket.priority) for ticket in tickets}) > 1:
            return self._ordered(running, waiting)
        return [request_id for request_id, _ in (*running, *waiting)]

    def _ordered(self, running: Sequence[tuple[str, int]], waiting: Sequence[tuple[str, int]]) -> list[str]:
        by_arrival = sorted(waiting, key=lambda item: self._rank(item[0]))
        used = {name: self._use(name) for name in {self._ticket(item[0]).name for item in (*running, *waiting)}}
        first = {name for name in used if self._is_entitled(name)}
        keys: dict[str, tuple[bool, float, int, int]] = {}
        for items, reserved in ((running, 0), (by_arrival, RESERVED_TOKENS)):
            for request_id, tokens in items:
                name = self._ticket(request_id).name
                used[name] += (tokens + reserved) / self._weights[name]
                keys[request_id] = (name not in first, used[name], *self._rank(request_id))
                first.discard(name)
        return sorted(keys, key=lambda request_id: keys[request_id])

    def _use(self, name: str | None) -> float:
        """Return the round whose grants cover a caller's tokens, those reserved for its running sequences included."""
        return self._used[name] + RESERVED_TOKENS * self._running[name] / self._weights[name]

    def _is_entitled(self, name: str | None) -> bool:
        if not self._running[name]:
            return self._used[name] <= self._round
        behind = self._use(name) + PATIENCE_TOKENS / self._weights[name]
        return any(count > 1 and self._use(other) > behind for other, count in self._running.items())

    def _rank(self, request_id: str) -> tuple[int, int]:
        ticket = self._ticket(request_id)
        return ticket.priority, ticket.number

    def _ticket(self, request_id: str) -> _Ticket:
        """Return the ticket of a sequence; one that was cancelled, or is the manager's own, has no caller."""
        return self._tickets.get(request_id, _NO_CALLER)
