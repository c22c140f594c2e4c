"""Fence around the inputs and outputs of transformers' continuous batching: the next step is prepared while one runs.

The manager's own asynchronous mode samples a step before the host has the tokens of the one before. Here only the
forward pass runs ahead: it is queued on the device, which inserts the tokens that it has sampled last. A step is
sampled once the host has those tokens, so that grammars, penalties and the ends of sequences are as in single steps:

    host    prepare 2 | queue pass 2 | take tokens 1 | queue sampling 2 | prepare 3 | queue pass 3 | take tokens 2 ...
    device  pass 1, sampling 1       | pass 2                           | sampling 2             | pass 3 ...
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.utils import stream_context

from predictor.engine import causal_lm
from predictor.engine.causal_lm import CausalLM
from predictor.engine.model_runner import StepRunner
from predictor.engine.step_sampler import StepSampler

logger = logging.getLogger(__name__)


class OverlappedIOs:
    """Inputs and outputs of the step that runs and of the next one, with the interface of `ContinuousBatchingIOs`.

    There are two buffers on the host. The device needs one, since its stream copies the inputs of a step after it has
    sampled the last one; so a CUDA graph of each size is enough.

    Args:
        processor: whose inputs and outputs, on the device, these are to replace.
    """

    def __init__(self, processor: Any) -> None:
        self.device_io = processor.inputs_and_outputs
        self.compute_stream = self.device_io.compute_stream
        self._next, self._last = (
            type(self.device_io)(
                cache=processor.cache,
                config=processor.config,
                continuous_batching_config=processor.cb_config,
                device=torch.device("cpu"),
                model_dtype=processor.model_dtype,
                logit_processor=processor.logit_processor,
            )
            for _ in range(2)
        )
        self.is_pending = False
        """Whether the host has not read the tokens of the last step."""
        self._copied: Any = None
        """CUDA event after the copy of these tokens."""

    @property
    def requests_in_batch(self) -> Sequence[Any]:
        """Sequences of the step that is prepared or computed."""
        requests: Sequence[Any] = self._next.requests_in_batch
        return requests

    @property
    def last_requests(self) -> Sequence[Any]:
        """Sequences of the last step that was sampled."""
        requests: Sequence[Any] = self._last.requests_in_batch
        return requests

    @property
    def pending_ids(self) -> Collection[str]:
        """Sequences of which the host has not read the newest token."""
        return self._last.req_id_to_new_token_position.keys() if self.is_pending else ()

    @property
    def output_ids(self) -> torch.Tensor:
        return self.device_io.output_ids

    def prepare_batch_tensors(self, *args: Any, **options: Any) -> None:
        self._next.prepare_batch_tensors(*args, **options)
        rows = {request_id: row for row, request_id in enumerate(self.pending_ids)}
        self._fill_padding()
        sources = [-1] * self._next.num_q_tokens
        for request_id, position in self._next.req_id_to_new_token_position.items():
            sources[position] = rows.get(request_id, -1)
        self._next.carry_over_ids[: len(sources)] = torch.tensor(sources, dtype=torch.int32)

    def get_padding(self, rows: int) -> Any:
        """Return the inputs, as of `get_model_kwargs`, of a step of decodes that has only padding."""
        io = self._next
        io.requests_in_batch, io.req_id_to_new_token_position = [], {}
        io.use_block_table, io.num_q_tokens, io.max_kv_read = True, rows, 0
        io.cumulative_seqlens_q.zero_()
        for lengths in io.cumulative_seqlens_k.values():
            lengths.zero_()
        self._fill_padding()
        return self.get_model_kwargs(use_padding=True)

    def _fill_padding(self) -> None:
        """Make sequences of one token of the rows that are padding, in a page that belongs to no sequence.

        The manager pads with sequences without tokens, whose attention a kernel leaves undefined.
        """
        io = self._next
        count = len(io.requests_in_batch)
        if not io.use_block_table or io.num_q_tokens == count:
            return
        padding = torch.arange(1, io.num_q_tokens - count + 1, dtype=torch.int32)
        for lengths in (io.cumulative_seqlens_q, *io.cumulative_seqlens_k.values()):
            lengths[count + 1 : io.num_q_tokens + 1] = lengths[count] + padding
        for allocator in io.cache.cache_allocators.values():
            page = allocator.write_trash_index // allocator.tokens_per_page
            io.block_table[allocator.index, count : io.num_q_tokens, 0] = page

    def get_model_kwargs(self, use_padding: bool = False) -> Any:
        """Copy the inputs to the device, and insert the tokens that it has sampled last."""
        self._next._transfer_inputs(self.device_io, self.compute_stream, non_blocking=True)
        with stream_context(self.compute_stream):
            count = self.device_io.num_q_tokens
            input_ids, sources = self.device_io.input_ids[:count], self.device_io.carry_over_ids[:count]
            sampled = self.device_io.output_ids[0, sources]  # of the last column where there is no source
            input_ids.copy_(torch.where(sources < 0, input_ids, sampled))
        return self.device_io.get_model_kwargs(use_padding=use_padding)

    def retrieve_device_outputs(self) -> None:
        """Queue the copy of a step's tokens to the host."""
        with stream_context(self.compute_stream):
            self._next.output_ids.copy_(self.device_io.output_ids, non_blocking=True)
        if self.compute_stream is not None:
            self._copied = self.compute_stream.record_event()
        self._last, self._next = self._next, self._last
        self.is_pending = True

    def prepare_batch_update(self) -> Any:
        """Wait for the tokens of the last step."""
        if self._copied is not None:
            self._copied.synchronize()
        self.is_pending = False
        return self._last.prepare_batch_update()

    def reset(self) -> None:
        for io in (self.device_io, self._next, self._last):
            io.reset()
        if self.compute_stream is not None:
            # They are reset on the thread's own stream.
            self.compute_stream.wait_stream(torch.cuda.current_stream(self.compute_stream.device))
        self.is_pending = False


