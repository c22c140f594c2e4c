"""Servers under the same loads, in turns: one runs, the others are suspended."""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2

from benchmarks import long_prompts
from benchmarks.long_prompts import Disturbance
from benchmarks.turns import OtherCPUTime, Turns
from kserve_llm import bench
from kserve_llm.bench import WARM_UP_TOKENS, Run, Server
from kserve_llm.errors import BenchmarkError

SHORT_PROMPT_TOKENS = 64
"""Of warm-ups, and of the streams that run when a long prompt arrives."""


@dataclass(frozen=True, slots=True)
class Load:
    """A load: `callers` clients, each with one request after the other."""

    callers: int
    input_tokens: int
    output_tokens: int
    requests: int
    """Per run; at least one per caller."""
    repetitions: int
    """Runs of each server."""


@dataclass(frozen=True, slots=True)
class Case:
    """All runs of one server under one load."""

    server: str
    callers: int
    input_tokens: int
    output_tokens: int
    runs: list[Run]
    other_cpu_percent: list[float]
    """CPU time of all other processes during each run, in percent of one core."""


class Comparison:
    """Measures servers in turns; prompts are random token ids below `vocabulary`.

    A server that fails is measured no further; its name and the reason are added to `left_out`.
    """

    def __init__(self, servers: Sequence[Server], vocabulary: int, seed: int, left_out: dict[str, str]) -> None:
        self._servers = list(servers)
        self._left_out = left_out
        self._turns = Turns(servers)
        self._vocabulary = vocabulary
        self._rng = random.Random(seed)

    async def measure(self, loads: Sequence[Load]) -> list[Case]:
        """Measure every server under every load; the order of the servers alternates (A B B A …)."""
        cases = []
        with self._turns.suspended():
            async with bench.make_client() as client:
                for load in loads:
                    cases += await self._compare(client, load)
        return cases

    async def disturb(self, long_prompt_tokens: int, repetitions: int) -> dict[str, list[Disturbance]]:
        """Measure what a long prompt costs the other streams of each server."""
        found: dict[str, list[Disturbance]] = {server.name: [] for server in self._servers}
        with self._turns.suspended():
            async with bench.make_client() as client:
                for repetition in range(repetitions):
                    for server in self._order(repetition):
                        with self._turn(server):
                            await self._warm_up(client, server, 1, SHORT_PROMPT_TOKENS)
                            disturbance = await long_prompts.disturb(
                                client,
                                server,
                                self._prompt,
                                long_prompt_tokens,
                                short_prompt_tokens=SHORT_PROMPT_TOKENS,
                            )
                            if disturbance:
                                found[server.name].append(disturbance)
        return found

    async def _compare(self, client: httpx2.AsyncClient, load: Load) -> list[Case]:
        cases = {
            server: Case(server.name, load.callers, load.input_tokens, load.output_tokens, [], [])
            for server in self._servers
        }
        for repetition in range(load.repetitions):
            for server in self._order(repetition):
                with self._turn(server):
                    # The first run of a load may compile for its shapes.
                    await self._warm_up(
                        client,
                        server,
                        load.callers if repetition == 0 else 1,
                        load.input_tokens if repetition == 0 else SHORT_PROMPT_TOKENS,
                    )
                    others = OtherCPUTime(server)
                    prompts = [self._prompt(load.input_tokens) for _ in range(max(load.requests, load.callers))]
                    run = await bench.run(client, server, prompts, load.callers, load.output_tokens)
                    cases[server].runs.append(run)
                    cases[server].other_cpu_percent.append(100 * others.seconds() / run.wall_seconds)
                    print(bench.row(server.name, load.callers, run), file=sys.stderr, flush=True)
        return [cases[server] for server in self._servers]

    @contextmanager
    def _turn(self, server: Server) -> Iterator[None]:
        """Let a server run; leave it out from now on if it fails."""
        with self._turns.of(server):
            try:
                yield
            except BenchmarkError as error:
                self._left_out[server.name] = str(error)
                self._servers.remove(server)
                print(f"left out: {server.name}: {error}", file=sys.stderr)

    async def _warm_up(self, client: httpx2.AsyncClient, server: Server, callers: int, input_tokens: int) -> None:
        """Send each caller's short prompt, and one of `input_tokens` if that is longer."""
        prompts = [self._prompt(SHORT_PROMPT_TOKENS) for _ in range(callers)]
        await bench.run(client, server, prompts, callers, WARM_UP_TOKENS)
        if input_tokens > SHORT_PROMPT_TOKENS:
            await bench.run(client, server, [self._prompt(input_tokens)], 1, WARM_UP_TOKENS)

    def _order(self, repetition: int) -> list[Server]:
        return list(self._servers if repetition % 2 == 0 else reversed(self._servers))

    def _prompt(self, tokens: int) -> list[int]:
        [prompt] = bench.make_token_prompts(self._rng, 1, tokens, self._vocabulary)
        return prompt
