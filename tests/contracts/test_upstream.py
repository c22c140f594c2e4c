"""Assumptions of the fences about libraries' internals, one section per fence.

A test that fails here after an upgrade names the fence module that has to change.
"""

import asyncio
import dataclasses
import inspect
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httptools
import huggingface_hub
import kserve
import pytest
import torch
import transformers
import uvicorn
from huggingface_hub import utils as hub_utils
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from kserve.protocol.grpc import grpc_predict_v2_pb2
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from safetensors.torch import load_file
from starlette.applications import Starlette
from torch.nn.attention.varlen import varlen_attn
from transformers import core_model_loading
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, rename_source_key
from transformers.generation.continuous_batching import (
    cache,
    cache_allocators,
    cb_logits_processors,
    continuous_api,
    distributed,
    input_outputs,
    model_runner,
    offloading_manager,
    scheduler,
)
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.generic import is_flash_attention_requested
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from devtools import tiny_llama
from devtools.architectures import CASES
from devtools.paths import DEMO_MODEL
from predictor.engine import batching_manager, causal_lm, int8_kv_cache
from predictor.engine.batching_manager import BatchingManager
from predictor.engine.executor import EngineOutput
from predictor.engine.fair_scheduler import FairScheduler
from predictor.engine.kv_cache import PAGE_TOKENS
from predictor.engine.sampler import SequenceSampler
from predictor.engine.step_pipeline import OverlappedIOs
from predictor.engine.step_sampler import StepSampler
from predictor.engine.submission import Submission
from predictor.entrypoints import kserve_server
from predictor.errors import EngineStopped
from predictor.generation import output_notations
from predictor.generation.output_parser import OutputParser
from predictor.kernels import attention, int8_heads, past_key_values, sequence_attention, shards, transformers_attention
from predictor.kernels.cpu import experts, layer_table, paged_attention, torch_private
from predictor.kernels.cpu.linear import Int4Linear, Int8Linear
from predictor.kernels.cuda import attention as cuda_attention
from predictor.kernels.cuda import reference
from predictor.kernels.fp8 import Fp8Linear
from predictor.models import loader
from predictor.models.context_length import LENGTH_DEPENDENT
from predictor.models.fp8_quantizer import Fp8Config
from predictor.models.int4_checkpoint import PackedLinear
from predictor.models.int4_quantizer import Int4Config
from predictor.models.int8_quantizer import Int8Config
from predictor.protocols import open_inference_types
from predictor.settings import Settings
from predictor.types import Caller, ReasoningDelta, SamplingParams, TextDelta, ToolCallDelta
from snapshot_format.model_files import SINGLE
from storage_initializer.prepare import transformers_mapping
from storage_initializer.sources import hub_client
from tests.predictor.models import packed_checkpoints
from tests.predictor.servers import HANG_SECONDS, Hold

pytestmark = pytest.mark.contract


# transformers' continuous batching: predictor/engine/{batching_manager,fair_scheduler,step_sampler,rank_steps}.py


@pytest.fixture(scope="module")
def model() -> Any:
    return loader.load(DEMO_MODEL, device="cpu", dtype="float32", trust_remote_code=False).model


@contextmanager
def started(model: Any, kv_cache_tokens: int = 4 * PAGE_TOKENS, **changes: Any) -> Iterator[BatchingManager]:
    executor = BatchingManager(model, Settings(max_num_seqs=4, max_num_batched_tokens=128, **changes), kv_cache_tokens)
    executor.start()
    try:
        yield executor
    finally:
        if executor.is_running:
            executor.stop(HANG_SECONDS)


@pytest.fixture(scope="module")
def executor(model: Any) -> Iterator[BatchingManager]:
    with started(model) as running:
        yield running


def submit(
    executor: BatchingManager,
    request_id: str,
    prompt_tokens: int,
    max_tokens: int,
    on_output: Callable[[EngineOutput], None],
) -> list[int]:
    """Submit a greedy sequence that ends by length, and return its prompt."""
    seed = sum(request_id.encode())
    prompt = [5 + (seed + 7 * position) % 400 for position in range(prompt_tokens)]
    sampler = SequenceSampler(SamplingParams(temperature=0.0), prompt_tokens, ())
    executor.submit(request_id, prompt, sampler, max_tokens=max_tokens, end_token_ids=(), on_output=on_output)
    return prompt


async def finish(
    executor: BatchingManager, sizes: Sequence[tuple[int, int]], prefix: str = ""
) -> tuple[list[list[int]], list[Any]]:
    """Run sequences of (prompt tokens, new tokens), and return their prompts and lists of outputs.

    Prompts follow from the request ids, which begin with `prefix`: equal ones share cached blocks.
    """
    done: asyncio.Queue[None] = asyncio.Queue()
    outputs: list[list[EngineOutput]] = [[] for _ in sizes]

    def collect(index: int) -> Callable[[EngineOutput], None]:
        def on_output(output: EngineOutput) -> None:
            outputs[index].append(output)
            if output.finished:
                done.put_nowait(None)

        return on_output

    prompts = [submit(executor, f"{prefix}{index}", *size, collect(index)) for index, size in enumerate(sizes)]
    async with asyncio.timeout(HANG_SECONDS):
        for _ in sizes:
            await done.get()
    return prompts, outputs


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not condition():  # noqa: ASYNC110, there is no event for it
            await asyncio.sleep(0)


