"""Token ids in, token ids out: many sequences decoded together, step by step.

Owns one long-lived `ContinuousBatchingManager` of transformers, which schedules, pages the KV cache, shares
prefixes and takes the largest logit; hides its sharp edges. Says at once when there is no room, ends sequences whose
time is over or whose reader is gone, and knows when it is stuck. Knows nothing of text, protocols or where the model
came from.

`submit` is called on one event loop, the same for all sequences at a time.
"""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, Self

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from predictor.engine import kv_cache, sampler
from predictor.errors import DeadlineExceeded, EngineStopped, GenerationFailed, InvalidRequest, Overloaded, StartupError
from predictor.kernels.cpu import attention
from predictor.resources import memory
from predictor.types import FinishReason, SamplingParams, Step

logger = logging.getLogger(__name__)

PAGE_TOKENS = 256
"""Tokens in one block of the KV cache: what a sequence takes at least, and what prefixes are shared by."""
STOP_TIMEOUT_SECONDS = 30.0
SEQUENCE_TOKENS = 2048
"""Cache for each sequence of a full batch, where memory allows: more is rarely used off CUDA, where the cache is real
memory from the first second, and filling it with zeros delays the start."""
_LOOK_SECONDS = 1.0
"""How often a stream that hears nothing looks whether the step loop still runs: a dead one says nothing."""
_SCHEDULER = "kserve_llm"