class StepPipeline:
    """Iteration of the step loop that queues the forward pass of a step before it reads the last one's tokens.

    Some steps are not prepared ahead: those that move sequences out of a full batch or cache need their tokens.

    Args:
        processor: the manager's, which this changes.
        model: that computes the steps.
        run_iteration: the manager's iteration, which waits for sequences and ends the loop.
        sampler: of the steps.
        uses_graphs: replay the forward passes of decodes as CUDA graphs, where a block table locates their keys.
    """

    def __init__(
        self,
        processor: Any,
        model: CausalLM,
        run_iteration: Callable[[Any, bool], bool],
        sampler: StepSampler,
        *,
        uses_graphs: bool,
    ) -> None:
        self._processor = processor
        self._model = model
        self._run_iteration = run_iteration
        self._sampler = sampler
        self._scheduler = processor.scheduler
        self._scheduler.settle = self._settle
        self._io = processor.inputs_and_outputs = OverlappedIOs(processor)
        self._runner = processor.model_runner = StepRunner(processor, lambda: bool(sampler.scorer.samplers))
        if uses_graphs and processor.cache.max_decode_fast_path_length:
            self._runner.capture(model)
        # Sequences that ended with the last step are in the next one, whose tokens for them are skipped.
        processor.use_async_batching = True
        self._settle_first = False
        offloading = processor.offloading_manager
        self._offload_requests, offloading.offload_requests = offloading.offload_requests, self._offload

    def run(self, processor: Any, bootstrapping: bool) -> bool:
        """Run an iteration, as the manager's `_generation_loop_body`."""
        if bootstrapping:
            return False
        try:
            with torch.no_grad():
                return self._run_step() or bool(self._run_iteration(processor, bootstrapping))
        except BaseException:
            was_scheduled = bool(self._scheduler.scheduled)
            self._settle_after_failure()
            # The next step is prepared in the buffer from which the device may still copy this one's inputs.
            if was_scheduled and not self._scheduler.scheduled and not causal_lm.is_device_lost(self._model):
                logger.exception("a step failed whose sequences had all ended")
                return True
            raise

    def _run_step(self) -> bool:
        """Return whether there was something to compute."""
        processor = self._processor
        if self._settle_first:
            self._settle_first = False
            self._settle()
        is_prepared = processor.prepare_next_batch()
        # What waits can start when the sequences of the last step have ended.
        if not is_prepared and self._settle():
            is_prepared = processor.prepare_next_batch()
        if not is_prepared:
            return False
        inputs = self._io.get_model_kwargs(use_padding=self._runner.pad_inputs)
        logits = self._runner.forward(self._model, inputs)
        self._settle()
        self._runner.sample(logits, inputs)
        self._io.retrieve_device_outputs()
        self._scheduler.pending_ids = self._io.pending_ids
        return True

    def _settle(self) -> bool:
        """Take over the tokens of the last step; return whether that had not been done."""
        if not self._io.is_pending:
            return False
        requests = self._io.last_requests
        self._scheduler.pending_ids = ()
        try:
            self._share_prompt_blocks(requests)
            self._processor.update_batch()
        except BaseException:
            self._io.is_pending = False
            known = {state.request_id for state in self._scheduler.scheduled}
            lost = [request.state for request in requests if request.state.request_id not in known]
            self._scheduler.scheduled = [*self._scheduler.scheduled, *lost]
            raise
        for request in requests:
            if request.state.status == RequestStatus.FINISHED:
                self._sampler.remove(request.state.request_id)
        running = [state for state in self._scheduler.scheduled if state.status != RequestStatus.FINISHED]
        self._scheduler.scheduled = running
        return True

    def _share_prompt_blocks(self, requests: Sequence[Any]) -> None:
        """Register the blocks of prompts whose last chunk is scheduled; the manager registers those of others."""
        for request in requests:
            if not request.has_new_token and request.state.status == RequestStatus.DECODING:
                self._processor.cache.mark_complete_blocks(request.state, request.complete_blocks)

    def _settle_after_failure(self) -> None:
        """Take over the tokens of the step before the one that failed; if that fails, its sequences fail, too."""
        try:
            self._settle()
        except BaseException:
            logger.exception("the tokens of the step before are lost, too")

    def _offload(self) -> bool:
        """Move sequences out of a full cache, with all of their tokens; return whether to schedule again."""
        if not self._io.is_pending:
            return bool(self._offload_requests())
        if not self._scheduler.scheduled:
            return self._settle()
        # The scheduled step runs without the sequences that lack cache.
        self._settle_first = True
        return False
