"""Fence around the scheduler of transformers' continuous batching, which shares the batch between callers."""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from predictor.engine.fair_queue import FairQueue
from predictor.engine.prompt_scorer import PromptScorer
from predictor.engine.speculation import Speculation
from predictor.engine.step_budget import StepBudget
from predictor.engine.submission import Submission

NAME = "kserve_llm"
"""For the manager's config."""
LIMITED_STEPS = 1000
"""Steps that stay smaller than one that ran out of memory, which may have been another process's fault."""


class FairScheduler(FIFOScheduler):
    """First in, first out for one caller, and `FairQueue`'s order between callers.

    Admits waiting sequences again after a cancellation or failure. After a sequence had to leave a full cache, the
    manager's scheduler admits no other until a running one finishes. If all running sequences are cancelled instead, it
    would never admit one.
    """

    scheduled: Sequence[Any] = ()
    """Sequences of the step; none before they are all scheduled."""
    scorer: PromptScorer | None = None
    """Its sequences need every row of their prompt, so that no cached prefix replaces any."""
    speculation: Speculation | None = None
    """Guesses tokens of the sequences of steps that only decode."""
    pending_ids: Collection[str] = ()
    """Request ids of the sequences of a step that runs, of which the host does not know the newest token."""
    step_budget: StepBudget | None = None
    """Limits tokens of prompts while sequences decode; None: only the manager's budget does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.fair_queue = FairQueue()
        self.settle: Callable[[], bool] = lambda: False
        """Takes over the tokens of a step that runs; returns whether there was one."""
        self.limited_steps = 0
        """Number of next steps that have at most `_token_limit` tokens."""
        self._token_limit = 0
        self._step_tokens = 0
        self._decode_tokens = 0
        self._step_start = 0.0
        super().__init__(*arguments, **options)

    def add_waiting_request(self, state: Any) -> None:
        submission: Submission | None = state.logit_processor_kwargs.get("submission")
        # A sequence that left the batch starts again, with its place among those of its caller.
        if submission and state.request_id not in self.fair_queue:
            self.fair_queue.add(state.request_id, submission.caller, submission.priority)
            if self.scorer and submission.scored_tokens is not None:
                self.scorer.add(state.request_id, submission.scored_tokens)
        super().add_waiting_request(state)

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[Any] | None, bool, int, int]:
        self.fair_queue.begin_step(self.active_requests, self.waiting_requests)
        if self.limited_steps:
            self.limited_steps -= 1
            token_budget = min(token_budget, self._token_limit)
        if self.waiting_requests:
            self._make_room(token_budget)
        if self.speculation:
            self._add_guesses(self.speculation, token_budget)
        decodes = {
            request_id: len(state.tokens_to_process)
            for request_id, state in self.active_requests.items()
            if state.status == RequestStatus.DECODING
        }
        prompt_tokens = self._max_prompt_tokens() if decodes else None
        if prompt_tokens is not None:
            token_budget = min(token_budget, sum(decodes.values()) + prompt_tokens)
        self._step_start = time.perf_counter()
        batch: tuple[list[Any] | None, bool, int, int] = super().schedule_batch(token_budget, cache_budget)
        requests = batch[0] or ()
        self.scheduled = [request.state for request in requests]
        self._step_tokens = sum(request.query_length for request in requests)
        self._decode_tokens = sum(request.query_length for request in requests if request.state.request_id in decodes)
        guesses = self.speculation.guesses if self.speculation else {}
        for request in requests:
            request_id = request.state.request_id
            self.fair_queue.charge(request_id, request.query_length - len(guesses.get(request_id, ())))
        return batch

    def _max_prompt_tokens(self) -> int | None:
        each = self.step_budget.prompt_tokens() if self.step_budget else None
        if each is None:
            return None
        # Many prompts that arrive together share what a step costs, and their callers wait as well.
        begun = sum(state.status != RequestStatus.DECODING for state in self.active_requests.values())
        return int(each * (begun + len(self.waiting_requests)))

    def record_step(self) -> None:
        """Note how long the step took that was scheduled last, if one was, and charge its right guesses."""
        if self.step_budget and self.scheduled:
            prompt_tokens = self._step_tokens - self._decode_tokens
            self.step_budget.record(self._decode_tokens, prompt_tokens, time.perf_counter() - self._step_start)
        if self.speculation:
            for request_id, num_accepted in self.speculation.accepted.items():
                self.fair_queue.charge(request_id, num_accepted)
            self.speculation.accepted = {}

    def _add_guesses(self, speculation: Speculation, token_budget: int) -> None:
        """Add guesses to the tokens of the sequences, if the step only decodes, and all of them have room."""
        states = self.active_requests
        # The last step may have been scheduled, but not computed.
        for request_id in states.keys() & speculation.guesses.keys():
            states[request_id].tokens_to_process = states[request_id].tokens_to_process[:1]
        speculation.guesses = {}
        # The chunks of a prompt are not made smaller by guesses.
        if self.waiting_requests or any(state.status != RequestStatus.DECODING for state in states.values()):
            return
        speculation.guess(list(states.values()))
        growth = [(state, 1 + len(speculation.guesses.get(request_id, ()))) for request_id, state in states.items()]
        fits = sum(tokens for _, tokens in growth) <= token_budget and self._try_to_meet_safety_margin()
        if not (fits and self._has_cache(growth)):
            speculation.guesses = {}
        for request_id, guesses in speculation.guesses.items():
            states[request_id].tokens_to_process = states[request_id].tokens_to_process + guesses

    def _process_candidates(self, candidates: list[Any], *arguments: Any) -> Any:
        """Schedule the candidates: decoding sequences first, then prompts in fair order."""
        decoding = [
            state for state in candidates if state.status == RequestStatus.DECODING and not self._is_complete(state)
        ]
        prompts = {state.request_id: state for state in candidates if state.status != RequestStatus.DECODING}
        if prompts:
            lengths = [(request_id, len(state.remaining_prefill_tokens)) for request_id, state in prompts.items()]
            order = self.fair_queue.order(
                [item for item in lengths if item[0] in self.active_requests],
                [item for item in lengths if item[0] not in self.active_requests],
            )
            decoding += (prompts[request_id] for request_id in order)
        return super()._process_candidates(decoding, *arguments)

    def _is_complete(self, state: Any) -> bool:
        """Return whether the token that a running step samples is the last one of its sequence."""
        if state.request_id not in self.pending_ids or state.max_new_tokens is None:
            return False
        return bool(len(state.generated_tokens) + 1 >= state.max_new_tokens)

    def _make_room(self, token_budget: int) -> None:
        """Move sequences out of a full batch or cache, so that every caller can have one in it."""
        entering = self.fair_queue.entitled(self.waiting_requests)
        while entering and not self._has_room(entering, token_budget):
            request_id = self.fair_queue.victim(list(self.active_requests), entering)
            if request_id is None:
                # If only the cache is short, a sequence that has left would start again, and leave in the next step.
                if self.max_requests_per_batch - len(self.active_requests) >= len(entering):
                    self.block_new_requests = True
                return
            if self.settle():
                # Sequences may have ended, and the others have to leave with all of their tokens.
                self.fair_queue.begin_step(self.active_requests, self.waiting_requests)
                self._make_room(token_budget)
                return
            self._preempt(request_id)
        if entering:
            self.block_new_requests = False

    def _has_room(self, request_ids: Sequence[str], token_budget: int) -> bool:
        if self.max_requests_per_batch - len(self.active_requests) < len(request_ids):
            return False
        if not self._try_to_meet_safety_margin():
            return False
        # Those of waiting sequences, after all decoding ones.
        growth = [(state, 1) for state in self.active_requests.values() if state.status == RequestStatus.DECODING]
        for request_id in request_ids:
            state = self.waiting_requests[request_id]
            growth.append((state, min(len(state.remaining_prefill_tokens), token_budget)))
        if self._has_cache(growth):
            return True
        if not self.cache.evict_cached_blocks():
            return False
        self.cache.pool.try_to_free_sectors()
        return self._has_cache(growth)

    def _has_cache(self, growth: Sequence[tuple[Any, int]]) -> bool:
        """Return whether numbers of further tokens of sequences fit into the cache."""
        sectors = 0
        for allocator in self.cache.cache_allocators.values():
            blocks = sum(
                allocator.needs_new_blocks(state.request_id, state.current_len(), tokens) for state, tokens in growth
            )
            missing = blocks - self.cache.pool.count_free_blocks(allocator.index)
            sectors += math.ceil(max(0, missing) / allocator.blocks_per_sector)
        return bool(self.cache.pool.num_free_sectors >= sectors)

    def _preempt(self, request_id: str) -> None:
        """Return a running sequence to the queue, with its tokens; its cache stays available for prefix sharing."""
        state = self.active_requests[request_id]
        restarted = state.create_equivalent_initial_request()
        restarted.created_time = state.created_time
        # No token of a step that still runs is added to it.
        state.status = RequestStatus.FINISHED
        self.finish_request(request_id)
        self.add_waiting_request(restarted)

    def _infer_request_tokens(self, state: Any, request_ids_to_remove_from_waiting: set[str]) -> list[int]:
        if state.status == RequestStatus.PENDING and self.scorer and state.request_id in self.scorer.samplers:
            remaining: list[int] = state.remaining_prefill_tokens
            return remaining
        tokens: list[int] = super()._infer_request_tokens(state, request_ids_to_remove_from_waiting)
        return tokens

    def remove_newest(self) -> list[Any]:
        """Remove and return the newest sequence of a step that ran out of memory, and put the others back.

        They wait in front of all others, with their tokens, and keep their complete pages of the cache: a step writes
        behind them. As of `remove_failed`, if no other sequence is left. The following steps have fewer tokens, since
        other sequences would otherwise take the free place, and fail for the same reason.
        """
        running = [state for state in self.scheduled if state.request_id in self.active_requests]
        if self._step_tokens > 1:
            self._token_limit = max(len(running) - 1, self._step_tokens // 2)
            self.limited_steps = LIMITED_STEPS
        if len(running) < 2:
            return self.remove_failed()
        newest = max(running, key=lambda state: state.created_time).request_id
        others = [state.request_id for state in running if state.request_id != newest]
        for request_id in others:
            self._preempt(request_id)
        self.waiting_requests_order.rotate(len(others))
        self.scheduled = [state for state in self.scheduled if state.request_id not in self.waiting_requests]
        return self.remove_failed()

    def remove_failed(self) -> list[Any]:
        """Remove and return the sequences of a failed step, with their cache.

        If it failed before they were scheduled, these are all that run, or else all that wait: each failure removes
        some, so that an error that occurs every time does not keep the loop busy for ever.
        """
        waiting = self.waiting_requests
        failed = list(self.scheduled or self.active_requests.values() or waiting.values())
        # Waiting sequences have cache only if scheduling them failed midway.
        for request_id in {*waiting, *(state.request_id for state in failed)}:
            # Not kept for prefix sharing: nothing is known about what the step has written.
            self.cache.free_blocks(request_id, no_cache=True)
        for state in failed:
            self.active_requests.pop(state.request_id, None)
            waiting.pop(state.request_id, None)
        self.waiting_requests_order: deque[str] = deque(filter(waiting.__contains__, self.waiting_requests_order))
        self.block_new_requests = False
        return failed

    def clear_cancelled_requests(self) -> list[Any]:
        # The order in which blocks are freed decides which ones are evicted first. That of a set of strings differs
        # between processes, and with it would the prefixes that ranks share.
        self._requests_to_cancel: Any = sorted(self._requests_to_cancel)
        cancelled: list[Any] = super().clear_cancelled_requests()
        for state in cancelled:
            self.block_new_requests = False
            # Their tokens of a step that runs are skipped.
            state.status = RequestStatus.FINISHED
        self.fair_queue.retain(self.active_requests, self.waiting_requests)
        if self.scorer:
            self.scorer.retain(self.active_requests, self.waiting_requests)
        if self.speculation:
            self.speculation.retain(self.active_requests, self.waiting_requests)
        return cancelled


SCHEDULER_MAPPING[NAME] = FairScheduler
