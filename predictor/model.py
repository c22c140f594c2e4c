"""The KServe model: wires snapshot, loader, tokenization, engine and protocol together, and owns no logic."""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import kserve

from predictor import loader, snapshot
from predictor.engine import Engine
from predictor.errors import GenerationFailed, InvalidRequest, ModelNotReady
from predictor.generation import Completion, FinishReason, GenerationRequest, SamplingParams
from predictor.protocol import v2
from predictor.settings import Settings
from predictor.snapshot import Snapshot
from predictor.tokenization import Detokenizer, Prompts

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    """How far a start has come; shown to whoever asks for readiness."""

    CREATED = "starting"
    WAITING = "waiting for the snapshot"
    LOADING = "loading weights"
    WARMING_UP = "warming up"
    READY = "ready"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class _Parts:
    snapshot: Snapshot
    prompts: Prompts
    engine: Engine


class Predictor(kserve.Model):
    """One language model behind KServe's interface; `load` first, then any number of `predict` at once."""

    ready: bool

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.model_name)
        self._settings = settings
        self._parts: _Parts | None = None
        self._engine: Engine | None = None
        # A stop may come in the middle of a load. The engine's thread would keep the process alive, so a stop and
        # the engine's start take turns, and nothing starts after a stop.
        self._turn = threading.Lock()
        self.phase = Phase.CREATED

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
        found = snapshot.wait(settings.model_dir, settings.model_reference, settings.snapshot_wait_seconds)
        self.phase = Phase.LOADING
        loaded = loader.load(
            found.directory,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        engine = Engine(
            loaded.model,
            eos_token_ids=loaded.eos_token_ids,
            context_tokens=min(loaded.context_tokens, settings.max_model_len or loaded.context_tokens),
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            kv_cache_tokens=settings.kv_cache_tokens,
        )
        with self._turn:
            if self.phase is Phase.STOPPED:
                return False
            self.phase = Phase.WARMING_UP
            self._engine = engine
            engine.start()
        asyncio.run(engine.warm_up())
        prompts = Prompts(loaded.tokenizer, engine.context_tokens, loaded.defaults, settings.default_max_tokens)
        with self._turn:
            if self.phase is Phase.STOPPED:
                return False
            self._parts = _Parts(found, prompts, engine)
            self.ready = True
            self.phase = Phase.READY
        logger.info("%s is ready after %.1f s", self.name, time.monotonic() - started)
        return True

    def stop(self) -> None:
        """Stop being ready, and end the engine; what still runs is cut off. May be called twice."""
        with self._turn:
            self.ready = False
            self.phase = Phase.STOPPED
            if self._engine is not None:
                self._engine.stop()

    @property
    def live(self) -> bool:
        """Whether the step loop runs, or has not been started yet."""
        return self._parts is None or self._parts.engine.is_alive

    async def healthy(self) -> bool:
        """Whether a request would be answered now."""
        return self.ready and self.live

    def get_input_types(self) -> list[dict[str, Any]]:
        """The inputs of v2 infer, for the model's metadata."""
        return v2.metadata(v2.INPUTS)

    def get_output_types(self) -> list[dict[str, Any]]:
        """The outputs of v2 infer, for the model's metadata."""
        return v2.metadata(v2.OUTPUTS)

    async def predict(
        self, payload: kserve.InferRequest | dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> kserve.InferResponse:
        """Answer every prompt of a v2 request, all in one batch.

        Raises:
            RequestError: the request cannot be answered, and why.
        """
        del headers
        if not isinstance(payload, kserve.InferRequest):
            raise InvalidRequest(f"This route is not served; POST /v2/models/{self.name}/infer instead.")
        completions = await self.complete(v2.decode(payload))
        return v2.encode(payload, completions)

    async def complete(self, requests: list[GenerationRequest]) -> list[Completion]:
        """The completions of several requests, in their order; the first failure cancels the others.

        Raises:
            RequestError: one of them cannot be answered.
        """
        if self._parts is None or not self.ready:
            raise ModelNotReady(f"The model {self.name} is not ready: {self.phase}; ask again in a moment.")
        parts = self._parts
        prepared = [parts.prompts.encode(request) for request in requests]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_complete(parts, prompt, sampling)) for prompt, sampling in prepared]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]


async def _complete(parts: _Parts, prompt: list[int], sampling: SamplingParams) -> Completion:
    detokenizer = Detokenizer(parts.prompts.tokenizer, sampling.stop)
    text, generated, finish_reason = "", 0, None
    async with aclosing(parts.engine.generate(prompt, sampling)) as steps:
        async for step in steps:
            generated += len(step.token_ids)
            finish_reason = step.finish_reason
            spoken = step.token_ids[:-1] if finish_reason is FinishReason.EOS_TOKEN else step.token_ids
            text += detokenizer.push(spoken, last=finish_reason is not None)
            if detokenizer.stopped:
                finish_reason = FinishReason.STOP_SEQUENCE
                break
    if finish_reason is None:
        raise GenerationFailed("The engine ended without saying why; the server's log says more.")
    return Completion(text, finish_reason, prompt_tokens=len(prompt), completion_tokens=generated)
