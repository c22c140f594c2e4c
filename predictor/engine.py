"""Token ids in, token ids out: many sequences decoded together, step by step.

Owns one long-lived `ContinuousBatchingManager` of transformers, which schedules, pages the KV cache, shares
prefixes and samples; hides its sharp edges. Knows nothing of text, protocols or where the model came from.
"""

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from predictor import sampler
from predictor.errors import EngineStopped, GenerationFailed, StartupError
from predictor.generation import FinishReason, SamplingParams, Step

logger = logging.getLogger(__name__)

PAGE_TOKENS = 256
"""Tokens in one block of the KV cache: what a sequence takes at least, and what prefixes are shared by."""
DEFAULT_CACHE_TOKENS = 16384
"""KV cache where free memory cannot be asked for. The manager would take the host's, not the container's."""
STOP_TIMEOUT_SECONDS = 30.0


class Engine:
    """Continuous batching over one model.

    Args:
        model: a transformers causal language model, in evaluation mode, on its device.
        eos_token_ids: tokens that end a sequence.
        context_tokens: prompt and completion together at most, before the cache's capacity is known.
        max_running: sequences in one batch at most.
        max_batch_tokens: tokens computed in one step at most.
        kv_cache_tokens: capacity over all sequences; None: from free memory on CUDA, else 16384.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: frozenset[int],
        context_tokens: int,
        max_running: int,
        max_batch_tokens: int,
        kv_cache_tokens: int | None,
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._context_tokens = context_tokens
        if kv_cache_tokens is None and model.device.type != "cuda":
            kv_cache_tokens = DEFAULT_CACHE_TOKENS
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=None if kv_cache_tokens is None else math.ceil(kv_cache_tokens / PAGE_TOKENS),
                max_batch_tokens=max(max_batch_tokens, max_running),
                max_requests_per_batch=max_running,
                # The sampler looks at each row's parameters on the host, which a recorded graph would not do again.
                use_cuda_graph=False,
            ),
        )
        self._manager.logit_processor = sampler.processors()

    @property
    def context_tokens(self) -> int:
        """Prompt and completion of one sequence together at most; final once started."""
        return self._context_tokens

    @property
    def is_alive(self) -> bool:
        """Whether the step loop runs and takes requests."""
        refusal = self._manager.background_thread_status.can_accept_new_requests()
        return bool(self._manager.is_running()) and refusal is None

    def start(self) -> None:
        """Allocate the KV cache and start the step loop; blocks. Warms up what the device wants warmed up.

        Raises:
            StartupError: the KV cache does not fit.
        """
        try:
            self._manager.warmup()
        except (MemoryError, ValueError, torch.OutOfMemoryError) as error:
            raise StartupError(
                f"The KV cache does not fit into memory ({error}); lower --kv_cache_tokens or --max_batch_tokens."
            ) from error
        cache = self._manager.batch_processor.cache
        cache_tokens = cache.num_blocks * PAGE_TOKENS
        if cache_tokens < self._context_tokens:
            logger.warning(
                "the KV cache holds %d tokens, fewer than the model's context of %d: requests are limited to that; "
                "raise --kv_cache_tokens to allow longer ones",
                cache_tokens,
                self._context_tokens,
            )
            self._context_tokens = cache_tokens
        self._manager.start()
        logger.info("KV cache of %d tokens, %.0f MiB", cache_tokens, cache.cache_tensor.nbytes / 2**20)

    def stop(self) -> None:
        """End the step loop at the next step, running sequences or not; blocks until it has ended."""
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=STOP_TIMEOUT_SECONDS, hard_stop=True)

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[Step]:
        """Continue a prompt; the steps come as they are made. Closing the iterator frees the sequence's place.

        Args:
            prompt: token ids, at least one; with `max_tokens` within `context_tokens`.
            sampling: with no None in it but `stop` ignored: text is not the engine's concern.

        Raises:
            EngineStopped: the step loop has ended.
            GenerationFailed: the step loop failed on this sequence.
        """
        request_id = uuid.uuid4().hex
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        # Before add_request: outputs without a handler go to a shared queue that nobody reads.
        self._manager.register_result_handler(request_id, outputs.put_nowait)
        finished = False
        try:
            if not self._add(request_id, prompt, sampling):
                raise EngineStopped("The server is shutting down; ask again in a moment.")
            seen = 0
            while not finished:
                output = await self._next(outputs)
                finished = output.is_finished()
                if output.error is not None:
                    raise self._failure(output.error)
                token_ids = output.generated_tokens[seen:]  # the manager repeats what came before
                seen = len(output.generated_tokens)
                yield Step(token_ids, self._finish_reason(token_ids) if finished else None)
        finally:
            if not finished:
                self._cancel(request_id)

    async def warm_up(self) -> None:
        """Generate a few tokens, so that the first user does not pay for what torch does once.

        Raises:
            StartupError: the model cannot generate.
        """
        prompt = [min(self._eos_token_ids, default=0)]
        sampling = SamplingParams(max_tokens=4, temperature=0.0, top_p=1.0, top_k=0)
        try:
            async for _ in self.generate(prompt, sampling):
                pass
        except (GenerationFailed, EngineStopped) as error:
            raise StartupError(f"The model loaded, but cannot generate: {error}") from error

    def _add(self, request_id: str, prompt: Sequence[int], sampling: SamplingParams) -> bool:
        added = self._manager.add_request(
            list(prompt),
            request_id=request_id,
            max_new_tokens=sampling.max_tokens,
            streaming=True,
            eos_token_id=list(self._eos_token_ids),
            temperature=float(sampling.temperature or 0.0),
            top_k=sampling.top_k or 0,
            top_p=1.0 if sampling.top_p is None else float(sampling.top_p),
        )
        return added is not None

    async def _next(self, outputs: asyncio.Queue[Any]) -> Any:
        """The next output; a step loop that died between two outputs says nothing, so look now and then."""
        while True:
            try:
                return await asyncio.wait_for(outputs.get(), timeout=1.0)
            except TimeoutError:
                if not self.is_alive and outputs.empty():
                    raise self._failure("the step loop has ended") from None

    def _failure(self, reason: str) -> GenerationFailed | EngineStopped:
        if self.is_alive:
            logger.error("a sequence failed: %s", reason)
            return GenerationFailed("The model failed on this request; the server's log says why.")
        logger.error("the step loop has ended: %s", reason)
        return EngineStopped("The server cannot generate any more and will be restarted; ask again in a moment.")

    def _finish_reason(self, token_ids: list[int]) -> FinishReason:
        return FinishReason.EOS_TOKEN if token_ids and token_ids[-1] in self._eos_token_ids else FinishReason.LENGTH

    def _cancel(self, request_id: str) -> None:
        """Free the sequence's place; the manager then says nothing more, and keeps the handler unless it is taken."""
        self._manager.cancel_request(request_id)
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(request_id, None)
