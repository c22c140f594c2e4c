"""Fence around transformers' continuous batching, which other fences of this package use, too.

The manager schedules sequences, pages the KV cache, shares prefixes and takes the largest logit of each row. Its
internals are not a public API: `tests/contracts/test_upstream.py` tests every assumption that they make.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.logits_process import LogitsProcessorList

from predictor.engine import causal_lm, fair_scheduler, int8_kv_cache, rank_steps
from predictor.engine.causal_lm import CausalLM
from predictor.engine.executor import EngineOutput
from predictor.engine.greedy_runner import GreedyRunner
from predictor.engine.kv_cache import PAGE_TOKENS
from predictor.engine.sampler import SequenceSampler
from predictor.engine.speculation import MAX_GUESSES, Speculation
from predictor.engine.speculative_step import SpeculativeRunner, unavailable_reason
from predictor.engine.step_budget import StepBudget
from predictor.engine.step_pipeline import StepPipeline
from predictor.engine.step_sampler import StepSampler
from predictor.engine.submission import Submission
from predictor.errors import EngineStopped, OutOfMemory, StartupError
from predictor.kernels import attention, tensor_parallel, transformers_attention
from predictor.kernels.cpu.linear import LMHead
from predictor.resources import memory
from predictor.settings import Settings
from predictor.types import Caller

logger = logging.getLogger(__name__)

FOLLOW_POLL_SECONDS = 0.2
"""How often a follower checks that its step loop runs."""
OUT_OF_MEMORY = (
    "Out of memory: a step did not fit, and this request, the newest of it, was ended. Retry later. The server's "
    "operator can lower --max_num_batched_tokens, --max_num_seqs or --kv_cache_memory_fraction, or add memory."
)


_NO_LIMIT = 1000.0
"""Times the free memory that the manager's cache may take."""


class _Timed(Protocol):
    """Times of a sequence by `time.perf_counter()`."""

    created_time: float
    lifespan: tuple[float, float]
    """First scheduled, finished; negative until then."""


class _RequestState(_Timed, Protocol):
    request_id: str


class _GenerationOutput(_Timed, Protocol):
    generated_tokens: list[int]
    """All of them, cumulative."""
    error: str | None

    def is_finished(self) -> bool: ...


