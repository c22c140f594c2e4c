"""Token ids in, token ids out: continuous batching over one model.

Admits sequences, enforces deadlines and detects a step loop that is dead or stuck. The executor schedules and runs the
steps. Text, protocols and weight loading are outside of this package.

Call `submit` on an event loop, the same one for all sequences that run at a time.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Self

from predictor.engine import admission, kv_cache, warm_up
from predictor.engine.batching_manager import BatchingManager
from predictor.engine.causal_lm import CausalLM
from predictor.engine.executor import Executor
from predictor.engine.speculation import Speculation
from predictor.engine.stream import Stream
from predictor.errors import EngineStopped
from predictor.kernels import attention, past_key_values
from predictor.settings import Settings
from predictor.types import Caller, SamplingParams

logger = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 30.0


class Engine:
    """Admission, deadlines and liveness on top of an executor.

    Args:
        executor: not started yet.
        eos_token_ids: tokens that end a sequence.
        context_tokens: maximum of prompt and completion of one sequence together; a smaller KV cache lowers it.
        capacity: maximum number of sequences that run or wait; callers share it as in `admission`.
        step_timeout_seconds: a step loop that has work and makes no step for this long counts as dead.
        is_cache_rounded: whether the KV cache has fewer bits than the model computes with.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        eos_token_ids: frozenset[int],
        context_tokens: int,
        capacity: int,
        step_timeout_seconds: float = 120.0,
        is_cache_rounded: bool = False,
    ) -> None:
        self.capacity = capacity
        self.context_tokens = context_tokens
        self._executor = executor
        self._eos_token_ids = eos_token_ids
        self._step_timeout_seconds = step_timeout_seconds
        self._is_cache_rounded = is_cache_rounded
        self._streams: set[Stream] = set()
        self._stopping = False
        self._last_progress = (0, time.monotonic())

    @classmethod
    def from_model(
        cls,
        model: CausalLM,
        settings: Settings,
        *,
        eos_token_ids: frozenset[int],
        context_tokens: int,
    ) -> Self:
        """Return an engine that runs a model in this process.

        Args, in addition to the constructor's:
            model: a causal language model, in evaluation mode, on its device.
            settings: limits of the batch, the queue and the KV cache.

        Raises:
            StartupError: not even one block of KV cache fits into memory.
        """
        # Each sequence of a full batch needs a token in every step.
        batched_tokens = max(settings.max_num_batched_tokens, settings.max_num_seqs)
        settings = settings.model_copy(update={"max_num_batched_tokens": batched_tokens})
        uses_past = past_key_values.install(model)
        dense_mask = uses_past or not attention.install(model)
        kv_cache_tokens = settings.kv_cache_tokens
        if kv_cache_tokens is None:
            kv_cache_tokens = kv_cache.token_budget(
                model,
                settings,
                context_tokens=context_tokens,
                dense_mask=dense_mask,
                in_place=attention.reads_in_place(model),
            )
        return cls(
            BatchingManager(model, settings, kv_cache_tokens, context_tokens=context_tokens),
            eos_token_ids=eos_token_ids,
            context_tokens=context_tokens,
            capacity=settings.max_num_seqs + settings.max_queued_requests,
            step_timeout_seconds=settings.step_timeout_seconds,
            is_cache_rounded=settings.kv_cache_dtype != "auto",
        )

    @property
    def cache_tokens(self) -> int:
        """Capacity of the KV cache in tokens; 0 before the start."""
        return self._executor.cache_tokens

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that running sequences hold, 0..1; blocks cached for prefix sharing count as free."""
        return self._executor.cache_usage

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return self._executor.num_running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place in the batch."""
        return max(0, len(self._streams) - self.running)

    @property
    def steps(self) -> int:
        """Steps since the start, without those that failed."""
        return self._executor.step_count

    @property
    def failed_steps(self) -> int:
        """Steps that failed since the start, with their sequences, or the newest one for lack of memory."""
        return self._executor.failed_step_count

    @property
    def speculation(self) -> Speculation:
        """Counts of guessed tokens."""
        return self._executor.speculation

    @property
    def is_alive(self) -> bool:
        """Whether the step loop runs, accepts sequences and, if it has work, makes steps. Cheap enough for probes."""
        return self._executor.is_accepting and not self._is_stuck()

    @property
    def has_ended(self) -> bool:
        """Whether the step loop's thread has ended; `stop` cannot end one that hangs in a step."""
        return not self._executor.is_running

    def start(self) -> None:
        """Allocate the KV cache and start the step loop; blocks.

        Raises:
            StartupError: the KV cache does not fit.
        """
        self._executor.start()
        if self.cache_tokens < self.context_tokens:
            logger.warning(
                "the KV cache holds %d tokens, fewer than the model's context of %d, which limits requests; add "
                "memory or raise --kv_cache_tokens",
                self.cache_tokens,
                self.context_tokens,
            )
            self.context_tokens = self.cache_tokens

    def stop(self) -> None:
        """End the step loop at the next step, with all sequences; blocks until it has ended or seems to hang."""
        if self._executor.is_running and not self._stopping:
            self._stopping = True
            self._executor.stop(STOP_TIMEOUT_SECONDS)

    @property
    def sequences(self) -> Counter[str | None]:
        """Sequences that run or wait, by name of their caller."""
        return Counter(stream.caller.name if stream.caller else None for stream in self._streams)

    def require_capacity(
        self, sequences: int, reserved: Mapping[str | None, int] | None = None, caller: Caller | None = None
    ) -> None:
        """Check that `sequences` further ones of a caller have a place, next to those `reserved` by callers' names.

        Raises:
            RequestError: as of `admission.check`.
        """
        admission.check(sequences, self.sequences + Counter(reserved), self.capacity, caller)

    def submit(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        deadline: float = math.inf,
        caller: Caller | None = None,
    ) -> list[Stream]:
        """Submit several prompts, all of them or none. Each stream must be read to its end or closed.

        Args:
            prompts: at least one token id each, and sampling parameters without defaults left to fill in; `stop` is
                ignored. Prompt and `max_tokens` together are within `context_tokens`.
            deadline: by `time.monotonic()`; sequences that have not finished then fail.
            caller: shares the batch fairly with others; None without API keys.

        Raises:
            RequestError: as of `admission.check`.
            EngineStopped: the step loop has ended.
        """
        self.require_capacity(len(prompts), caller=caller)
        if not self._has_work():
            self._last_progress = (self.steps, time.monotonic())
        streams: list[Stream] = []
        try:
            for prompt, sampling in prompts:
                stream = Stream(
                    self._executor,
                    prompt,
                    sampling,
                    deadline=deadline,
                    eos_token_ids=self._eos_token_ids,
                    is_alive=lambda: self.is_alive,
                    on_end=self._streams.discard,
                    caller=caller,
                )
                self._streams.add(stream)
                streams.append(stream)
        except EngineStopped:
            for stream in streams:
                stream.close()
            raise
        return streams

    async def warm_up(self, vocabulary_tokens: int, timeout_seconds: float) -> None:
        """Generate before the first request, and compare the tokens with forward passes without a KV cache.

        Args:
            vocabulary_tokens: token ids are below this.
            timeout_seconds: for the generation.

        Raises:
            RequestError: generation failed or timed out, or the tokens are not those of the model.
        """
        prompts, max_tokens = warm_up.make_prompts(vocabulary_tokens, self.context_tokens, self.capacity)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        streams = self.submit([(prompt, sampling) for prompt in prompts], time.monotonic() + timeout_seconds)
        try:
            completions = [[token async for step in stream for token in step.token_ids] for stream in streams]
        finally:
            for stream in streams:
                stream.close()
        for prompt, completion in zip(prompts, completions, strict=True):
            logits = self._executor.plain_logits([*prompt, *completion])
            warm_up.check(logits, completion, is_cache_rounded=self._is_cache_rounded)
        self._executor.end_plain_passes()

    def follow(self) -> None:
        """On a rank other than 0, take part in rank 0's work, from the warm-up on, until its step loop ends.

        An error of a step ends the process.
        """
        self._executor.follow()

    async def check(self, timeout_seconds: float) -> None:
        """Generate a few tokens, as a self-check.

        Raises:
            RequestError: generation failed or timed out.
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
        """Return whether a step is due, also after all streams are closed and the loop has not removed them yet."""
        return bool(self._streams) or self._executor.has_pending

    def _is_stuck(self) -> bool:
        now = time.monotonic()
        step, since = self._last_progress
        if self.steps != step or not self._has_work():
            self._last_progress = (self.steps, now)
            return False
        return now - since > self._step_timeout_seconds
