"""What a long prompt costs: its own first token, and the tokens of other streams."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import httpx2

from kserve_llm import bench
from kserve_llm.bench import Completion, Prompt, Server

OTHER_STREAMS = 8
"""Streams that run while a long prompt is computed."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Times between tokens of the other streams in ms, quiet and while a long prompt is computed."""

    before_p50_ms: float
    before_p99_ms: float
    during_p50_ms: float
    during_p99_ms: float


async def disturb(
    client: httpx2.AsyncClient,
    server: Server,
    make_prompt: Callable[[int], Prompt],
    long_prompt_tokens: int,
    *,
    short_prompt_tokens: int = 64,
    output_tokens: int = 128,
) -> Disturbance | None:
    """Run `OTHER_STREAMS` streams of `output_tokens`, then send a long prompt, and return its effect on them.

    None if the streams were over too early. `make_prompt` returns a prompt of the given number of tokens.

    Raises:
        BenchmarkError: a completion failed.
    """

    async def complete(input_tokens: int, tokens: int) -> Completion:
        return await bench.complete(client, server, make_prompt(input_tokens), tokens)

    try:
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(complete(short_prompt_tokens, output_tokens)) for _ in range(OTHER_STREAMS)]
            # When this one is complete, the others have been in its batch; from its first token on, they are quiet.
            short = await complete(short_prompt_tokens, bench.FEW_TOKENS)
            long = await complete(long_prompt_tokens, bench.FEW_TOKENS)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return disturbance(long, [other.result() for other in others], quiet_from=short.arrivals[0])


def disturbance(long: Completion, others: Sequence[Completion], *, quiet_from: float) -> Disturbance | None:
    """Return times between tokens of the others from `quiet_from` until `long` was sent, and until its first token.

    None if no token arrived in one of these times.
    """
    before, during = [], []
    for other in others:
        for earlier, later in pairwise(other.arrivals):
            if quiet_from <= earlier and later <= long.sent:
                before.append((later - earlier) * 1000)
            # A gap that overlaps the computation of the prompt.
            elif later > long.sent and earlier < long.arrivals[0]:
                during.append((later - earlier) * 1000)
    if not before or not during:
        return None
    quiet, disturbed = sorted(before), sorted(during)
    return Disturbance(
        bench.percentile(quiet, 50),
        bench.percentile(quiet, 99),
        bench.percentile(disturbed, 50),
        bench.percentile(disturbed, 99),
    )