class BatchingManager:
    """Executor in this process, on transformers' `ContinuousBatchingManager`; its methods are those of `Executor`.

    Args:
        model: as of `Engine.from_model`, with its final attention implementation.
        settings: likewise, with `max_num_batched_tokens` of at least `max_num_seqs`.
        kv_cache_tokens: capacity of the KV cache.
        context_tokens: longest sequence whose decodes get a block table of the manager, if the attention reads those.
    """

    def __init__(self, model: CausalLM, settings: Settings, kv_cache_tokens: int, *, context_tokens: int = 0) -> None:
        self._model = model
        self._failed_step_count = 0
        self._step_sampler = StepSampler(
            model, lambda: self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        )
        self._step_timeout_seconds = settings.step_timeout_seconds
        self._enforce_eager = settings.enforce_eager
        self._speculation_mode = settings.speculation
        self._kv_cache_dtype = settings.kv_cache_dtype
        # Rows of a step have logits, for which there is memory if they are no more than sequences.
        self._speculation = Speculation(max(settings.max_num_seqs, 1 + MAX_GUESSES))
        # Before the manager selects an implementation that needs the paged cache.
        self._plain_implementation = transformers_attention.plain_implementation(model)
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=math.ceil(kv_cache_tokens / PAGE_TOKENS),
                # By its own sums, which count masks and copies of keys and values that CUDA's attention does not make.
                max_memory_percent=_NO_LIMIT if model.device.type == "cuda" else settings.kv_cache_memory_fraction,
                max_batch_tokens=settings.max_num_batched_tokens,
                max_requests_per_batch=settings.max_num_seqs,
                scheduler_type=fair_scheduler.NAME,
                # The manager's graphs contain the sampling, whose parts differ from step to step, and its asynchronous
                # mode samples a step before the host has the tokens of the last one. See `step_pipeline`.
                use_cuda_graph=False,
                use_async_batching=False,
                # The manager makes block tables, and looks on the Hub for kernels, for the package flash-attn only.
                max_blocks_per_request=0,
                auto_switch_to_flash=False,
                cpu_group_timeout=settings.step_timeout_seconds,
            ),
        )
        self._uses_block_tables = attention.uses_block_tables(model)
        if self._uses_block_tables:
            self._manager.continuous_batching_config.max_blocks_per_request = math.ceil(context_tokens / PAGE_TOKENS)
        steps = [self._step_sampler, *([rank_steps.TokenBroadcast()] if tensor_parallel.size() > 1 else [])]
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(steps))
        processors.tensors_required = len(steps)  # the list counts only processors that it has converted itself
        self._manager.logit_processor = processors
        self._manager.output_router.output_queue = _DiscardingQueue()
        self._pipeline: StepPipeline | None = None
        self._run_iteration = self._manager._generation_loop_body
        self._manager._generation_loop_body = self._run_guarded_iteration
        if tensor_parallel.rank():
            rank_steps.follow_driver(self._manager)

    @property
    def cache_tokens(self) -> int:
        processor = self._manager.batch_processor
        return processor.cache.num_blocks * PAGE_TOKENS if processor else 0

    @property
    def cache_usage(self) -> float:
        processor = self._manager.batch_processor
        if processor is None:
            return 0.0
        cache = processor.cache
        cached = sum(
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in cache.cache_allocators.values()
        )
        free = cache.compute_free_capacity(relative=False) + cached
        return max(0.0, 1.0 - float(free / (cache.num_sectors * cache.bytes_per_sector)))

    @property
    def num_running(self) -> int:
        processor = self._manager.batch_processor
        return len(processor.scheduler.active_requests) if processor else 0

    @property
    def step_count(self) -> int:
        return self._step_sampler.step_count

    @property
    def failed_step_count(self) -> int:
        return self._failed_step_count

    @property
    def speculation(self) -> Speculation:
        return self._speculation

    @property
    def is_running(self) -> bool:
        return bool(self._manager.is_running())

    @property
    def is_accepting(self) -> bool:
        return self.is_running and self._manager.background_thread_status.can_accept_new_requests() is None

    @property
    def has_pending(self) -> bool:
        processor = self._manager.batch_processor
        return processor is not None and bool(processor.has_pending_requests())

    def start(self) -> None:
        try:
            self._manager.batch_processor = int8_kv_cache.create_batch_processor(self._manager, self._kv_cache_dtype)
            if self._uses_block_tables:
                transformers_attention.read_pages(self._manager.batch_processor.cache)
            self._manager.warmup()
        except (MemoryError, ValueError, RuntimeError) as error:
            if not (isinstance(error, ValueError) or memory.is_out_of_memory(error)):
                raise
            raise StartupError(
                f"The KV cache does not fit into memory: {error}. Lower --max_num_batched_tokens, or "
                "--kv_cache_tokens, or --kv_cache_memory_fraction if that is not set."
            ) from error
        processor = self._manager.batch_processor
        processor.scheduler.scorer = self._step_sampler.scorer
        # Ranks have to schedule the same steps. Steps that overlap have no durations of their own.
        if tensor_parallel.size() == 1 and not _overlaps(self._model):
            processor.scheduler.step_budget = StepBudget()
        tensor_parallel.set_timeout(self._step_timeout_seconds, self._manager.distributed_helper.tp_group)
        if _overlaps(self._model) and processor.inputs_and_outputs.attention_mask is None:
            self._pipeline = StepPipeline(
                processor,
                self._model,
                self._run_iteration,
                self._step_sampler,
                uses_graphs=not self._enforce_eager and _is_on_one_device(self._model),
            )
        else:
            self._choose_runner(processor)
        self._manager.start()
        cache = processor.cache
        size_mib, dtype = cache.cache_tensor.nbytes / 2**20, str(cache.dtype).removeprefix("torch.")
        logger.info("KV cache of %d tokens in %s, %.0f MiB", self.cache_tokens, dtype, size_mib)

    def _choose_runner(self, processor: Any) -> None:
        lm_head = self._model.get_output_embeddings()
        packed_head = lm_head if isinstance(lm_head, LMHead) and tensor_parallel.size() == 1 else None
        if self._can_speculate(processor):
            processor.model_runner = SpeculativeRunner(processor, packed_head, self._step_sampler, self._speculation)
            processor.scheduler.speculation = self._speculation
        elif packed_head:
            processor.model_runner = GreedyRunner(processor, packed_head, self._step_sampler)

    def _can_speculate(self, processor: Any) -> bool:
        if self._speculation_mode == "none":
            return False
        if reason := unavailable_reason(self._model, processor.cache):
            level = logging.WARNING if self._speculation_mode == "prompt_lookup" else logging.INFO
            logger.log(level, "speculation: none, because %s", reason)
            return False
        logger.info("speculation: prompt lookup")
        return True

    def stop(self, timeout_seconds: float) -> None:
        self._manager.stop(block=True, timeout=timeout_seconds, hard_stop=True)
        # It and the cache refer to each other, and another model may need the memory.
        self._pipeline = None
        gc.collect()

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampler: SequenceSampler,
        *,
        max_tokens: int | None,
        end_token_ids: Collection[int],
        on_output: Callable[[EngineOutput], None],
        caller: Caller | None = None,
        priority: int = 0,
    ) -> None:
        def handle(output: _GenerationOutput) -> None:
            finished = output.is_finished()
            if finished:
                self._step_sampler.remove(request_id)
            # The text of some errors is empty.
            error = None if output.error is None else output.error or "unknown error"
            on_output(EngineOutput(output.generated_tokens, finished, error, _queue_seconds(output)))

        self._step_sampler.add(request_id, sampler)
        # Before add_request: outputs without a handler are discarded.
        self._manager.register_result_handler(request_id, handle)
        added = self._manager.add_request(
            list(prompt),
            request_id=request_id,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=list(end_token_ids),
            submission=Submission(caller, priority, len(prompt) if sampler.num_prompt_logprobs is not None else None),
        )
        if added is None:
            self._forget(request_id)
            raise EngineStopped("The server is shutting down. Retry later.")

    def cancel(self, request_id: str) -> None:
        self._manager.cancel_request(request_id)
        self._forget(request_id)

    def queue_seconds(self, request_id: str) -> float | None:
        processor = self._manager.batch_processor
        state = processor.scheduler.active_requests.get(request_id) if processor else None
        return None if state is None else _queue_seconds(state)

    def plain_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self._run_plain_pass(tensor_parallel.share(token_ids)).cpu()

    def _run_plain_pass(self, token_ids: Sequence[int]) -> torch.Tensor:
        model = self._model
        input_ids = torch.tensor([token_ids], device=model.device)
        with torch.no_grad(), transformers_attention.selected(model, self._plain_implementation):
            logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits[0]
        return logits

    def end_plain_passes(self) -> None:
        tensor_parallel.share(None)

    def follow(self) -> None:
        while (token_ids := tensor_parallel.share()) is not None:
            self._run_plain_pass(token_ids)
        while self.is_running:
            time.sleep(FOLLOW_POLL_SECONDS)

    def _run_guarded_iteration(self, processor: Any, bootstrapping: bool) -> bool:
        """Run an iteration of the step loop, and return whether the loop goes on.

        An error fails the sequences of the step, or the newest of them if memory is short, and the loop goes on. It
        ends with an error that makes the device unusable, or that no sequence causes.
        """
        processor.scheduler.scheduled = []
        try:
            run = self._pipeline.run if self._pipeline else self._run_iteration
            goes_on = bool(run(processor, bootstrapping))
            processor.scheduler.record_step()
            return goes_on
        except BaseException as error:
            # The other ranks may be in the middle of the step, where no operation of this one would match theirs.
            if tensor_parallel.size() > 1:
                rank_steps.end_follower()
                raise
            # A panic of a Rust extension is not an Exception. Signals interrupt the main thread only.
            if causal_lm.is_device_lost(self._model) or not self._recover(processor.scheduler, error):
                raise
        if self._model.device.type == "cuda":
            # The step may have failed for lack of memory; its tensors are unreferenced only here.
            torch.cuda.empty_cache()
        return True

    def _recover(self, scheduler: Any, error: BaseException) -> bool:
        """Remove and fail sequences of a failed step; return whether there were any."""
        is_out_of_memory = memory.is_out_of_memory(error)
        failed = scheduler.remove_newest() if is_out_of_memory else scheduler.remove_failed()
        if not failed:
            return False
        self._failed_step_count += 1
        request_ids = ", ".join(state.request_id for state in failed)
        logger.error("a step failed, and its sequences %s", request_ids, exc_info=error)
        if is_out_of_memory:
            self._step_sampler.rewind(scheduler.waiting_requests.values())
            for state in failed:
                self._step_sampler.fail(state.request_id, OutOfMemory(OUT_OF_MEMORY))
        self._report_failure(failed, error)
        return True

    def _report_failure(self, failed: Sequence[_RequestState], error: BaseException) -> None:
        for state in failed:
            try:
                self._manager.output_router.fail_and_deliver(state, error)
            except RuntimeError as closed:
                # The client's event loop is closed, so there is no reader.
                logger.warning("the failure of a sequence cannot be delivered: %s", closed)
                self._forget(state.request_id)

    def _forget(self, request_id: str) -> None:
        """Drop the handler of a sequence, which the manager keeps until a final output, and what we keep of it."""
        self._step_sampler.remove(request_id)
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(request_id, None)


def _overlaps(model: CausalLM) -> bool:
    """Return whether a step is prepared while another one runs.

    A CPU computes both in the same cores, and ranks would have to agree on the steps that they prepare ahead.
    """
    return model.device.type == "cuda" and tensor_parallel.size() == 1


def _is_on_one_device(model: CausalLM) -> bool:
    """Return whether a forward pass needs no copies between devices, which cannot be captured in a CUDA graph."""
    return {parameter.device for parameter in model.parameters()} == {model.device}


def _queue_seconds(state: _Timed) -> float | None:
    scheduled = state.lifespan[0]
    return max(0.0, scheduled - state.created_time) if scheduled >= 0 else None


class _DiscardingQueue:
    """The router's queue of outputs without a handler: those of cancelled sequences, which would be kept for ever."""

    def put(self, output: _GenerationOutput) -> None:
        """Discard an output."""
