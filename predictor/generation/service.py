"""LLMService: loads one language model and generates with it, independently of any protocol or server."""

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

from predictor.engine.engine import Engine
from predictor.engine.pooling_engine import PoolingEngine
from predictor.errors import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    LoadCancelled,
    ModelNotReady,
    Overloaded,
)
from predictor.generation import model_load, output_processor, pooling, prompt_encoder
from predictor.generation.caller_usage import CallerUsage
from predictor.generation.hold import Hold, HoldFull
from predictor.generation.load_progress import LoadProgress
from predictor.generation.model_load import CreatePipeline
from predictor.generation.output_processor import CompletionStream
from predictor.generation.pipelines import GenerationPipeline, PoolingPipeline
from predictor.generation.prompts import Prompts
from predictor.kernels import tensor_parallel
from predictor.kernels.tensor_parallel import Rank
from predictor.models.loader import LoadedModel
from predictor.models.snapshot import Snapshot
from predictor.observability import metrics, request_record
from predictor.observability.request_record import RequestRecord
from predictor.served_models import ServedModels
from predictor.settings import Settings
from predictor.types import (
    Chat,
    FinishedSequence,
    GenerationRequest,
    Pooled,
    PoolingRequest,
    Task,
    Tokenization,
)

logger = logging.getLogger(__name__)

_SHUTTING_DOWN = "The server is shutting down. Retry later."


class Phase(StrEnum):
    """Progress of the service from start to stop; part of the readiness message."""

    CREATED = "starting"
    WAITING = "waiting for the snapshot"
    LOADING = "loading weights"
    WARMING_UP = "warming up"
    READY = "ready"
    TERMINATING = "terminating"
    DRAINING = "shutting down"
    STOPPED = "stopped"


_T = TypeVar("_T")
_AnyPipeline = TypeVar("_AnyPipeline", GenerationPipeline, PoolingPipeline)


