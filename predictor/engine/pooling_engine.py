"""PoolingEngine: embeds and classifies the inputs of concurrent requests in batches, in one thread.

Each input is computed once, in one forward pass, so there is no KV cache. The padding of a batch is limited by
`max_num_batched_tokens`, and requests take turns: a query does not wait for all documents of another request.
"""

import asyncio
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import numpy
import torch

from predictor.engine import admission, warm_up
from predictor.engine.pooling_model import PoolingInput, PoolingModel
from predictor.errors import DeadlineExceeded, EngineStopped, GenerationFailed, OutOfMemory, RequestError
from predictor.resources import memory
from predictor.settings import Settings
from predictor.types import Caller, Pooling

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 30.0


class _Job:
    """The inputs of one request, and their rows as far as they are computed."""

    def __init__(self, inputs: Sequence[PoolingInput], caller: Caller | None) -> None:
        self.inputs = inputs
        self.caller = caller
        self.submitted = time.monotonic()
        self.queue_seconds: float | None = None
        """From the submission to the first batch with one of the inputs."""
        self.pending = sorted(range(len(inputs)), key=lambda index: len(inputs[index].token_ids))
        """Indices of inputs to compute; the last one, the longest, is next."""
        self._rows: list[Any] = [None] * len(inputs)
        self._num_missing = len(inputs)
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[NDArray[numpy.float32]] = self._loop.create_future()

    def set_row(self, index: int, row: "NDArray[numpy.float32]") -> None:
        """Store the row of an input; the last one completes the result."""
        self._rows[index] = row
        self._num_missing -= 1
        if not self._num_missing:
            self._call(self.result.set_result, numpy.stack(self._rows))

    def fail(self, error: RequestError) -> None:
        """End the request with an error."""
        self._call(self.result.set_exception, error)

    def _call(self, function: Callable[[Any], None], value: Any) -> None:
        def resolve() -> None:
            if not self.result.done():
                function(value)

        # The loop is closed if the process ends.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(resolve)


