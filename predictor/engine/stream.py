"""Steps of one sequence, read from the event loop."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Self

from predictor.engine.executor import EngineOutput, Executor
from predictor.engine.sampler import SequenceSampler
from predictor.errors import DeadlineExceeded, EngineStopped, GenerationFailed, RequestError
from predictor.types import Caller, FinishReason, SamplingParams, Step

logger = logging.getLogger(__name__)

LIVENESS_POLL_SECONDS = 1.0
"""How often a waiting stream checks that the step loop is alive: one that has died sends no output."""


class Stream:
    """Asynchronous iterator over one sequence's steps; ends with the sequence, or when it is closed.

    A sequence without new tokens (`max_tokens` 0) has one step without tokens. It is submitted to the executor only if
    log probabilities of its prompt are requested.

    Args, in addition to those of `Engine.submit`:
        eos_token_ids: the model's; ignored if `sampling` does so.
        is_alive: whether the engine makes progress.
        on_end: called once, when the sequence has finished or is closed.

    Raises:
        EngineStopped: the step loop has ended.
    """

    def __init__(
        self,
        executor: Executor,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        deadline: float,
        eos_token_ids: frozenset[int],
        is_alive: Callable[[], bool],
        on_end: Callable[["Stream"], None],
        caller: Caller | None = None,
    ) -> None:
        self.caller = caller
        self.submitted = time.monotonic()
        self.first_token_seconds: float | None = None
        """From the submission to the first token."""
        self.queue_seconds: float | None = None
        """From the submission to the first step that computed some of the prompt."""
        self._executor = executor
        self._sampling = sampling
        self._deadline = deadline
        self._eos_token_ids = frozenset() if sampling.ignore_eos else eos_token_ids
        self._is_alive = is_alive
        self._on_end = on_end
        end_token_ids = self._eos_token_ids | set(sampling.stop_token_ids)
        self._sampler = SequenceSampler(sampling, len(prompt), end_token_ids)
        self._outputs: asyncio.Queue[EngineOutput] = asyncio.Queue()
        self._num_read = 0
        self._ended = False
        self._id = uuid.uuid4().hex
        self._submitted = sampling.max_tokens != 0 or sampling.prompt_logprobs is not None
        if not self._submitted:
            self._outputs.put_nowait(EngineOutput([], finished=True, error=None, queue_seconds=None))
            return
        executor.submit(
            self._id,
            prompt,
            self._sampler,
            # The executor computes no prompt without a token after it.
            max_tokens=1 if sampling.max_tokens == 0 else sampling.max_tokens,
            end_token_ids=end_token_ids,
            on_output=self._outputs.put_nowait,
            caller=caller,
            priority=sampling.priority,
        )

    def __aiter__(self) -> Self:
        """Return the stream, which is its own iterator."""
        return self

    async def __anext__(self) -> Step:
        """Return the next step.

        Raises:
            DeadlineExceeded: the sequence timed out and has left the batch.
            EngineStopped: the step loop has ended.
            GenerationFailed: the step loop failed on this sequence; `OutOfMemory` if a step did not fit.
            RequestError: the request does not allow a next token.
        """
        if self._ended:
            raise StopAsyncIteration
        try:
            output = await self._next_output()
            self._record_queue_time(output.queue_seconds)
            failure = self._sampler.failure
            if isinstance(failure, RequestError):
                raise failure
            if reason := output.error or failure:
                raise self._failure(repr(reason))
        except BaseException:
            self.close()
            raise
        token_ids = [] if self._sampling.max_tokens == 0 else output.token_ids[self._num_read :]
        if self.first_token_seconds is None and token_ids:
            self.first_token_seconds = time.monotonic() - self.submitted
        logprobs = tuple(self._sampler.logprobs[self._num_read : self._num_read + len(token_ids)])
        self._num_read = len(output.token_ids)
        # Complete before the first token.
        prompt_logprobs, self._sampler.prompt_logprobs = tuple(self._sampler.prompt_logprobs), []
        if output.finished:
            self._end()
        return Step(token_ids, self._finish_reason(token_ids) if output.finished else None, logprobs, prompt_logprobs)

    def close(self) -> None:
        """Cancel the sequence if it has not ended; safe to call again."""
        if self._ended:
            return
        self._end()
        if self._submitted:
            self._record_queue_time(self._executor.queue_seconds(self._id))
            self._executor.cancel(self._id)

    def _end(self) -> None:
        self._ended = True
        self._on_end(self)

    def _record_queue_time(self, seconds: float | None) -> None:
        if self.queue_seconds is None:
            self.queue_seconds = seconds

    async def _next_output(self) -> EngineOutput:
        """Wait for an output and return the newest, which holds the tokens of all before it."""
        while True:
            if time.monotonic() >= self._deadline:
                raise DeadlineExceeded(
                    f"Request timed out after {time.monotonic() - self.submitted:.1f} s. "
                    "Reduce max_tokens or raise the timeout."
                )
            try:
                poll = time.monotonic() + LIVENESS_POLL_SECONDS
                async with asyncio.timeout(min(poll, self._deadline) - time.monotonic()):
                    output = await self._outputs.get()
                break
            except TimeoutError:
                if not self._is_alive() and self._outputs.empty():
                    raise self._failure("the step loop has ended") from None
        while not self._outputs.empty():
            output = self._outputs.get_nowait()
        return output

    def _failure(self, reason: str) -> GenerationFailed | EngineStopped:
        if self._is_alive():
            logger.error("a sequence failed: %s", reason)
            return GenerationFailed("Generation failed for this request. See the server log.")
        logger.error("the step loop has ended: %s", reason)
        return EngineStopped("The server stopped before the completion finished. Retry later.")

    def _finish_reason(self, token_ids: list[int]) -> FinishReason:
        last = token_ids[-1] if token_ids else None
        if last in self._eos_token_ids:
            return FinishReason.EOS_TOKEN
        return FinishReason.STOP_SEQUENCE if last in self._sampling.stop_token_ids else FinishReason.LENGTH