def idle(executor: BatchingManager) -> bool:
    return not executor.num_running and not executor.has_pending


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (continuous_api.ContinuousMixin.init_continuous_batching, "generation_config continuous_batching_config"),
        (
            continuous_api.ContinuousBatchingManager.add_request,
            "input_ids request_id max_new_tokens streaming eos_token_id",
        ),
        (continuous_api.ContinuousBatchingManager.cancel_request, "request_id"),
        (continuous_api.ContinuousBatchingManager.register_result_handler, "request_id callback"),
        (continuous_api.ContinuousBatchingManager._create_batch_processor, ""),
        (continuous_api.ContinuousBatchingManager.warmup, ""),
        (continuous_api.ContinuousBatchingManager.start, ""),
        (continuous_api.ContinuousBatchingManager.stop, "block timeout hard_stop"),
        (continuous_api.ContinuousBatchingManager.is_running, ""),
        (continuous_api.BackgroundThreadStatus.can_accept_new_requests, ""),
        (continuous_api.ContinuousBatchProcessor.has_pending_requests, ""),
        (continuous_api.ContinuousBatchingManager._generation_loop_body, "batch_processor bootstrapping"),
        (continuous_api.OutputRouter.fail_and_deliver, "state error"),
        (cache.PagedAttentionCache.compute_free_capacity, "relative"),
        (cache.PagedAttentionCache.free_blocks, "request_id no_cache"),
        (scheduler.FIFOScheduler.schedule_batch, "token_budget cache_budget"),
        (scheduler.FIFOScheduler.clear_cancelled_requests, ""),
        (
            scheduler.FIFOScheduler._process_candidates,
            "candidates token_budget cache_budget request_ids_to_remove_from_waiting",
        ),
        (scheduler.FIFOScheduler._try_to_meet_safety_margin, ""),
        (scheduler.FIFOScheduler.add_waiting_request, "state"),
        (scheduler.FIFOScheduler.finish_request, "request_id"),
        (continuous_api.RequestState.create_equivalent_initial_request, ""),
        (cache.PagedAttentionCache.evict_cached_blocks, ""),
        (cache_allocators.CacheAllocator.needs_new_blocks, "request_id past_length query_length"),
        (cache_allocators.CachePool.count_free_blocks, "index"),
        (cache_allocators.CachePool.try_to_free_sectors, ""),
        (cb_logits_processors.ContinuousBatchingLogitsProcessorList.__init__, "logits_processor"),
        (scheduler.FIFOScheduler._infer_request_tokens, "state request_ids_to_remove_from_waiting"),
        (cb_logits_processors.ContinuousBatchingLogitsProcessor.fill_defaults, "int32_tensor"),
        (cb_logits_processors.ContinuousBatchingLogitsProcessor.prepare_tensor_args, "requests_with_new_token"),
        (cb_logits_processors.ContinuousBatchingLogitsProcessor.__call__, "scores tensor_arg"),
        (cb_logits_processors.ContinuousBatchingLogitsProcessorList.__call__, "input_ids scores logits_processor_args"),
        (continuous_api.ContinuousBatchProcessor.prepare_next_batch, ""),
        (continuous_api.ContinuousBatchProcessor.update_batch, ""),
        (cache.PagedAttentionCache.mark_complete_blocks, "state complete_blocks"),
        (cache.PagedAttentionCache.count_new_complete_blocks, "state request_len"),
        (offloading_manager.OffloadingManager.offload_requests, ""),
        (
            input_outputs.ContinuousBatchingIOs.__init__,
            "cache config continuous_batching_config device model_dtype logit_processor",
        ),
        (input_outputs.ContinuousBatchingIOs._transfer_inputs, "other stream non_blocking"),
        (input_outputs.ContinuousBatchingIOs.get_model_kwargs, "use_padding"),
        (
            model_runner.ModelRunner.__init__,
            "logit_processor cb_config inputs_and_outputs cache do_sample return_logprobs",
        ),
        (model_runner.ModelRunner.maybe_pad_inputs, "num_q_tokens max_kv_read use_decode_fast_path"),
        (model_runner.ModelRunner.compute_batch, "model batch_data"),
        (model_runner.ModelRunner._sample, "scores output_ids"),
        (model_runner.ModelRunner.supports_logits_to_keep, "model"),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else "",
)
def test_batching_signature_has_parameters(function: Callable[..., Any], parameters: str) -> None:
    available = inspect.signature(function).parameters
    assert set(parameters.split()) <= set(available)
    required = {name for name, value in available.items() if value.default is value.empty} - {"self"}
    assert required <= {*parameters.split(), "logit_processor_kwargs"}


def test_batching_config_has_fields() -> None:
    fields = {field.name for field in dataclasses.fields(transformers.ContinuousBatchingConfig)}
    assert fields >= {
        "page_size",
        "num_blocks",
        "max_memory_percent",
        "max_batch_tokens",
        "max_requests_per_batch",
        "scheduler_type",
        "use_cuda_graph",
        "use_async_batching",
        "max_blocks_per_request",
        "auto_switch_to_flash",
    }


def test_batching_manager_uses_our_scheduler_and_processor(executor: BatchingManager) -> None:
    processor = executor._manager.batch_processor
    assert isinstance(processor.scheduler, FairScheduler)
    assert processor.scheduler.block_new_requests is False
    assert processor.logit_processor.logits_processor == [executor._step_sampler]
    assert processor.logit_processor.do_processing


def test_batching_request_state_keeps_its_submission_when_it_starts_again(executor: BatchingManager) -> None:
    submission = Submission(Caller("alice"), 3, 10)
    state = continuous_api.RequestState("a", [5, 6], logit_processor_kwargs={"submission": submission})
    executor._manager.logit_processor.check_kwargs(state.logit_processor_kwargs)
    assert state.create_equivalent_initial_request().logit_processor_kwargs == {"submission": submission}


def test_batching_manager_waits_in_an_event_and_delivers_by_its_router(executor: BatchingManager) -> None:
    manager = executor._manager
    assert isinstance(manager._wake_up_loop, threading.Event)
    assert set(inspect.signature(manager.output_router.deliver).parameters) == {"output"}
    assert set(inspect.signature(manager.output_router.deliver_batch).parameters) == {"outputs"}
    assert manager.distributed_helper.tp_group is None
    assert manager.continuous_batching_config.cpu_group_timeout == 120


def test_batching_cancelled_requests_are_a_set_of_the_scheduler(executor: BatchingManager) -> None:
    assert executor._manager.batch_processor.scheduler._requests_to_cancel == set()


def test_torch_timeout_of_a_group_can_be_set() -> None:
    parameters = inspect.signature(torch.distributed.distributed_c10d._set_pg_timeout).parameters
    assert list(parameters) == ["timeout", "group"]


@pytest.mark.parametrize(("fraction", "fits"), [(0.8, False), (batching_manager._NO_LIMIT, True)])
def test_batching_cache_of_a_given_size_is_checked_by_the_fraction_only(
    executor: BatchingManager, monkeypatch: pytest.MonkeyPatch, fraction: float, fits: bool
) -> None:
    config = dataclasses.replace(executor._manager.continuous_batching_config, max_memory_percent=fraction)
    monkeypatch.setattr(cache, "get_device_and_memory_breakdown", lambda: (torch.device("cuda"), 2**20, 0, 0))
    with nullcontext() if fits else pytest.raises(MemoryError):
        made = cache.PagedAttentionCache(
            executor._manager.model.config, config, "cpu", executor._manager.distributed_helper, torch.float32
        )
        assert made.num_blocks == 4


def test_batching_cache_reports_the_configured_capacity(executor: BatchingManager) -> None:
    paged = executor._manager.batch_processor.cache
    [allocator] = paged.cache_allocators.values()
    assert executor.cache_tokens == 4 * PAGE_TOKENS
    assert paged.num_sectors * paged.bytes_per_sector == paged.num_blocks * allocator.bytes_per_block
    assert paged.compute_free_capacity(relative=False) <= paged.cache_tensor.nbytes
    assert executor.cache_usage == 0.0


def test_batching_finished_prefix_blocks_stay_cached_and_count_as_free(executor: BatchingManager) -> None:
    asyncio.run(finish(executor, [(PAGE_TOKENS + 10, 2)]))
    [allocator] = executor._manager.batch_processor.cache.cache_allocators.values()
    assert len(allocator.ledger.cached_blocks) == 1
    assert executor.cache_usage == 0.0


def test_batching_outputs_are_cumulative(executor: BatchingManager) -> None:
    _, [outputs] = asyncio.run(finish(executor, [(10, 5)]))
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3, 4, 5]
    assert [output.token_ids for output in outputs] == [outputs[-1].token_ids[: index + 1] for index in range(5)]
    assert [output.finished for output in outputs] == [False] * 4 + [True]


def test_batching_times_are_of_perf_counter(executor: BatchingManager) -> None:
    created: list[tuple[float, float]] = []
    record = batching_manager._queue_seconds

    def keep(state: Any) -> float | None:
        created.append((state.created_time, state.lifespan[0]))
        return record(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching_manager, "_queue_seconds", keep)
        before = time.perf_counter()
        asyncio.run(finish(executor, [(10, 1)]))
        after = time.perf_counter()
    [(submitted, scheduled)] = created
    assert before <= submitted <= scheduled <= after
    waiting = continuous_api.RequestState(request_id="waiting", initial_tokens=[1])
    assert waiting.lifespan[0] < 0
    assert record(waiting) is None


