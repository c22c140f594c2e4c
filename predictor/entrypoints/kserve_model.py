"""The KServe model: wires snapshot, loader, tokenization, engine and protocol together, and owns no logic."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import kserve
import psutil

from predictor.engine.engine import Engine
from predictor.errors import Draining, InvalidRequest, ModelNotReady, Overloaded, RequestError, StartupError
from predictor.generation import output_processor
from predictor.generation.output_processor import CompletionStream
from predictor.generation.prompts import Prompts
from predictor.generation.self_check import SelfCheck
from predictor.models import loader, snapshot
from predictor.models.loader import LoadedModel
from predictor.models.snapshot import Snapshot
from predictor.observability import metrics, request_record
from predictor.protocols import open_inference
from predictor.protocols.sampling_fields import timeout_seconds
from predictor.resources import threads
from predictor.settings import Settings
from predictor.types import Chat, FinishedSequence, GenerationRequest

logger = logging.getLogger(__name__)

WARM_UP_SECONDS = 600.0


class Phase(StrEnum):
    """How far a start has come; shown to whoever asks for readiness."""

    CREATED = "starting"
    WAITING = "waiting for the snapshot"
    LOADING = "loading weights"
    WARMING_UP = "warming up"
    READY = "ready"
    DRAINING = "shutting down"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class _Parts:
    snapshot: Snapshot
    loaded: LoadedModel
    prompts: Prompts
    engine: Engine
    self_check: SelfCheck


class Predictor(kserve.Model):
    """One language model behind KServe's interface; `load` first, then any number of requests at once."""

    ready: bool

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.served_model_name)
        self._settings = settings
        self._parts: _Parts | None = None
        self._engine: Engine | None = None
        # A stop may come in the middle of a load. The engine's thread would keep the process alive, so a stop and
        # the engine's start take turns, and nothing starts after a stop.
        self._turn = threading.Lock()
        self.phase = Phase.CREATED
        self._metrics = metrics.ModelMetrics(settings.served_model_name)
        self._metrics.register_callbacks(ready=lambda: self._would_answer, live=lambda: self.live)

    def load(self) -> bool:
        """Load the weights, start the engine and answer a first prompt; blocks, for as long as that takes.

        Once begun, a second call does nothing: KServe's data plane calls it again for a model that is not ready.

        Raises:
            StartupError: naming what is wrong with the snapshot, the weights or the device.
        """
        if self.phase is not Phase.CREATED:
            return self.ready
        self.phase = Phase.WAITING
        settings = self._settings
        started = time.monotonic()
        # Python and its imports: what has passed since the process began.
        self._metrics.observe_load_phase("imports", _age_seconds())
        with self._metrics.time_load_phase("snapshot"):
            found = snapshot.wait(settings.model_dir, settings.model_reference, settings.snapshot_wait_seconds)
        self.phase = Phase.LOADING
        threads.set_threads(settings.num_threads)
        loaded = loader.load(
            found.directory,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            quantization=settings.quantization,
            keep=settings.kept_layers,
            fallback=settings.quantization_fallback,
            phase=self._metrics.time_load_phase,
        )
        engine = Engine(
            loaded.model,
            eos_token_ids=loaded.eos_token_ids,
            context_tokens=min(loaded.context_tokens, settings.max_model_len or loaded.context_tokens),
            max_num_seqs=settings.max_num_seqs,
            max_queued_requests=settings.max_queued_requests,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_cache_tokens=settings.kv_cache_tokens,
            kv_cache_memory_fraction=settings.kv_cache_memory_fraction,
            step_timeout_seconds=settings.step_timeout_seconds,
        )
        with self._turn:
            if self.phase is Phase.STOPPED:
                return False
            self.phase = Phase.WARMING_UP
            self._engine = engine
            with self._metrics.time_load_phase("kv_cache"):
                engine.start()
        try:
            with self._metrics.time_load_phase("warm_up"):
                asyncio.run(engine.check(WARM_UP_SECONDS))
        except RequestError as error:
            raise StartupError(f"The model loaded, but cannot generate: {error}") from error
        prompts = Prompts(
            loaded.tokenizer,
            engine.context_tokens,
            loaded.vocabulary_tokens,
            loaded.defaults,
            settings.default_max_tokens,
        )
        with self._turn:
            if self.phase is Phase.STOPPED:
                return False
            self._parts = _Parts(
                found, loaded, prompts, engine, SelfCheck(engine, settings.self_check_interval_seconds)
            )
            self.ready = True
            self.phase = Phase.READY
        self._watch(self._parts)
        logger.info("%s is ready after %.1f s", self.name, time.monotonic() - started)
        return True

    def drain(self) -> None:
        """Take no new requests; those that run or wait go on."""
        with self._turn:
            self.ready = False
            if self.phase is not Phase.STOPPED:
                self.phase = Phase.DRAINING

    def stop(self) -> None:
        """Stop being ready, and end the engine; what still runs is cut off. May be called twice."""
        with self._turn:
            self.ready = False
            self.phase = Phase.STOPPED
            if self._engine is not None:
                self._engine.stop()

    @property
    def live(self) -> bool:
        """Whether the step loop runs and makes steps, or has not been started yet."""
        return self._parts is None or self._parts.engine.is_alive

    @property
    def has_ended(self) -> bool:
        """Whether no step loop runs, not even one that `stop` could not end."""
        return self._engine is None or self._engine.has_ended

    @property
    def busy(self) -> bool:
        """Whether sequences run or wait."""
        return self._parts is not None and bool(self._parts.engine.running or self._parts.engine.waiting)

    async def healthy(self) -> bool:
        """Whether a request would be answered now."""
        return self._would_answer

    @property
    def _would_answer(self) -> bool:
        return self.ready and self._parts is not None and self.live and self._parts.self_check.is_fresh

    def count_request(self, protocol: str | None, status: int) -> None:
        """For the metrics: a request was answered with that status."""
        self._metrics.count_request(protocol, status)

    @property
    def unreadiness(self) -> str:
        """Why it is not ready, in a few words."""
        if self.phase is not Phase.READY or self._parts is None:
            return self.phase
        if not self.live:
            return "the step loop makes no progress"
        return f"it was last seen to generate {self._parts.self_check.age_seconds:.0f} s ago"

    def start(self) -> None:
        """KServe's hook at registration, which would call the model ready; it is when `load` says so."""

    async def check_itself(self) -> None:
        """Run self-checks until cancelled; begin when loaded."""
        if self._parts is not None:
            await self._parts.self_check.run()

    @property
    def facts(self) -> dict[str, str]:
        """What is served, for the model's metadata: scalars as strings."""
        if self._parts is None:
            return {}
        parts = self._parts
        return {
            "commit": parts.snapshot.commit or "",
            "device": str(parts.loaded.model.device),
            "dtype": str(parts.loaded.model.dtype).removeprefix("torch."),
            "quantization": parts.loaded.quantization,
            **({"int8_kernels": parts.loaded.int8_kernels} if parts.loaded.int8_kernels else {}),
            "prepared": str(parts.loaded.prepared).lower(),
            **({"device_map": json.dumps(parts.loaded.device_map)} if parts.loaded.device_map else {}),
            "context_tokens": str(parts.engine.context_tokens),
            "kv_cache_tokens": str(parts.engine.cache_tokens),
        }

    @property
    def context_tokens(self) -> int | None:
        """Prompt and completion together at most; None before the load."""
        return self._parts.engine.context_tokens if self._parts else None

    def get_input_types(self) -> list[dict[str, Any]]:
        """The inputs of v2 infer, for the model's metadata."""
        return open_inference.metadata(open_inference.INPUTS)

    def get_output_types(self) -> list[dict[str, Any]]:
        """The outputs of v2 infer, for the model's metadata."""
        return open_inference.metadata(open_inference.OUTPUTS)

    def open(self, requests: Sequence[GenerationRequest], timeout_seconds: float | None = None) -> CompletionStream:
        """Begin to answer requests, all of them or none; the caller reads the answer and closes it.

        Args:
            requests: at least one.
            timeout_seconds: what the client allows; the server's own limit holds too.

        Raises:
            RequestError: a request is wrong, or cannot be taken now.
        """
        record = request_record.current()
        chats = any(isinstance(request.prompt, Chat) for request in requests)
        record.operation = "chat" if chats else "text_completion"
        if self._parts is None or not self.ready:
            if self.phase in (Phase.DRAINING, Phase.STOPPED):
                raise Draining("The server is shutting down; ask again in a moment.")
            raise ModelNotReady(f"The model {self.name} is not ready: {self.unreadiness}; ask again in a moment.")
        parts = self._parts
        if self._settings.log_prompts:
            for request in requests:
                logger.info("prompt: %r, sampling: %r", request.prompt, request.sampling)
        limit = self._settings.request_timeout_seconds
        deadline = time.monotonic() + min(limit, timeout_seconds or limit)

        def on_finished(finished: FinishedSequence) -> None:
            self._metrics.count_finished(finished)
            record.finished.append(finished)

        try:
            return output_processor.submit(
                requests,
                prompts=parts.prompts,
                engine=parts.engine,
                deadline=deadline,
                on_finished=on_finished,
                on_tokens=self._metrics.count_tokens,
            )
        except Overloaded:
            self._metrics.count_rejected()
            raise

    async def predict(
        self, payload: kserve.InferRequest | dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> kserve.InferResponse:
        """Answer every prompt of a v2 request, all in one batch.

        Args:
            payload: as `v2.parse` or gRPC made it.
            headers: `fields.TIMEOUT_HEADER` among them is what the client allows.

        Raises:
            RequestError: the request cannot be answered, and why.
        """
        if not isinstance(payload, kserve.InferRequest):
            raise InvalidRequest(f"This route is not served; POST /v2/models/{self.name}/infer instead.")
        answer = self.open(open_inference.decode(payload), timeout_seconds(headers or {}))
        try:
            return open_inference.encode(payload, await answer.complete())
        finally:
            answer.close()

    def _watch(self, parts: _Parts) -> None:
        engine = parts.engine
        facts = self.facts
        self._metrics.set_model_info(**{name: facts[name] for name in ("commit", "device", "dtype", "quantization")})
        self._metrics.register_callbacks(
            num_requests_running=lambda: engine.running,
            num_requests_waiting=lambda: engine.waiting,
            kv_cache_usage_perc=lambda: engine.cache_usage,
            kv_cache_capacity_tokens=lambda: engine.cache_tokens,
            engine_steps=lambda: engine.steps,
            self_check_age_seconds=lambda: parts.self_check.age_seconds,
            self_check_success=lambda: parts.self_check.succeeded,
        )


def _age_seconds() -> float:
    """Of this process."""
    began = psutil.Process().create_time()
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return time.time() - began
    # On Linux, processes begin so many ticks after the boot, and that is known to a second only.
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (began - psutil.boot_time())