class PoolingEngine:
    """Admission, batches, deadlines and liveness around a `PoolingModel`.

    Args:
        model: returns one row for each input.
        context_tokens: maximum of tokens of one input.
        max_batch_tokens: maximum of tokens of a batch, padding included; a longer input has a batch of its own.
        max_batch_inputs: maximum number of inputs of a batch.
        capacity: maximum number of requests that run or wait; callers share it as in `admission`.
        step_timeout_seconds: a batch that takes longer counts as hanging.
    """

    def __init__(
        self,
        model: Callable[[Sequence[PoolingInput]], "NDArray[numpy.float32]"],
        *,
        context_tokens: int,
        max_batch_tokens: int,
        max_batch_inputs: int,
        capacity: int,
        step_timeout_seconds: float,
    ) -> None:
        self.context_tokens = context_tokens
        self.num_outputs = 0
        """Dimensions of an embedding, or labels of a classifier; 0 before the warm-up."""
        self.steps = 0
        """Batches since the start, without those that failed."""
        self.failed_steps = 0
        """Batches that failed since the start, with their requests, or computed again in parts for lack of memory."""
        self._model = model
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_inputs = max_batch_inputs
        self._capacity = capacity
        self._step_timeout_seconds = step_timeout_seconds
        self._jobs: set[_Job] = set()
        """Requests that have not ended; used by the event loop."""
        self._queue: deque[_Job] = deque()
        """Those with pending inputs, in the order of their turns; guarded by `_changed`."""
        self._changed = threading.Condition()
        self._batch: list[tuple[_Job, int]] = []
        self._batch_started = math.inf
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pooling", daemon=True)

    @classmethod
    def from_model(cls, model: Any, pooling: Pooling, settings: Settings, context_tokens: int) -> Self:
        """Return an engine that runs a transformers model in this process."""
        return cls(
            PoolingModel(model, pooling),
            context_tokens=context_tokens,
            max_batch_tokens=settings.max_num_batched_tokens,
            max_batch_inputs=settings.max_num_seqs,
            capacity=settings.max_num_seqs + settings.max_queued_requests,
            step_timeout_seconds=settings.step_timeout_seconds,
        )

    @property
    def running(self) -> int:
        """Inputs in the batch."""
        return len(self._batch)

    @property
    def waiting(self) -> int:
        """Inputs that wait for a batch."""
        return sum(len(job.pending) for job in list(self._jobs))

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, takes inputs and does not hang in a batch."""
        hangs = time.monotonic() - self._batch_started > self._step_timeout_seconds
        return self._thread.is_alive() and not self._stopping and not hangs

    @property
    def has_ended(self) -> bool:
        """Whether the thread has ended; `stop` cannot end one that hangs in a batch."""
        return not self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its batch, and fail all requests; blocks until it has ended or seems to hang."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_SECONDS)
        self._fail_all()

    def require_capacity(
        self, requests: int, reserved: Mapping[str | None, int] | None = None, caller: Caller | None = None
    ) -> None:
        """Check that further requests of a caller have a place, next to those `reserved` by callers' names.

        Raises:
            RequestError: as of `admission.check`.
        """
        used = Counter(job.caller.name if job.caller else None for job in self._jobs)
        admission.check(requests, used + Counter(reserved), self._capacity, caller)

    async def compute(
        self, inputs: Sequence[PoolingInput], deadline: float = math.inf, caller: Caller | None = None
    ) -> tuple["NDArray[numpy.float32]", float | None]:
        """Return one row for each input, and the seconds until the first of them was in a batch.

        Args:
            inputs: at least one, of 1 to `context_tokens` tokens each.
            deadline: by `time.monotonic()`.
            caller: for its share of the places.

        Raises:
            RequestError: there is no place, the deadline is over, the engine has stopped or a forward pass failed.
        """
        self.require_capacity(1, caller=caller)
        job = _Job(inputs, caller)
        with self._changed:
            if self._stopping:
                raise _stopped()
            self._jobs.add(job)
            self._queue.append(job)
            self._changed.notify()
        try:
            async with asyncio.timeout(None if math.isinf(deadline) else deadline - time.monotonic()):
                return await job.result, job.queue_seconds
        except TimeoutError:
            raise DeadlineExceeded("Request timed out. Send fewer inputs or raise the timeout.") from None
        finally:
            self._jobs.discard(job)
            with self._changed:
                job.pending.clear()

    async def warm_up(self, vocabulary_tokens: int, timeout_seconds: float) -> None:
        """Compute two inputs, each alone and both in one batch.

        Args:
            vocabulary_tokens: token ids are below this.
            timeout_seconds: for all of it.

        Raises:
            RequestError: a forward pass failed or timed out, or a row depends on the other one.
        """
        prompts, _ = warm_up.make_prompts(vocabulary_tokens, self.context_tokens, 2)
        inputs = [PoolingInput(prompt) for prompt in prompts]
        deadline = time.monotonic() + timeout_seconds
        alone = [(await self.compute([each], deadline))[0] for each in inputs]
        together, _ = await self.compute(inputs, deadline)
        self.num_outputs = together.shape[1]
        warm_up.check_rows(torch.tensor(numpy.concatenate(alone)), torch.tensor(together))

    async def check(self, timeout_seconds: float) -> None:
        """Compute one token, as a self-check.

        Raises:
            RequestError: the forward pass failed or timed out.
        """
        await self.compute([PoolingInput([0])], time.monotonic() + timeout_seconds)

    def _run(self) -> None:
        try:
            while self._next_batch():
                self._compute_batch()
        finally:
            # A panic of a Rust extension is not an Exception, and ends the thread.
            self._fail_all()

    def _fail_all(self) -> None:
        """Reject further requests, and fail those that wait."""
        with self._changed:
            self._stopping = True
            jobs = list(self._jobs)
        for job in jobs:
            job.fail(_stopped())

    def _next_batch(self) -> bool:
        """Wait for inputs and put them into the batch; False: the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or any(job.pending for job in self._queue))
            if self._stopping:
                return False
            self._batch = self._take_batch()
            self._batch_started = time.monotonic()
        for job, _ in self._batch:
            if job.queue_seconds is None:
                job.queue_seconds = self._batch_started - job.submitted
        return True

    def _take_batch(self) -> list[tuple[_Job, int]]:
        """Take one input of each request in turn, as many as the padded batch may have."""
        batch: list[tuple[_Job, int]] = []
        longest = 0
        while self._queue and len(batch) < self._max_batch_inputs:
            job = self._queue[0]
            if not job.pending:
                self._queue.popleft()
                continue
            longest = max(longest, len(job.inputs[job.pending[-1]].token_ids))
            if batch and longest * (len(batch) + 1) > self._max_batch_tokens:
                break
            batch.append((job, job.pending.pop()))
            self._queue.rotate(-1)
        return batch

    def _compute_batch(self) -> None:
        try:
            rows = self._model([job.inputs[index] for job, index in self._batch])
        except Exception as error:
            logger.exception("a batch of %d inputs failed", len(self._batch))
            self.failed_steps += 1
            self._fail_batch(error)
        else:
            self.steps += 1
            # Before the rows are delivered: who has one sees an engine that does not hang.
            self._batch_started = math.inf
            for (job, index), row in zip(self._batch, rows, strict=True):
                if numpy.isfinite(row).all():
                    job.set_row(index, row)
                else:
                    job.fail(GenerationFailed("The result is not a number. Start the server with --dtype float32."))
        finally:
            self._batch, self._batch_started = [], math.inf

    def _fail_batch(self, error: Exception) -> None:
        """Fail the requests of the batch; if it did not fit into memory, compute it again in smaller ones."""
        if not memory.is_out_of_memory(error):
            failure: RequestError = GenerationFailed("The forward pass failed. See the server log.")
        elif len(self._batch) > 1:
            self._max_batch_inputs = len(self._batch) // 2
            logger.warning(
                "batches have %d inputs at most from now on, for lack of memory; lower --max_num_batched_tokens or "
                "--max_num_seqs",
                self._max_batch_inputs,
            )
            self._put_back()
            return
        else:
            failure = OutOfMemory("Out of memory: an input of the request does not fit. Shorten it, or retry later.")
        for job, _ in self._batch:
            job.fail(failure)

    def _put_back(self) -> None:
        with self._changed:
            for job, index in reversed(self._batch):
                job.pending.append(index)
                if job not in self._queue:
                    self._queue.appendleft(job)


def _stopped() -> EngineStopped:
    return EngineStopped("The server stopped before the request was computed. Retry later.")