def test_batching_rows_without_a_new_token_come_last(
    executor: BatchingManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: dict[str, list[int]] = {}
    unused_rows = 0
    call = StepSampler.__call__

    def record(step_sampler: Any, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        nonlocal unused_rows
        unused_rows += len(scores) - len(step_sampler._states)
        for state, row in zip(step_sampler._states, scores, strict=False):
            sampled.setdefault(state.request_id, []).append(int(row.argmax()))
        return call(step_sampler, scores, tensor_arg)

    monkeypatch.setattr(StepSampler, "__call__", record)
    _, outputs = asyncio.run(finish(executor, [(20, 30), (200, 3), (150, 5)]))
    assert unused_rows > 0, "a chunk of a prompt and a decode in one step"
    assert sampled == {str(index): each[-1].token_ids for index, each in enumerate(outputs)}


def test_batching_step_sequences_have_their_rows_in_order(
    executor: BatchingManager, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[tuple[str, int, int]]] = []
    call = StepSampler.__call__

    def record(step_sampler: Any, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        sequences = executor._manager.batch_processor.inputs_and_outputs.requests_in_batch
        steps.append([(one.state.request_id, one.state.position_offset, one.query_length) for one in sequences])
        return call(step_sampler, scores, tensor_arg)

    monkeypatch.setattr(StepSampler, "__call__", record)
    hold = Hold()
    hold.close()
    handle = model.register_forward_pre_hook(hold)

    async def run() -> None:
        submit(executor, "first", 1, 1, lambda _: None)
        await asyncio.to_thread(hold.blocked.wait, HANG_SECONDS)
        # Both are queued while a step is blocked, so that the next one has both.
        running = asyncio.create_task(finish(executor, [(100, 2), (60, 1)], prefix="rows "))
        await asyncio.sleep(0)
        hold.open()
        await running

    asyncio.run(run())
    handle.remove()
    # A step has 128 rows; the offset is that after the step.
    assert steps[1] == [("rows 0", 100, 100), ("rows 1", 28, 28)]
    assert steps[2] == [("rows 0", 101, 1), ("rows 1", 60, 32)]


def test_batching_processor_is_called_once_per_step(executor: BatchingManager) -> None:
    before = executor.step_count
    asyncio.run(finish(executor, [(128 + 128 + 3, 4)], prefix="steps"))
    assert executor.step_count - before == 3 + 3, "three chunks, the last with the first token, and three decodes"


def test_batching_processor_uses_known_parts_of_inputs_and_outputs() -> None:
    used = re.findall(r"inputs_and_outputs\.(\w+)", inspect.getsource(continuous_api.ContinuousBatchProcessor))
    known = "compute_stream get_model_kwargs prepare_batch_tensors prepare_batch_update reset retrieve_device_outputs"
    assert set(used) == set(known.split()), "step_pipeline.OverlappedIOs replaces them"
    assert set(known.split()) - {"compute_stream"} <= set(dir(OverlappedIOs))


def test_batching_unused_slot_begins_a_page_of_no_sequence(executor: BatchingManager) -> None:
    paged = executor._manager.batch_processor.cache
    [allocator] = paged.cache_allocators.values()
    assert allocator.write_trash_index % allocator.tokens_per_page == 0
    block, sector = allocator.write_trash_index // allocator.block_physical_stride, paged.pool.num_reserved_sectors
    assert block < sector * allocator.blocks_per_sector


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (torch.cuda.graph, {"cuda_graph", "pool", "stream", "capture_error_mode"}),
        (torch.cuda.Stream.record_event, {"event"}),
    ],
)
def test_torch_captures_graphs_on_a_given_stream(function: Callable[..., Any], parameters: set[str]) -> None:
    assert set(inspect.signature(function).parameters) >= parameters
    assert callable(torch.cuda.graph_pool_handle)
    generator = torch.Generator().manual_seed(1)
    state, expected = generator.clone_state(), torch.rand(2, generator=generator)
    assert {"replay", "capture_begin", "capture_end"} <= set(dir(torch.cuda.CUDAGraph))
    assert callable(generator.graphsafe_set_state)
    assert torch.equal(torch.rand(2, generator=state), expected)


def test_batching_new_tokens_are_in_the_order_of_their_positions(
    executor: BatchingManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[tuple[list[str], list[str], int]] = []
    update = input_outputs.ContinuousBatchingIOs.prepare_batch_update

    def record(io: Any) -> Any:
        requests, tokens, logprobs = update(io)
        ids = [request.state.request_id for request in requests if request.has_new_token]
        orders.append((ids, list(io.req_id_to_new_token_position), len(tokens)))
        return requests, tokens, logprobs

    monkeypatch.setattr(input_outputs.ContinuousBatchingIOs, "prepare_batch_update", record)
    asyncio.run(finish(executor, [(20, 30), (200, 3), (150, 5)], prefix="order "))
    assert len(orders) >= 30
    for ids, positions, tokens in orders:
        assert ids == positions
        assert tokens >= len(ids)


def test_batching_decode_of_several_tokens_has_room_and_can_end_before_them(executor: BatchingManager) -> None:
    processor = executor._manager.batch_processor
    state = continuous_api.RequestState("guessed", [5, 6, 7], max_new_tokens=9, eos_token_id=[2])
    assert state._eos_token_ids == {2}
    [allocator] = processor.cache.cache_allocators.values()
    assert isinstance(allocator, cache_allocators.FullAttentionCacheAllocator)
    state.status = continuous_api.RequestStatus.DECODING
    state.generated_tokens, state.tokens_to_process, state.remaining_prefill_tokens = [8], [8, 9, 10, 11], []
    state.position_offset = 3
    try:
        [request], _, _, num_q_tokens, _ = processor.scheduler._process_candidates([state], 16, 1024, set())
        assert (num_q_tokens, request.query_length, request.has_new_token) == (4, 4, True)
        processor.inputs_and_outputs.prepare_batch_tensors(
            [request],
            processor.logit_processor,
            use_decode_fast_path=False,
            num_q_tokens=4,
            max_kv_read=3,
            use_padding=False,
        )
        assert processor.inputs_and_outputs.req_id_to_new_token_position == {"guessed": 3}
        assert state.position_offset == 7
        # Two tokens of four are in the sequence. The blocks are those of the tokens before `position_offset`.
        state.position_offset = PAGE_TOKENS - 2
        assert processor.cache.count_new_complete_blocks(state, 2) == {allocator.layer_type: 1}
        assert processor.cache.count_new_complete_blocks(state, 1) == {}
        assert not state.update_and_check_completion(9, None)
        assert state.tokens_to_process == [9]
        assert state.generated_tokens == [8, 9]
    finally:
        processor.scheduler.finish_request("guessed")


def test_batching_handler_is_kept_until_a_final_output(executor: BatchingManager) -> None:
    handlers = executor._manager.output_router.result_handlers

    async def cancel() -> int:
        outputs: list[EngineOutput] = []
        submit(executor, "cancelled", 10, 900, outputs.append)
        await until(lambda: len(outputs) >= 2)
        assert set(handlers) == {"cancelled"}
        executor.cancel("cancelled")
        count = len(outputs)
        await until(lambda: idle(executor))
        await asyncio.sleep(0)
        return len([output for output in outputs[count:] if output.finished])

    assert asyncio.run(cancel()) == 0, "a cancelled sequence has no final output"
    asyncio.run(finish(executor, [(10, 1)]))
    assert (handlers, executor._step_sampler.samplers, executor.cache_usage) == ({}, {}, 0.0)


def test_batching_outputs_without_a_handler_are_not_kept(executor: BatchingManager) -> None:
    router = executor._manager.output_router
    output = continuous_api.GenerationOutput(request_id="cancelled")
    kept = sys.getrefcount(output)
    router.deliver(output)
    router.deliver_batch([output])
    assert sys.getrefcount(output) == kept


def test_batching_sequence_that_leaves_a_full_cache_keeps_its_id_and_tokens(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: dict[str, dict[int, Any]] = {}
    tokens: dict[str, list[list[int]]] = {}
    call = StepSampler.__call__

    def record(step_sampler: Any, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        for state in step_sampler._states:
            states.setdefault(state.request_id, {})[id(state)] = state
            tokens.setdefault(state.request_id, []).append(state.initial_tokens + state.generated_tokens)
        lengths = [len(state.initial_tokens + state.generated_tokens) for state in step_sampler._states]
        assert [state.position_offset for state in step_sampler._states] == lengths
        return call(step_sampler, scores, tensor_arg)

    monkeypatch.setattr(StepSampler, "__call__", record)
    with started(model, 2 * PAGE_TOKENS) as small:
        prompts, outputs = asyncio.run(finish(small, [(240, 40), (230, 40)]))
    assert max(len(copies) for copies in states.values()) > 1, "a sequence left the full cache and started again"
    for index, (prompt, each) in enumerate(zip(prompts, outputs, strict=True)):
        expected = [prompt + each[-1].token_ids[:count] for count in range(40)]
        assert tokens[str(index)] == expected
        assert len(each[-1].token_ids) == 40


def test_batching_preempted_sequence_waits_with_its_id_time_and_tokens(executor: BatchingManager) -> None:
    """Called between two steps, as by `schedule_batch`; complete pages are shared when it starts again."""
    queue = executor._manager.batch_processor.scheduler
    schedule = queue.schedule_batch
    preempted: list[Any] = []

    def schedule_after_preempting(*budgets: int) -> Any:
        state = queue.active_requests.get("preempted")
        if not preempted and state is not None and len(state.generated_tokens) == 3:
            queue._preempt("preempted")
            [waiting] = queue.waiting_requests.values()
            preempted.append((waiting.request_id, waiting.created_time == state.created_time, waiting.initial_tokens))
            batch = schedule(*budgets)
            preempted.append(batch[0][0].query_length)
            return batch
        return schedule(*budgets)

    async def run() -> tuple[list[int], list[EngineOutput]]:
        outputs: list[EngineOutput] = []
        prompt = submit(executor, "preempted", PAGE_TOKENS + 10, 8, outputs.append)
        await until(lambda: bool(outputs) and outputs[-1].finished)
        return prompt, outputs

    queue.schedule_batch = schedule_after_preempting
    try:
        prompt, outputs = asyncio.run(run())
    finally:
        del queue.schedule_batch
    generated = outputs[-1].token_ids
    assert len(generated) == 8
    assert preempted == [("preempted", True, prompt + generated[:3]), 13]


def test_batching_scheduler_admits_again_after_a_cancellation(model: Any) -> None:
    async def cancel_running(small: BatchingManager) -> None:
        outputs: dict[str, list[EngineOutput]] = {name: [] for name in "abc"}
        for name, received in outputs.items():
            submit(small, name, 500, 40, received.append)
        queue = small._manager.batch_processor.scheduler
        await until(lambda: queue.block_new_requests)
        running = set(queue.active_requests)
        for name in running:
            small.cancel(name)
        waiting = set(outputs) - running
        assert waiting
        await until(lambda: all(outputs[name] and outputs[name][-1].finished for name in waiting))
        assert all(len(outputs[name][-1].token_ids) == 40 for name in waiting)

    with started(model) as small:
        asyncio.run(cancel_running(small))


def test_batching_failed_step_frees_its_blocks_and_shares_none(executor: BatchingManager, model: Any) -> None:
    def fail_last_chunk(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        del args
        if kwargs["input_ids"].shape[1] < 128:
            raise RuntimeError("no memory")

    processor = executor._manager.batch_processor
    [allocator] = processor.cache.cache_allocators.values()
    processor.cache.evict_cached_blocks()
    handle = model.register_forward_pre_hook(fail_last_chunk, with_kwargs=True)
    steps = executor.step_count
    try:
        _, [[output]] = asyncio.run(finish(executor, [(PAGE_TOKENS + 10, 5)]))
    finally:
        handle.remove()
    assert (output.error, output.finished, output.token_ids) == ("no memory", True, [])
    assert executor.step_count - steps == 2, "chunks that complete a page"
    ledger = allocator.ledger
    assert (allocator.block_table, ledger.block_to_hash, ledger.hash_to_block, ledger.cached_blocks) == ({}, {}, {}, {})
    assert processor.scheduler.waiting_requests_order == deque()
    assert executor.is_accepting


def test_batching_loop_ends_with_the_error_of_an_iteration(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(causal_lm, "is_device_lost", lambda _: True)

    with started(model) as dying:
        handle = model.register_forward_pre_hook(fail)
        try:
            _, [[output]] = asyncio.run(finish(dying, [(10, 5)]))
        finally:
            handle.remove()
        assert output.error == "the device is gone"
        assert dying._manager.background_thread_status.can_accept_new_requests() is not None
        assert not dying.is_accepting
        with pytest.raises(EngineStopped):
            asyncio.run(finish(dying, [(10, 5)]))
        assert (dying._step_sampler.samplers, dying._manager.output_router.result_handlers) == ({}, {})


# transformers' plans of tensor parallelism: predictor/kernels/shards.py


def test_parallel_plans_have_the_styles_that_our_kernels_know() -> None:
    assert set(shards._DIVISIONS) <= set(ALL_PARALLEL_STYLES)


@pytest.mark.parametrize(
    ("name", "divides_heads", "in_cache"),
    [("llama", True, True), ("qwen3", True, True), ("phi3", False, False), ("gpt_neox", False, False)],
)
def test_parallel_plan_of_the_config_says_which_heads_the_cache_has(
    name: str, divides_heads: bool, in_cache: bool
) -> None:
    config = CASES[name].config()
    assert shards.divides_heads(config) is divides_heads
    plan = {f"model.{module}": style for module, style in config.base_model_tp_plan.items()}
    assert distributed.DistributedHelper(None, None, plan).are_kv_heads_tp_ed() is in_cache


# transformers' quantizers: predictor/models/{int4_checkpoint,linear}_quantizer.py


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (get_module_from_name, "module tensor_name"),
        (should_convert_module, "full_name patterns"),
        (HfQuantizer.get_modules_to_not_convert, "model skip_modules keep_in_fp32_modules add_default_skips"),
        (HfQuantizer.param_needs_quantization, "self model param_name kwargs"),
        (HfQuantizer._process_model_before_weight_loading, "self model kwargs"),
        (HfQuantizer.update_parallel_plan, "self model plan"),
        (HfQuantizer.get_quantize_ops, "self"),
        (ConversionOps.convert, "self input_dict source_patterns target_patterns kwargs"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_quantizer_hook_has_parameters(function: Callable[..., Any], parameters: str) -> None:
    assert list(inspect.signature(function).parameters) == parameters.split()


def test_quantizer_model_names_modules_kept_in_float32(model: Any) -> None:
    assert model._keep_in_fp32_modules is None or isinstance(model._keep_in_fp32_modules, (list, set))


@pytest.mark.parametrize(
    ("pattern", "is_skipped"),
    [
        ("down_proj", True),
        ("proj", True),
        ("model.layers.11", True),
        ("model.layers.*", True),
        ("model.layers.1", False),
        ("layers.1", False),
    ],
)
def test_quantizer_skip_pattern_matches_prefix_regex_or_suffix(pattern: str, is_skipped: bool) -> None:
    assert should_convert_module("model.layers.11.mlp.down_proj", [pattern]) is not is_skipped


def test_quantizer_default_skips_are_the_output_layer(model: Any) -> None:
    assert "lm_head" in HfQuantizer.get_modules_to_not_convert(model, ["o_proj"], None, add_default_skips=True)
    assert HfQuantizer.get_modules_to_not_convert(model, ["o_proj"], None) == ["o_proj"]


def test_quantizer_model_has_a_plan_before_its_layers_are_replaced(model: Any) -> None:
    assert model.tp_plan["model.layers.*.mlp.down_proj"] == "rowwise"


def test_quantizer_converts_each_weight_while_it_loads() -> None:
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, quantization_config=Int8Config()
    )
    layer = quantized.model.layers[0].mlp.down_proj
    assert isinstance(layer, Int8Linear)
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.int8, torch.float32)
    original = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    weight = original.model.layers[0].mlp.down_proj.weight
    assert (layer.weight * layer.scale[:, None] - weight).abs().max() <= layer.scale.max() / 2 + 1e-6
    assert type(quantized.lm_head) is torch.nn.Linear


def test_quantizer_may_give_weights_another_shape() -> None:
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, quantization_config=Int4Config()
    )
    layer = quantized.model.layers[0].mlp.down_proj
    assert isinstance(layer, Int4Linear)
    assert (layer.weight.dtype, layer.weight.shape) == (torch.uint8, (layer.out_features, layer.in_features // 2))
    assert layer.scale.shape == (layer.out_features, layer.in_features // 32)
    assert layer.scale.abs().min() > 0


def test_quantizer_keeps_weights_in_fp8_while_it_loads() -> None:
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.bfloat16, quantization_config=Fp8Config()
    )
    layer = quantized.model.layers[0].mlp.down_proj
    assert isinstance(layer, Fp8Linear)
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert quantized.dtype == torch.bfloat16


def test_quantizer_of_a_checkpoint_gets_its_files_before_and_its_tensors_unchanged(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    directory = packed_checkpoints.write(
        tmp_path,
        config | {"quant_method": "kserve_llm_gptq"},
        lambda weight: packed_checkpoints.quantize(weight, 64, symmetric=True),
        packed_checkpoints.gptq_tensors,
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    layer = loaded.model.layers[0].mlp.down_proj
    assert isinstance(layer, PackedLinear)
    stored = load_file(directory / SINGLE)
    for name in ("qweight", "qzeros", "g_idx"):
        assert torch.equal(getattr(layer, name), stored[f"model.layers.0.mlp.down_proj.{name}"])
    # Not through bfloat16.
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.scales, stored["model.layers.0.mlp.down_proj.scales"].float())


def test_quantizers_of_gptq_and_awq_need_packages_that_we_do_not_have() -> None:
    for method in ("gptq", "awq"):
        config = transformers.AutoConfig.from_pretrained(DEMO_MODEL)
        config.quantization_config = {"quant_method": method, "bits": 4, "group_size": 64}
        with pytest.raises(ImportError, match=r"requires (optimum|gptqmodel)"):
            transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, config=config)


def test_loading_info_names_missing_and_mismatched_weights(tmp_path: Path) -> None:
    for file in DEMO_MODEL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = transformers.AutoConfig.from_pretrained(DEMO_MODEL, num_hidden_layers=5, intermediate_size=64)
    _, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert any(name.startswith("model.layers.4.") for name in loading_info["missing_keys"])
    assert "model.layers.0.mlp.up_proj.weight" in {name for name, *_ in loading_info["mismatched_keys"]}


# transformers' progress bar of the weights: predictor/models/loader.py


def test_transformers_loads_weights_with_a_progress_bar_over_a_mapping() -> None:
    assert f'tqdm(param_name_to_load.items(), desc="{loader.WEIGHTS_BAR}")' in inspect.getsource(core_model_loading)


# KServe and uvicorn: predictor/entrypoints/kserve_server.py


class EchoModel(kserve.Model):  # type: ignore[misc]
    """Returns its payload."""

    async def predict(self, payload: Any, headers: Any = None) -> Any:
        return payload, headers


def test_kserve_parses_argv_when_it_is_imported() -> None:
    command = [sys.executable, "-c", "import kserve", "--http_port", "not-a-port"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, "predictor/__main__.py no longer has to hide sys.argv"


def test_kserve_model_call_returns_the_response_and_headers() -> None:
    request = kserve.InferRequest("echo", [], request_id="7")
    response = asyncio.run(kserve_server.infer(EchoModel("echo"), request, {"a": "b"}))
    assert response == (request, {"a": "b"})


def test_kserve_repository_unload_stops_the_model() -> None:
    repository, model = kserve.ModelRepository(), EchoModel("echo")
    repository.update(model)
    model.ready = True
    extension = ModelRepositoryExtension(repository)
    asyncio.run(extension.load("echo"))
    asyncio.run(extension.unload("echo"))
    assert (model.ready, repository.get_models()) == (False, {})


def test_uvicorn_serve_installs_signal_handlers_in_capture_signals() -> None:
    assert "self.capture_signals()" in inspect.getsource(uvicorn.Server.serve)
    assert list(inspect.signature(uvicorn.Server.serve).parameters) == ["self", "sockets"]


def test_uvicorn_server_stops_when_should_exit_is_set() -> None:
    async def serve() -> None:
        server = kserve_server.HTTPServer(Starlette(), 1)
        with kserve_server.bind(0) as port:
            serving = asyncio.create_task(server.serve(sockets=[port]))
            while not server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            server.should_exit = True
            await asyncio.wait_for(serving, HANG_SECONDS)

    asyncio.run(serve())


def test_uvicorn_server_state_has_the_connections_which_shutdown_closes() -> None:
    assert "connection.shutdown()" in inspect.getsource(uvicorn.Server.shutdown)
    assert ServerState().connections == set()
    closed: list[bool] = []

    async def connect() -> HttpToolsProtocol:
        return HttpToolsProtocol(uvicorn.Config(Starlette(), log_config=None), ServerState(), {})

    protocol = asyncio.run(connect())
    protocol.transport = SimpleNamespace(close=lambda: closed.append(True))  # type: ignore[assignment]
    protocol.shutdown()
    assert closed == [True]
    protocol.cycle = SimpleNamespace(response_complete=False, keep_alive=True)  # type: ignore[assignment]
    protocol.shutdown()
    assert (closed, protocol.cycle.keep_alive) == ([True], False)


def test_httptools_skips_the_body_of_a_request_with_upgrade_header() -> None:
    parsed: list[str] = []

    class Callbacks:
        def on_headers_complete(self) -> None:
            parsed.append("headers")

        def on_body(self, body: bytes) -> None:
            parsed.append(body.decode())

        def on_message_complete(self) -> None:
            parsed.append("end")

    head = b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\n\r\n"
    parser = httptools.HttpRequestParser(Callbacks())
    with pytest.raises(httptools.HttpParserUpgrade) as raised:
        parser.feed_data(head + b"body")
    assert raised.value.args == (len(head),)
    assert parsed == ["headers", "end"], "kserve_server.HTTPProtocol may no longer be needed"
    assert (parser.should_upgrade(), parser.get_method(), parser.get_http_version()) == (True, b"POST", "1.1")


def test_uvicorn_protocol_has_the_parser_url_and_headers_of_a_request() -> None:
    async def receive_head() -> HttpToolsProtocol:
        protocol = HttpToolsProtocol(uvicorn.Config(Starlette(), log_config=None), ServerState(), {})
        protocol.on_message_begin()
        protocol.on_url(b"/a%20b?c=d")
        protocol.on_header(b"X-Mine", b"1")
        return protocol

    protocol = asyncio.run(receive_head())
    assert isinstance(protocol.parser, httptools.HttpRequestParser)
    assert (protocol.url, protocol.headers) == (b"/a%20b?c=d", [(b"x-mine", b"1")])
    assert "set_dangerous_leniencies(lenient_data_after_close=True)" in inspect.getsource(HttpToolsProtocol)


# transformers' response templates: predictor/generation/output_notations.py


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
XML_ARGUMENTS = "<parameter=a>\n1\n</parameter>\n<parameter=b>\nx\ny\n</parameter>"
XML_CALL = f"<tool_call>\n<function=add>\n{XML_ARGUMENTS}\n</function>\n</tool_call>"
TOOL = {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}}


@pytest.mark.parametrize(
    ("model_type", "notations", "prompt", "output"),
    [
        ("qwen3", ("hermes", "think"), "", f"<think>\nHm.\n\nSo.\n</think>\n\nOK.\n\n{CALL}\n{CALL}"),
        ("qwen3", ("hermes", "think"), "<think>\n", "Hm.\n</think>\n\nOK.\n"),
        ("qwen3", ("hermes", "think"), "<think>\n\n</think>\n\n", " OK. \n"),
        ("qwen3_5", ("qwen3_coder", "think"), "<think>\n", f"Hm.\n</think>\n\nOK.\n\n{XML_CALL}\n{XML_CALL}"),
        (
            "gemma4",
            ("gemma4", "gemma4"),
            "",
            '<|channel>thought\nHm.\n<channel|>OK.<|tool_call>call:add{a:1,b:<|"|>x, {y}<|"|>}<tool_call|>',
        ),
    ],
)
def test_response_template_of_transformers_gives_what_our_notation_gives(
    model_type: str, notations: tuple[str, str], prompt: str, output: str
) -> None:
    template = next(value for types, value in _RESPONSE_TEMPLATE_FALLBACKS.items() if model_type in types)
    anchor = template["start_anchor"]
    prefix = (anchor if isinstance(anchor, str) else anchor[0]) + prompt
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    message = tokenizer.parse_response(output, template, prefix=prefix, tools=[TOOL])
    output_format, _ = output_notations.choose(tokenizer, *notations)
    parser = OutputParser(output_format, prefix, [TOOL])
    deltas = [*parser.feed(output), *parser.finish()]
    calls = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == message["content"]
    thought = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    assert thought == message.get("reasoning_content", "")
    functions = [call["function"] for call in message.get("tool_calls", [])]
    assert [call.name for call in calls[::2]] == [function["name"] for function in functions]
    assert [json.loads(call.arguments) for call in calls[1::2]] == [function["arguments"] for function in functions]


# KServe's tensor helpers: predictor/protocols/open_inference_types.py


def test_requested_output_has_its_name_and_parameters() -> None:
    output = open_inference_types.requested_output("text_output", {"binary_data": True})
    assert (output.name, output.parameters) == ("text_output", {"binary_data": True})
    request = kserve.InferRequest("m", [], request_outputs=[output])
    assert request.request_outputs == [output]


@pytest.mark.parametrize("elements", [[], [b""], [b"one", "é".encode()]])
def test_bytes_tensor_has_the_length_before_each_element(elements: list[bytes]) -> None:
    encoded = open_inference_types.encode_bytes_tensor(elements)
    assert encoded == b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    assert open_inference_types.decode_bytes_tensor(encoded) == elements


def test_truncated_bytes_tensor_raises_value_error() -> None:
    with pytest.raises(ValueError, match="requires"):
        open_inference_types.decode_bytes_tensor(b"\5\0")
    with pytest.raises(ValueError, match="requires"):
        open_inference_types.decode_bytes_tensor(b"\5\0\0\0one")


def test_grpc_parameters_are_plain_values() -> None:
    parameters = grpc_predict_v2_pb2.ModelInferRequest().parameters
    parameters["max_tokens"].int64_param = 3
    parameters["stop"].string_param = "a"
    parameters["ignore_eos"].bool_param = True
    decoded = open_inference_types.decode_grpc_parameters(parameters)
    assert decoded == {"max_tokens": 3, "stop": "a", "ignore_eos": True}


# transformers' attention and decoder layers: predictor/kernels/transformers_attention.py


def test_attention_interface_has_our_implementations() -> None:
    parameters = inspect.signature(cache.PagedAttentionCache.update).parameters
    assert list(parameters)[1:4] == ["key_states", "value_states", "layer_idx"]
    assert len(parameters) == 5
    assert ALL_ATTENTION_FUNCTIONS[transformers_attention.SEQUENCE] is sequence_attention.attend
    assert ALL_ATTENTION_FUNCTIONS[transformers_attention.VARLEN] is cuda_attention.attend


@pytest.mark.parametrize("name", [transformers_attention.SEQUENCE, transformers_attention.VARLEN])
def test_names_of_attention_mean_no_mask_and_no_package(name: str) -> None:
    assert is_flash_attention_requested(requested_attention_implementation=name)
    assert not is_flash_attention_requested(requested_attention_implementation=name, version=[2, 3])


@pytest.mark.parametrize("name", [transformers_attention.SEQUENCE, transformers_attention.VARLEN])
@pytest.mark.parametrize("create_mask", [create_causal_mask, create_sliding_window_causal_mask])
def test_no_mask_is_made_and_no_position_read_from_the_device(create_mask: Callable[..., Any], name: str) -> None:
    """Values on the device meta cannot be read."""
    config = transformers.MistralConfig(attn_implementation=name, sliding_window=2)
    positions = torch.zeros(1, 3, dtype=torch.int64, device="meta")
    inputs = {"inputs_embeds": torch.zeros(1, 3, 8, device="meta"), "position_ids": positions}
    assert create_mask(config, **inputs, attention_mask=None, past_key_values=None) is None


@pytest.mark.parametrize("allocator", ["FullAttentionCacheAllocator", "SlidingAttentionCacheAllocator"])
def test_allocator_updates_one_layer_by_slots(allocator: str) -> None:
    update = getattr(cache_allocators, allocator).update
    names = ["self", "key_states", "value_states", "layer_idx", "read_index", "write_index"]
    assert list(inspect.signature(update).parameters) == names


def test_sliding_layers_have_no_block_table() -> None:
    assert cache_allocators.FullAttentionCacheAllocator.supports_block_table
    assert not cache_allocators.SlidingAttentionCacheAllocator.supports_block_table


def test_manager_makes_an_int8_cache_of_heads_as_long_as_their_bytes(model: Any) -> None:
    with started(model, kv_cache_dtype="int8") as int8:
        paged = int8._manager.batch_processor.cache
    assert continuous_api.PagedAttentionCache is cache.PagedAttentionCache
    assert isinstance(paged, int8_kv_cache.Int8PagedCache)
    assert paged.num_blocks == 4
    [allocator] = paged.cache_allocators.values()
    layer, head_dim = transformers_attention.PagedLayer(paged, 1), model.config.head_dim
    slots = allocator.write_trash_index + torch.tensor([0, 3])
    key, value = torch.randn(2, 1, allocator.num_key_value_heads, 2, head_dim).unbind()
    # Both of the cache and of a layer, with slots to read and without.
    indices = {"read_index": [slots], "write_index": [slots], "cu_seq_lens_k": {"full_attention": slots}}
    results = [
        paged.update(key, value, 1, indices | {"max_length_k": {"full_attention": 2}}),
        *(
            tuple(states.transpose(0, 1)[None] for states in layer.update(key, value, read_index, slots))
            for read_index in (slots, slots[:0])
        ),
    ]
    written = [int8_heads.quantize(states[0].transpose(0, 1)) for states in (key, value)]
    assert all(torch.equal(by_slot[slots], heads) for by_slot, heads in zip(layer.slots(), written, strict=True))
    for result in results:
        for states, heads in zip(result, written, strict=True):
            expected = int8_heads.dequantize(heads, head_dim, torch.float32)
            assert torch.equal(states[0].transpose(0, 1), expected)


def test_paged_layer_has_the_pages_that_the_slots_are_in(executor: BatchingManager) -> None:
    paged = executor._manager.batch_processor.cache
    layers = [transformers_attention.PagedLayer(paged, layer_idx) for layer_idx in (0, 1)]
    assert [layer.is_first for layer in layers] == [True, False]
    assert {(layer.index, layer.type, layer.window) for layer in layers} == {(0, "full_attention", None)}
    [allocator] = paged.cache_allocators.values()
    assert layers[0].unused_slot < allocator.cache_tensor.shape[0]
    num_kv_heads, head_dim = allocator.num_key_value_heads, allocator.head_dim
    key = torch.randn(1, num_kv_heads, 2, head_dim)
    nothing, slots = torch.zeros(0, dtype=torch.int64), layers[1].unused_slot + torch.tensor([0, 3])
    layers[1].update(key, -key, nothing, slots)
    for pages, by_slot, written in zip(layers[1].pages(), layers[1].slots(), (key, -key), strict=True):
        assert pages.shape[1:] == (PAGE_TOKENS, num_kv_heads, head_dim)
        assert torch.equal(pages.flatten(0, 1)[slots], written[0].transpose(0, 1))
        assert torch.equal(by_slot[slots], written[0].transpose(0, 1))


def test_pages_of_a_sequence_are_those_of_the_manager(executor: BatchingManager) -> None:
    [allocator] = executor._manager.batch_processor.cache.cache_allocators.values()
    block_table = torch.zeros(4, dtype=torch.int32)
    try:
        allocator.block_table["pages"] = [7, 3, 9]
        slots = allocator.get_read_indices("pages", PAGE_TOKENS, PAGE_TOKENS + 1)
        allocator.fill_block_table("pages", PAGE_TOKENS, PAGE_TOKENS + 1, block_table)
        pages = transformers_attention._sequence_pages(allocator, "pages", PAGE_TOKENS, PAGE_TOKENS + 1)
    finally:
        del allocator.block_table["pages"]
    assert pages == [slot // PAGE_TOKENS for slot in slots[::PAGE_TOKENS]] == block_table[:3].tolist()


def test_manager_makes_block_tables_for_steps_of_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[torch.Size | None, int, int]] = []
    compute = cuda_attention.attend

    def attend(*arguments: Any, **options: Any) -> Any:
        table = options["block_table"]
        max_k = options["max_length_k"]["full_attention"]
        steps.append((None if table is None else table.shape, options["max_length_q"], max_k))
        return compute(*arguments, **options)

    fresh = loader.load(DEMO_MODEL, device="cpu", dtype="float32", trust_remote_code=False).model
    monkeypatch.setattr(cuda_attention, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(cuda_attention, "varlen_attn", reference.varlen_attn)
    assert attention.install(fresh)
    limits = Settings(max_num_seqs=4, max_num_batched_tokens=128)
    executor = BatchingManager(fresh, limits, 4 * PAGE_TOKENS, context_tokens=2 * PAGE_TOKENS)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, transformers_attention.VARLEN, attend)
    executor.start()
    try:
        asyncio.run(finish(executor, [(2 * PAGE_TOKENS - 2, 4)]))
    finally:
        executor.stop(HANG_SECONDS)
    layers = fresh.config.num_hidden_layers
    chunks = [(None, 128, length) for length in (128, 256, 384)] + [(None, 126, 510)]
    # The last one has more keys than a row of the table has pages for.
    decodes = [(torch.Size([1, 1, 2]), 1, 1)] * 2 + [(None, 1, 513)]
    assert steps == [step for step in chunks + decodes for _ in range(layers)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"head_dim": 16, "num_key_value_groups": 2, "qk_norms": None}),
        ("gemma2", {"norm_offset": 1.0, "eager_attention": modeling_gemma2.eager_attention_forward}),
        ("granite", {"residual_multiplier": 0.5}),
        ("smollm3", {"rotary": None}),
        ("olmo2", {"attention_norm": None, "mlp_norm": None}),
        ("qwen3_moe", {"gate_up": [], "activation": None}),
    ],
)
def test_decoder_layers_have_the_expected_parts(name: str, expected: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CASES[name].config())
    parent, index = layer_table.find_decoder_layers(model)[1]
    parts = layer_table.DecoderLayerParts.of(parent.get_submodule(index))
    assert parts.layer_idx == 1
    assert {field: getattr(parts, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 16, "softcap": 50.0}),
        ("mistral, sliding window", {"sliding_window": 16}),
        ("phi3, sliding window", {"sliding_window": 16}),
        ("exaone4", {"sliding_window": 16}),
    ],
)
def test_decoder_layers_pass_the_arguments_of_attention(name: str, expected: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CASES[name].config())
    parent, index = layer_table.find_decoder_layers(model)[0]
    parts = layer_table.DecoderLayerParts.of(parent.get_submodule(index))
    assert {argument: parts.attention_arguments.get(argument) for argument in expected} == expected
    assert parts.attention_arguments["dropout"] == 0.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", True),
        ("qwen3", True),
        ("gemma2", False),
    ],
)
def test_silu_is_recognized(name: str, expected: bool) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CASES[name].config())
    assert layer_table.is_silu(model.model.layers[0].mlp.act_fn) is expected