class Engine:
    """Continuous batching over one model.

    Args:
        model: a transformers causal language model, in evaluation mode, on its device.
        eos_token_ids: tokens that end a sequence.
        context_tokens: prompt and completion together at most, before the cache's capacity is known.
        max_num_seqs: sequences in one batch at most.
        max_queued_requests: sequences that may wait for a place in the batch.
        max_num_batched_tokens: tokens computed in one step at most.
        kv_cache_tokens: capacity over all sequences; None: what `kv_cache_memory_fraction` gives.
        kv_cache_memory_fraction: share of the free memory that the KV cache and its working space may take.
        step_timeout_seconds: a step loop that has work and makes no step for so long counts as dead.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: frozenset[int],
        context_tokens: int,
        max_num_seqs: int,
        max_queued_requests: int,
        max_num_batched_tokens: int,
        kv_cache_tokens: int | None = None,
        kv_cache_memory_fraction: float = 0.8,
        step_timeout_seconds: float = 120.0,
    ) -> None:
        max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        self.capacity = max_num_seqs + max_queued_requests
        """Sequences that may run or wait at the same time."""
        self._context_tokens = context_tokens
        self._eos_token_ids = eos_token_ids
        self._step_timeout_seconds = step_timeout_seconds
        self._streams: set[Stream] = set()
        self._stopping = False
        self._seen_step = (0, time.monotonic())
        dense = not attention.use(model)
        if kv_cache_tokens is None and model.device.type != "cuda":
            kv_cache_tokens = _fitting_tokens(
                model, context_tokens, max_num_seqs, max_num_batched_tokens, kv_cache_memory_fraction, dense=dense
            )
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=None if kv_cache_tokens is None else math.ceil(kv_cache_tokens / PAGE_TOKENS),
                max_memory_percent=kv_cache_memory_fraction,
                max_batch_tokens=max_num_batched_tokens,
                max_requests_per_batch=max_num_seqs,
                scheduler_type=_SCHEDULER,
                # The sampler looks at each sequence on the host: a recorded graph would not do that again, and a step
                # prepared before the last one has ended would look too early.
                use_cuda_graph=False,
                use_async_batching=False,
                # Tables of blocks are for kernels of flash attention, which read the cache by themselves.
                max_blocks_per_request=None if model.device.type == "cuda" else 0,
                auto_switch_to_flash=model.device.type == "cuda",
            ),
        )
        self._manager.logit_processor = sampler.processors()

    @property
    def context_tokens(self) -> int:
        """Prompt and completion of one sequence together at most; final once started."""
        return self._context_tokens

    @property
    def cache_tokens(self) -> int:
        """Capacity of the KV cache in tokens; 0 before the start."""
        processor = self._manager.batch_processor
        return processor.cache.num_blocks * PAGE_TOKENS if processor else 0

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that running sequences hold, 0..1; what is kept for prefixes to come counts as free."""
        processor = self._manager.batch_processor
        if processor is None:
            return 0.0
        cache = processor.cache
        kept = sum(
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in cache.cache_allocators.values()
        )
        free = cache.compute_free_capacity(relative=False) + kept
        return max(0.0, 1.0 - float(free / (cache.num_sectors * cache.bytes_per_sector)))

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        processor = self._manager.batch_processor
        return len(processor.scheduler.active_requests) if processor else 0

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place in the batch."""
        return max(0, len(self._streams) - self.running)

    @property
    def steps(self) -> int:
        """Steps made since the start."""
        return getattr(self._manager, "current_batch", 0)

    @property
    def is_alive(self) -> bool:
        """Whether the step loop runs, takes requests and, while there is work, makes steps. Cheap: for probes."""
        refusal = self._manager.background_thread_status.can_accept_new_requests()
        return bool(self._manager.is_running()) and refusal is None and not self._is_stuck()

    @property
    def has_ended(self) -> bool:
        """Whether no step loop runs, not even one that `stop` could not end because it hangs in a step."""
        return not self._manager.is_running()

    def start(self) -> None:
        """Allocate the KV cache and start the step loop; blocks. Warms up what the device wants warmed up.

        Raises:
            StartupError: the KV cache does not fit.
        """
        try:
            self._manager.warmup()
        except (MemoryError, ValueError, torch.OutOfMemoryError) as error:
            raise StartupError(
                f"The KV cache does not fit into memory ({error}); lower --kv_cache_tokens or --max_num_batched_tokens."
            ) from error
        if self.cache_tokens < self._context_tokens:
            logger.warning(
                "the KV cache holds %d tokens, fewer than the model's context of %d: requests are limited to that; "
                "give the process more memory, or raise --kv_cache_tokens, to allow longer ones",
                self.cache_tokens,
                self._context_tokens,
            )
            self._context_tokens = self.cache_tokens
        self._manager.start()
        size = self._manager.batch_processor.cache.cache_tensor.nbytes
        logger.info("KV cache of %d tokens, %.0f MiB", self.cache_tokens, size / 2**20)

    def stop(self) -> None:
        """End the step loop at the next step, running sequences or not; blocks until it has ended, or seems to hang."""
        if self._manager.is_running() and not self._stopping:
            self._stopping = True
            self._manager.stop(block=True, timeout=STOP_TIMEOUT_SECONDS, hard_stop=True)

    def submit(
        self, prompts: Sequence[tuple[Sequence[int], SamplingParams]], deadline: float = math.inf
    ) -> list["Stream"]:
        """Begin to continue several prompts, all of them or none. Each stream must be read to its end or closed.

        Args:
            prompts: token ids, at least one, and sampling with nothing left open (`stop` ignored: text is not the
                engine's concern); ids and `max_tokens` together within `context_tokens`.
            deadline: by `time.monotonic()`; what is not finished then fails.

        Raises:
            InvalidRequest: so many never may.
            Overloaded: so many may not even wait now.
            EngineStopped: the step loop has ended.
        """
        if len(prompts) > self.capacity:
            raise InvalidRequest(
                f"The request asks for {len(prompts)} completions at once, and {self.capacity} may run or wait; "
                "ask for fewer."
            )
        if len(self._streams) + len(prompts) > self.capacity:
            raise Overloaded(
                f"The server is busy: {len(self._streams)} sequences run or wait, and {self.capacity} may; "
                "ask again in a moment."
            )
        if not self._has_work():
            self._seen_step = (self.steps, time.monotonic())
        streams: list[Stream] = []
        try:
            for ids, sampling in prompts:
                streams.append(Stream(self, ids, sampling, deadline))
        except EngineStopped:
            for stream in streams:
                stream.close()
            raise
        return streams

    async def check(self, timeout_seconds: float) -> None:
        """Generate a few tokens: before the first user, whom torch's first time would cost, and now and then.

        Raises:
            RequestError: the model cannot generate, or not within the time.
        """
        prompt = [min(self._eos_token_ids, default=0)]
        sampling = SamplingParams(max_tokens=4, temperature=0.0)
        [stream] = self.submit([(prompt, sampling)], time.monotonic() + timeout_seconds)
        try:
            async for _ in stream:
                pass
        finally:
            stream.close()

    def _has_work(self) -> bool:
        """Whether a step is due: also where all readers have left, and the loop has not let their sequences go."""
        processor = self._manager.batch_processor
        return bool(self._streams) or (processor is not None and processor.has_pending_requests())

    def _is_stuck(self) -> bool:
        now = time.monotonic()
        step, since = self._seen_step
        if self.steps != step or not self._has_work():
            self._seen_step = (self.steps, now)
            return False
        return now - since > self._step_timeout_seconds


class Stream:
    """One sequence's steps as they are made; ends by itself, or when it is closed."""

    def __init__(self, engine: Engine, prompt: Sequence[int], sampling: SamplingParams, deadline: float) -> None:
        self.submitted = time.monotonic()
        self.first_token_seconds: float | None = None
        """From the submission to the first token."""
        self.queue_seconds: float | None = None
        """From the submission to the first step that computed some of the prompt."""
        self._engine = engine
        self._manager = engine._manager
        self._sampling = sampling
        self._deadline = deadline
        self._eos_token_ids = frozenset() if sampling.ignore_eos else engine._eos_token_ids
        ends = self._eos_token_ids | set(sampling.stop_token_ids)
        self._chooser = sampler.SequenceSampler(sampling, len(prompt), ends)
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._seen = 0
        self._id = uuid.uuid4().hex
        # Before add_request: outputs without a handler go to a shared queue that nobody reads.
        self._manager.register_result_handler(self._id, self._outputs.put_nowait)
        self._engine._streams.add(self)
        added = self._manager.add_request(
            list(prompt),
            request_id=self._id,
            max_new_tokens=sampling.max_tokens,
            streaming=True,
            eos_token_id=list(ends),
            chooser=self._chooser,
        )
        if added is None:
            self.close()
            raise EngineStopped("The server is shutting down; ask again in a moment.")

    def __aiter__(self) -> Self:
        """The stream is its own iterator."""
        return self

    async def __anext__(self) -> Step:
        """The next step.

        Raises:
            DeadlineExceeded: the time is over; the sequence has left the batch.
            EngineStopped: the step loop has ended.
            GenerationFailed: the step loop failed on this sequence.
        """
        if self not in self._engine._streams:
            raise StopAsyncIteration
        try:
            output = await self._next()
            self._see_start(output)
            finished = output.is_finished()
            if reason := output.error or self._chooser.failure:
                raise self._failure(reason)
        except BaseException:
            self.close()
            raise
        if self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self.submitted
        token_ids = output.generated_tokens[self._seen :]  # the manager repeats what came before
        logprobs = tuple(self._chooser.logprobs[self._seen : self._seen + len(token_ids)])
        self._seen = len(output.generated_tokens)
        if finished:
            self._engine._streams.discard(self)
        return Step(token_ids, self._finish_reason(token_ids) if finished else None, logprobs)

    def close(self) -> None:
        """Free the sequence's place, if it still has one: it leaves the batch at the next step."""
        if self not in self._engine._streams:
            return
        self._engine._streams.discard(self)
        processor = self._manager.batch_processor
        if processor and (running := processor.scheduler.active_requests.get(self._id)):
            self._see_start(running)
        self._manager.cancel_request(self._id)
        # The manager says nothing more of a cancelled sequence, and keeps its handler unless it is taken.
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(self._id, None)

    def _see_start(self, state: Any) -> None:
        """Take from the manager's state, or an output with the same fields, when its first step began, if it did."""
        if self.queue_seconds is None and state.lifespan[0] >= 0:
            self.queue_seconds = max(0.0, state.lifespan[0] - state.created_time)

    async def _next(self) -> Any:
        """The newest output: each holds what those before it held."""
        while True:
            if time.monotonic() >= self._deadline:
                raise DeadlineExceeded(
                    f"The request's time is over after {time.monotonic() - self.submitted:.1f} s; "
                    "ask for fewer tokens, or allow more time."
                )
            try:
                look = time.monotonic() + _LOOK_SECONDS
                async with asyncio.timeout(min(look, self._deadline) - time.monotonic()):
                    output = await self._outputs.get()
                break
            except TimeoutError:
                if not self._engine.is_alive and self._outputs.empty():
                    raise self._failure("the step loop has ended") from None
        while not self._outputs.empty():
            output = self._outputs.get_nowait()
        return output

    def _failure(self, reason: str) -> GenerationFailed | EngineStopped:
        if self._engine.is_alive:
            logger.error("a sequence failed: %s", reason)
            return GenerationFailed("The model failed on this request; the server's log says why.")
        logger.error("the step loop has ended: %s", reason)
        return EngineStopped("The server stopped before the answer was complete; ask again in a moment.")

    def _finish_reason(self, token_ids: list[int]) -> FinishReason:
        last = token_ids[-1] if token_ids else None
        if last in self._eos_token_ids:
            return FinishReason.EOS_TOKEN
        return FinishReason.STOP_SEQUENCE if last in self._sampling.stop_token_ids else FinishReason.LENGTH


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """First in, first out, as the manager has it, and nobody waits for ever.

    Once a sequence had to leave a full cache, the manager's own lets none in until one that runs has finished, and
    where those are cancelled instead, none ever does.
    """

    def clear_cancelled_requests(self) -> list[Any]:
        cancelled: list[Any] = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled


SCHEDULER_MAPPING[_SCHEDULER] = _Scheduler


def _fitting_tokens(
    model: Any, context_tokens: int, max_num_seqs: int, max_num_batched_tokens: int, fraction: float, *, dense: bool
) -> int:
    """Capacity of the KV cache from free memory, and no more than is of use.

    Raises:
        StartupError: not even one block fits.
    """
    free_bytes = memory.available_bytes(model.device)
    fitting = kv_cache.kv_cache_tokens(
        model,
        budget_bytes=int(free_bytes * fraction),
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        context_tokens=None if dense else context_tokens,
    )
    fitting -= 2 * PAGE_TOKENS  # the manager keeps two blocks more, for padding
    if fitting < PAGE_TOKENS:
        raise StartupError(
            f"{free_bytes / 2**30:.1f} GiB of memory are free beside the weights, too few for a KV cache; give the "
            "process more, or lower --max_num_batched_tokens and --max_num_seqs."
        )
    useful = max(context_tokens, max_num_seqs * min(context_tokens, SEQUENCE_TOKENS))
    return min(fitting // PAGE_TOKENS, math.ceil(useful / PAGE_TOKENS)) * PAGE_TOKENS