class LLMService:
    """One language model: call `load` once, then `submit` or `pool` any number of requests concurrently.

    Args:
        settings: of the predictor.
        rank: this process's, 0, of a tensor-parallel model; None: no others share the model.
    """

    def __init__(self, settings: Settings, rank: Rank | None = None) -> None:
        self.models = ServedModels((settings.served_model_name,))
        self.phase = Phase.CREATED
        self.metadata: dict[str, str] = {}
        """Properties of the loaded model, all as strings; empty before the load."""
        self._settings = settings
        self._rank = rank
        self._wait_state = ""
        """State of the wait for the snapshot; part of the readiness message."""
        self._pipeline: GenerationPipeline | PoolingPipeline | None = None
        self._engine: Engine | PoolingEngine | None = None
        self._num_encoding: Counter[str | None] = Counter()
        """Sequences whose prompts are encoded or wait for it, by name of their caller."""
        # `stop` may be called during `load`. The lock keeps the load from starting the engine after that:
        # the engine's thread would keep the process alive.
        self._state_lock = threading.RLock()
        # All that are held can run or queue afterwards.
        self._hold = Hold(settings.max_num_seqs + settings.max_queued_requests)
        self._progress = LoadProgress(settings.load_time_file)
        self._metrics = metrics.ModelMetrics(self.models.default)
        self._usage = CallerUsage(self.models.default)
        self._metrics.register_callbacks(
            ready=lambda: self.is_ready,
            live=lambda: self.is_live,
            num_requests_waiting=lambda: self._hold.num_sequences,
        )

    def load(self) -> bool:
        """Load the weights, start the engine and generate once; blocks until done.

        Returns:
            Whether the model is ready. A second call changes nothing; KServe makes one for a model that is not ready.

        Raises:
            StartupError: the snapshot, the weights or the device cannot be used.
        """
        if self.phase is not Phase.CREATED:
            return self.is_ready
        started = time.monotonic()
        self._metrics.observe_load_phase("imports", model_load.process_age_seconds())
        try:
            model_snapshot, adapter = self._find_snapshots()
            loaded = self._load_weights(model_snapshot, adapter)
            engine, create_pipeline = self._start_engine(loaded)
            with self._metrics.time_load_phase("warm_up"):
                model_load.warm_up(loaded, engine)
            self._accept_requests(model_snapshot, adapter, loaded, engine, create_pipeline)
        except LoadCancelled:
            return False
        except Exception as error:
            self._hold.end(ModelNotReady(f"Model {self.models.default} could not be loaded: {error}"))
            raise
        self._hold.end()
        self._progress.finish()
        logger.info("model %s is ready after %.1f s", self.models.default, time.monotonic() - started)
        return True

    def _enter(self, phase: Phase) -> None:
        """Set the next phase of the load."""
        with self._state_lock:
            if self.is_shutting_down:
                raise LoadCancelled
            self.phase = phase

    def _find_snapshots(self) -> tuple[Snapshot, Snapshot | None]:
        self._enter(Phase.WAITING)
        with self._metrics.time_load_phase("snapshot"):
            return model_load.find_snapshots(self._settings, self._report_wait)

    def _report_wait(self, state: str) -> None:
        self._wait_state = state

    def _load_weights(self, model_snapshot: Snapshot, adapter: Snapshot | None) -> LoadedModel:
        self._progress.start(model_snapshot.directory)
        self._enter(Phase.LOADING)
        with self._metrics.time_load_phase("ranks") if self._rank else nullcontext():
            model_load.join_ranks(self._settings, self._rank)
        tensor_parallel.share((model_snapshot, adapter))
        with tensor_parallel.together("weights"):
            return model_load.load_weights(
                self._settings,
                model_snapshot,
                adapter,
                time_phase=self._time_load_phase,
                report_weights=self._progress.report_weights,
            )

    @contextmanager
    def _time_load_phase(self, phase: str) -> Iterator[None]:
        """Record the duration of a phase on the slowest rank."""
        with self._metrics.time_load_phase(phase), tensor_parallel.together(phase):
            yield

    def _start_engine(self, loaded: LoadedModel) -> tuple[Engine | PoolingEngine, CreatePipeline]:
        with self._time_load_phase("kv_cache"):
            engine, create_pipeline = model_load.create_engine(loaded, self._settings)
            with self._state_lock:
                self._enter(Phase.WARMING_UP)
                self._engine = engine
                engine.start()
        return engine, create_pipeline

    def _accept_requests(
        self,
        model_snapshot: Snapshot,
        adapter: Snapshot | None,
        loaded: LoadedModel,
        engine: Engine | PoolingEngine,
        create_pipeline: CreatePipeline,
    ) -> None:
        pipeline, properties = create_pipeline()
        with self._state_lock:
            self._enter(Phase.READY)
            self.metadata = {
                "task": pipeline.task,
                **model_load.metadata(model_snapshot, loaded, engine.context_tokens),
                **model_load.adapter_metadata(self._settings.adapter_reference, adapter),
                **properties,
            }
            self._pipeline = pipeline
        self._metrics.set_model_info(self.metadata)
        self._metrics.register_callbacks(
            num_requests_running=lambda: engine.running,
            num_requests_waiting=lambda: self._num_encoding.total() + engine.waiting,
            engine_steps=lambda: engine.steps,
            engine_failed_steps=lambda: engine.failed_steps,
            self_check_age_seconds=lambda: pipeline.self_check.age_seconds,
            self_check_success=lambda: pipeline.self_check.succeeded,
        )
        if isinstance(engine, Engine):
            self._metrics.register_callbacks(
                kv_cache_usage_perc=lambda: engine.cache_usage,
                kv_cache_capacity_tokens=lambda: engine.cache_tokens,
                spec_decode_num_drafts=lambda: engine.speculation.num_drafts,
                spec_decode_num_draft_tokens=lambda: engine.speculation.num_draft_tokens,
                spec_decode_num_accepted_tokens=lambda: engine.speculation.num_accepted_tokens,
            )

    def terminate(self) -> None:
        """Stop being ready; requests are still accepted, until `drain`."""
        with self._state_lock:
            if self.phase is Phase.READY:
                self.phase = Phase.TERMINATING

    def drain(self) -> None:
        """Reject new requests; running and waiting ones go on."""
        with self._state_lock:
            if self.phase is not Phase.STOPPED:
                self.phase = Phase.DRAINING
        self._hold.end(Draining(_SHUTTING_DOWN))

    def stop(self) -> None:
        """Stop the engine and abort running requests; may be called twice."""
        with self._state_lock:
            self.phase = Phase.STOPPED
            if self._pipeline is not None:
                self._pipeline.encoder.close()
            if self._engine is not None:
                self._engine.stop()
        self._hold.end(Draining(_SHUTTING_DOWN))

    @property
    def is_live(self) -> bool:
        """Whether the step loop makes progress, or has not been started yet."""
        if self._pipeline is None:
            return True
        return self._pipeline.engine.is_alive and not self._pipeline.self_check.is_broken

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be answered."""
        if self.phase is not Phase.READY or self._pipeline is None:
            return False
        return self.is_live and self._pipeline.self_check.is_fresh

    @property
    def accepts_requests(self) -> bool:
        """Whether the readiness routes report ready: the model is, or requests are held until it is."""
        holds = self._settings.ready_while_loading and self.phase in (Phase.LOADING, Phase.WARMING_UP)
        return holds or self.is_ready

    @property
    def is_loading(self) -> bool:
        """Whether requests are held, or rejected, until the model is loaded."""
        return self._pipeline is None and not self.is_shutting_down

    @property
    def retry_after_seconds(self) -> int | None:
        """Expected time until the model is loaded; None if it is unknown."""
        left = self._progress.seconds_left if self.is_loading else None
        return None if left is None else max(1, math.ceil(left))

    @property
    def is_terminating(self) -> bool:
        """Whether clients should send their next request to another server."""
        return self.phase is Phase.TERMINATING or self.is_shutting_down

    @property
    def is_shutting_down(self) -> bool:
        """Whether new requests are rejected for good."""
        return self.phase in (Phase.DRAINING, Phase.STOPPED)

    @property
    def not_ready_reason(self) -> str:
        """The reason for not being ready, in a few words."""
        if self.phase is Phase.WAITING and self._wait_state:
            return f"{self.phase}, {self._wait_state}"
        if self.phase is Phase.LOADING and (percent := self._progress.weights_percent) is not None:
            return f"{self.phase}, {percent} %"
        if self.phase is not Phase.READY or self._pipeline is None:
            return self.phase
        if not self.is_live:
            return "the step loop makes no progress"
        return f"the model last generated {self._pipeline.self_check.age_seconds:.0f} s ago"

    @property
    def busy(self) -> bool:
        """Whether sequences run or wait, or prompts are encoded."""
        engine = self._pipeline.engine if self._pipeline else None
        return engine is not None and bool(self._num_encoding.total() or engine.running or engine.waiting)

    @property
    def has_ended(self) -> bool:
        """Whether the thread of the step loop is gone; `stop` cannot interrupt a step that hangs."""
        return self._engine is None or self._engine.has_ended

    @property
    def task(self) -> Task | None:
        """What the model does; None before the load."""
        return self._pipeline.task if self._pipeline else None

    @property
    def context_tokens(self) -> int | None:
        """Maximum tokens of prompt and completion together; None before the load."""
        return self._pipeline.engine.context_tokens if self._pipeline else None

    @property
    def lineage(self) -> dict[str, str]:
        """The adapter and its base model, as vLLM's `root` and `parent`; empty without an adapter."""
        adapter, model = self._settings.adapter_reference, self._settings.model_reference
        return {"root": adapter, "parent": model} if adapter and model else {}

    async def run_self_checks(self) -> None:
        """Check the model periodically until cancelled; call after `load`."""
        if self._pipeline is not None:
            await self._pipeline.self_check.run()

    def count_request(self, protocol: str | None, status: int) -> None:
        """Count a response, by protocol and HTTP status, in the metrics."""
        self._metrics.count_request(protocol, status)

    async def submit(
        self, requests: Sequence[GenerationRequest], timeout_seconds: float | None = None
    ) -> CompletionStream:
        """Start generating for all requests, or for none; the caller reads the result and closes it.

        Args:
            requests: at least one.
            timeout_seconds: the client's limit; the server's own limit holds too.

        Raises:
            RequestError: a request is invalid, or the model takes no requests now.
        """
        record = request_record.current()
        has_chat = any(isinstance(request.prompt, Chat) for request in requests)
        record.operation = "chat" if has_chat else "text_completion"
        deadline = self._deadline(timeout_seconds)

        def on_tokens(tokens: int, gap_seconds: float | None) -> None:
            self._metrics.count_tokens(tokens, gap_seconds)
            self._usage.count_tokens(record.caller, tokens)

        num_sequences = sum(request.n for request in requests)
        with self._counting_rejections(record):
            await self._hold_while_loading(num_sequences, deadline)
            pipeline = self._admit(record, [request.prompt for request in requests])
            if self._settings.log_prompts:
                for request in requests:
                    logger.info("prompt: %r, sampling: %r", request.prompt, request.sampling)
            async with self._encoding(pipeline, num_sequences, deadline):
                self._usage.take_request(record.caller)
                encoded = await pipeline.encoder.encode(requests, record.key)
            stream = output_processor.submit(
                encoded,
                tokenizer=pipeline.prompts.tokenizer,
                engine=pipeline.engine,
                deadline=deadline,
                on_finished=partial(self._count_finished, record),
                on_tokens=on_tokens,
                caller=record.caller,
            )
        prompt_tokens = sum(len(request.token_ids) * request.n for request in encoded)
        self._usage.count_accepted(record.caller, num_sequences, prompt_tokens)
        return stream

    async def pool(self, request: PoolingRequest, timeout_seconds: float | None = None) -> Pooled:
        """Return the embedding or scores of each input; a request counts as one sequence.

        Args:
            request: all of its inputs are computed, or it fails.
            timeout_seconds: the client's limit; the server's own limit holds too.

        Raises:
            RequestError: the request is invalid, or the model takes no requests now.
        """
        record = request_record.current()
        record.operation = "embeddings"
        deadline = self._deadline(timeout_seconds)
        with self._counting_rejections(record):
            await self._hold_while_loading(1, deadline)
            pipeline = self._require(PoolingPipeline, request.task, record)
            if self._settings.log_prompts:
                logger.info("inputs: %r", request.inputs)
            async with self._encoding(pipeline, 1, deadline):
                self._usage.take_request(record.caller)
                inputs = await pipeline.encoder.run(
                    lambda source: source.encode(request), pooling.num_characters(request), record.key
                )
            pipeline.engine.require_capacity(1, caller=record.caller)
        prompt_tokens = sum(len(each.token_ids) for each in inputs)
        self._usage.count_accepted(record.caller, 1, prompt_tokens)
        rows = await pooling.compute(
            pipeline.engine,
            inputs,
            deadline=deadline,
            caller=record.caller,
            on_finished=partial(self._count_finished, record),
        )
        return Pooled(pipeline.source.finish(rows, request), prompt_tokens)

    async def wait_for_load(self, num_sequences: int, timeout_seconds: float | None = None) -> None:
        """Hold a request until the model is loaded, if requests are held.

        Raises:
            RequestError: too many are held already, the time is over, or the load has failed.
        """
        await self._hold_while_loading(num_sequences, self._deadline(timeout_seconds))

    async def tokenize(
        self, prompt: str | Chat, timeout_seconds: float | None = None, *, add_special_tokens: bool, with_texts: bool
    ) -> Tokenization:
        """Return the tokens of a text or chat, which need not fit into the context.

        Args:
            prompt: text, to which the tokenizer adds its special tokens on request, or a chat.
            timeout_seconds: the client's limit; the server's own limit holds too.
            add_special_tokens: of a text; a chat has those of its template.
            with_texts: return each token as text too.

        Raises:
            RequestError: the prompt is invalid, or the model takes no requests now.
        """
        pipeline = self._admit(request_record.current(), [prompt])

        def work(prompts: Prompts) -> Tokenization:
            return prompts.tokenize(prompt, add_special_tokens=add_special_tokens, with_texts=with_texts)

        return await self._run_tokenizer(pipeline, work, prompt_encoder.prompt_size(prompt), timeout_seconds)

    async def detokenize(self, token_ids: Sequence[int], timeout_seconds: float | None = None) -> str:
        """Return the text of tokens, special tokens included.

        Raises:
            RequestError: the model has no such token, or takes no requests now.
        """
        pipeline = self._admit(request_record.current(), [])

        def work(prompts: Prompts) -> str:
            return prompts.detokenize(token_ids)

        return await self._run_tokenizer(pipeline, work, len(token_ids), timeout_seconds)

    async def _run_tokenizer(
        self, pipeline: GenerationPipeline, work: Callable[[Prompts], _T], size: int, timeout_seconds: float | None
    ) -> _T:
        record = request_record.current()
        with self._counting_rejections(record):
            async with self._encoding(pipeline, 1, self._deadline(timeout_seconds)):
                return await pipeline.encoder.run(work, size, record.key)

    def tokenizer_info(self) -> dict[str, Any]:
        """Return the tokenizer's class, special tokens and chat template; None for what it does not have.

        Raises:
            RequestError: the model takes no requests now.
        """
        tokenizer = self._admit(request_record.current(), []).prompts.tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            "unk_token": tokenizer.unk_token,
            "chat_template": tokenizer.chat_template,
        }

    def _admit(self, record: RequestRecord, prompts: Sequence[str | tuple[int, ...] | Chat]) -> GenerationPipeline:
        """Return the parts that generate, unless the request is rejected whatever its prompts are."""
        pipeline = self._require(GenerationPipeline, Task.GENERATE, record)
        for prompt in prompts:
            if isinstance(prompt, Chat):
                record.add_ignored_fields(pipeline.prompts.chat_template.ignored_fields(prompt))
        return pipeline

    def _require(self, kind: type[_AnyPipeline], task: Task, record: RequestRecord) -> _AnyPipeline:
        """Return the pipeline of a loaded model that does what a request needs.

        Raises:
            RequestError: there is none, or an unknown field is to be refused.
        """
        if self.is_shutting_down:
            raise Draining(_SHUTTING_DOWN)
        pipeline = self._pipeline
        if pipeline is None:
            raise self._not_ready("")
        if not isinstance(pipeline, kind) or pipeline.task is not task:
            raise InvalidRequest(f"Model {self.models.default} {pooling.ROUTES[pipeline.task]}.")
        if record.ignored_fields and self._settings.unknown_fields == "refuse":
            raise _unknown_fields(record.ignored_fields)
        return pipeline

    def _count_finished(self, record: RequestRecord, sequence: FinishedSequence) -> None:
        self._metrics.count_finished(sequence)
        self._usage.count_finished(record.caller, sequence)
        record.finished.append(sequence)

    @contextmanager
    def _counting_rejections(self, record: RequestRecord) -> Iterator[None]:
        try:
            yield
        except Overloaded as error:
            self._metrics.count_rejected()
            self._usage.count_rejected(record.caller, error)
            raise

    async def _hold_while_loading(self, num_sequences: int, deadline: float) -> None:
        if self.is_loading and self._settings.hold_while_loading:
            await self._wait_for_load(num_sequences, deadline)

    async def _wait_for_load(self, num_sequences: int, deadline: float) -> None:
        """Hold a request until the model is loaded."""
        limit = self._settings.hold_while_loading
        remaining = deadline - time.monotonic()
        try:
            await self._hold.wait(num_sequences, min(limit, remaining), request_record.current().caller)
        except HoldFull:
            raise self._not_ready(f", and {self._hold.max_sequences} sequences at most wait for it") from None
        except TimeoutError:
            if remaining < limit:
                raise DeadlineExceeded("Request timed out while the model was loading. Raise the timeout.") from None
            raise self._not_ready(f" after {limit:g} s") from None

    def _not_ready(self, detail: str) -> ModelNotReady:
        reason = f"{self.not_ready_reason}{detail}"
        return ModelNotReady(
            f"Model {self.models.default} is not ready: {reason}. Retry later.", self.retry_after_seconds
        )

    def _deadline(self, timeout_seconds: float | None) -> float:
        limit = self._settings.request_timeout_seconds
        return time.monotonic() + min(limit, timeout_seconds or limit)

    @asynccontextmanager
    async def _encoding(
        self, pipeline: GenerationPipeline | PoolingPipeline, num_sequences: int, deadline: float
    ) -> AsyncIterator[None]:
        """Hold the places of sequences in the engine while their prompts are encoded, until the deadline."""
        record = request_record.current()
        pipeline.engine.require_capacity(num_sequences, self._num_encoding, record.caller)
        self._num_encoding[record.key] += num_sequences
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                yield
        except TimeoutError:
            raise DeadlineExceeded(
                "Request timed out before its prompt was encoded. Shorten the prompt or raise the timeout."
            ) from None
        finally:
            self._num_encoding[record.key] -= num_sequences


def _unknown_fields(paths: Sequence[str]) -> InvalidRequest:
    field = paths[0] if len(paths) == 1 else None
    return InvalidRequest(f"{', '.join(paths)}: unknown field. Omit it. The schema is at /openapi.json.", field)