@pytest.mark.parametrize(
    ("name", "is_silu", "is_transposed", "has_bias"),
    [
        ("mixtral", True, False, False),
        ("qwen3_moe", True, False, False),
        ("gpt_oss", False, True, True),
    ],
)
def test_experts_have_the_expected_parts(name: str, is_silu: bool, is_transposed: bool, has_bias: bool) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CASES[name].config())
    mlp = model.model.layers[0].mlp
    [module] = [child for child in mlp.children() if layer_table.are_experts(child)]
    parts = layer_table.ExpertsParts.of(module)
    assert (parts.is_silu, parts.is_transposed, parts.has_bias) == (is_silu, is_transposed, has_bias)
    assert [parameter for parameter, _ in module.named_parameters() if "bias" not in parameter] == list(
        experts.MATRICES
    )
    [router] = [child for child in mlp.children() if layer_table.is_router(child)]
    assert router.weight.shape == (4, 64)


def test_attention_implementation_can_be_selected_for_a_forward_pass(model: Any) -> None:
    before = model.config._attn_implementation
    with transformers_attention.selected(model, "eager"):
        assert model.config.get_text_config()._attn_implementation == "eager"
    assert model.config._attn_implementation == before


def test_layers_of_a_step_share_the_cu_seq_lens_q_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[int] = []
    calls: list[int] = []
    build, supports = sequence_attention._build_metadata, paged_attention.supports

    def count_build(*args: Any) -> Any:
        builds.append(1)
        return build(*args)

    def count_call(*args: Any) -> bool:
        calls.append(1)
        supports(*args)
        return False

    fresh = loader.load(DEMO_MODEL, device="cpu", dtype="float32", trust_remote_code=False).model
    assert attention.install(fresh)
    with started(fresh) as executor:
        monkeypatch.setattr(sequence_attention, "_build_metadata", count_build)
        monkeypatch.setattr(paged_attention, "supports", count_call)
        asyncio.run(finish(executor, [(5, 4), (9, 3)]))
    assert len(calls) == len(builds) * fresh.config.num_hidden_layers > 0


# transformers' model classes and rotary embeddings: predictor/models/architectures.py, predictor/models/rope.py


def test_model_classes_state_whether_they_use_the_attention_interface() -> None:
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    assert classes[transformers.LlamaConfig]._supports_attention_backend is True
    assert classes[transformers.BloomConfig]._supports_attention_backend is False


@pytest.mark.parametrize("rope_type", sorted(LENGTH_DEPENDENT))
def test_rotary_embedding_updates_frequencies_unless_its_type_is_default(rope_type: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 8}
    extra = factors if rope_type == "longrope" else {"factor": 4.0}
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=8,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **extra},
    )
    embedding = modeling_llama.LlamaRotaryEmbedding(config)
    short = embedding.inv_freq.clone()
    embedding(torch.zeros(1), torch.arange(16)[None])
    long = embedding.inv_freq.clone()
    assert not torch.equal(short, long)
    frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=16)
    torch.testing.assert_close(frequencies, long)
    embedding.rope_type = "default"
    embedding(torch.zeros(1), torch.arange(4)[None])
    assert torch.equal(embedding.inv_freq, long)


@pytest.mark.parametrize("model_type", sorted(past_key_values.MODEL_TYPES))
def test_layers_without_the_paged_cache_update_past_key_values(model_type: str) -> None:
    config = CASES[model_type].config()
    layer_indices: list[int] = []

    class Past:
        def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
            layer_indices.append(layer_idx)
            return key, value

        def get_seq_length(self) -> int:
            return 0

    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    ids, positions = torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        arguments = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
        logits = model(**arguments, past_key_values=Past()).logits
    assert layer_indices == list(range(config.num_hidden_layers))
    torch.testing.assert_close(logits, expected)


# torch's FlashAttention: predictor/kernels/cuda/attention.py


def test_varlen_attn_has_the_parameters_of_its_reference() -> None:
    kernel, ours = (inspect.signature(function).parameters for function in (varlen_attn, reference.varlen_attn))
    assert [name for name in kernel if name != "return_aux"] == list(ours)
    assert {name: kernel[name].default for name in ours} == {name: ours[name].default for name in ours}
    assert {name: kernel[name].kind for name in ours} == {name: ours[name].kind for name in ours}


# torch's private operators: predictor/kernels/cpu/torch_private.py


def test_torch_private_operators_exist() -> None:
    torch_private.check_operators()


def test_torch_private_missing_operator_raises_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_private._OPERATORS, "mkldnn", ("_no_such_operator",))
    with pytest.raises(ImportError, match=r"torch\.ops\.mkldnn\._no_such_operator"):
        torch_private.check_operators()


@pytest.mark.skipif(not torch_private.supports_onednn_bf16(), reason="oneDNN has no bfloat16 kernels on this CPU")
def test_onednn_linear_multiplies_packed_weights() -> None:
    weight, inputs = torch.eye(32, dtype=torch.bfloat16) * 2, torch.randn(3, 32, dtype=torch.bfloat16)
    packed = torch_private.onednn_pack_weight(weight)
    assert torch.equal(torch_private.onednn_linear(inputs, packed, None), inputs * 2)


@pytest.mark.skipif(not torch_private.supports_fbgemm(), reason="this CPU has no fbgemm kernels")
def test_fbgemm_linear_multiplies_packed_weights_with_the_given_scale() -> None:
    with torch_private.ignore_deprecated_quantization():
        packed = torch_private.fbgemm_pack_weight(torch.eye(32, dtype=torch.int8), torch.full((32,), 0.5))
    inputs = torch.arange(-16, 16, dtype=torch.float32)[None]
    assert torch.equal(torch_private.fbgemm_linear(inputs, 1.0, 64, packed), inputs / 2)


# transformers' weight mapping: storage_initializer/prepare/transformers_mapping.py


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (get_model_conversion_mapping, ["model"]),
        (
            rename_source_key,
            ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"],
        ),
        (
            HfQuantizer.get_modules_to_not_convert,
            ["model", "skip_modules", "keep_in_fp32_modules", "add_default_skips"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weight_mapping_signature_has_parameters(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_weight_mapping_maps_linear_layers_of_a_meta_model(tmp_path: Path) -> None:
    meta_model = transformers_mapping.build_meta_model(
        transformers_mapping.load_config(tiny_llama.make(tmp_path / "m"))
    )
    layers = transformers_mapping.linear_layers(meta_model, ["down_proj"], 1)
    assert len(layers) == tiny_llama.QUANTIZED - tiny_llama.LAYERS
    assert not any("down_proj" in layer or "lm_head" in layer for layer in layers)
    # The down projections have 137 inputs.
    assert transformers_mapping.linear_layers(meta_model, [], 32) == layers
    parameter_name = transformers_mapping.parameter_mapping(meta_model, {f"{layers[0]}.scale": True})
    for name in (f"{layers[0]}.weight", f"{layers[0]}.scale", "model.embed_tokens.weight"):
        assert parameter_name(name) == name
    assert parameter_name("unknown.weight") == ""


# huggingface_hub: storage_initializer/sources/hub_client.py


def test_hub_session_offers_get_and_stream_with_timeout() -> None:
    session = huggingface_hub.get_session()
    for method in (session.get, session.stream):
        assert {"headers", "timeout"} <= set(inspect.signature(method).parameters)
    assert hub_utils.build_hf_headers(token=False).keys() >= {"user-agent"}
    assert isinstance(huggingface_hub.constants.HF_HUB_DISABLE_XET, bool)
    assert isinstance(huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, bool)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 55),
        ({"retry-after": "7"}, 7),
        ({}, None),
    ],
    ids=["ratelimit", "retry-after", "none"],
)
def test_hub_rate_limit_headers_give_the_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert hub_client.retry_after_seconds(headers) == seconds


def test_xet_reporter_counts_every_byte_once() -> None:
    counted: list[int] = []
    reporter = XetDownloadProgressReporter(
        reconstruction_desc="", total=100, log_level=logging.INFO, tqdm_class=hub_client.byte_counter(counted.append)
    )
    with reporter:
        for done in (40, 100):
            report = SimpleNamespace(
                total_bytes=100,
                total_bytes_completed=done,
                total_bytes_completion_rate=1.0,
                total_transfer_bytes_completed=done // 2,
                total_transfer_bytes_completion_rate=1.0,
            )
            reporter.update_progress(report)
    assert counted == [40, 60]
