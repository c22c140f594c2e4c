"""The `kserve.Model` of the predictor: KServe's hooks around `LLMService`."""

import math
from collections.abc import Mapping
from typing import Any

import kserve

from predictor.entrypoints import response_encoding
from predictor.errors import InvalidRequest
from predictor.generation.service import LLMService
from predictor.protocols import open_inference, open_inference_pooling
from predictor.protocols.sampling_fields import timeout_seconds
from predictor.types import Task


class Predictor(kserve.Model):
    """Answer Open Inference Protocol v2 requests with an `LLMService`."""

    def __init__(self, service: LLMService) -> None:
        self._service = service
        super().__init__(service.models.default)

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be answered."""
        return self._service.is_ready

    @ready.setter
    def ready(self, _: bool) -> None:
        """Ignore KServe's own assignments; the service decides."""

    def load(self) -> bool:
        """Load the model; see `LLMService.load`."""
        return self._service.load()

    def stop(self) -> None:
        """Stop the service; KServe calls this when it unloads the model."""
        self._service.stop()

    async def healthy(self) -> bool:
        """Return whether a request sent now would be answered."""
        return self._service.is_ready

    async def predict(
        self, payload: kserve.InferRequest | dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> kserve.InferResponse:
        """Complete all prompts of a v2 request in one batch, or embed or classify its texts.

        Args:
            payload: from `open_inference.parse` or `open_inference.from_grpc`.
            headers: may hold `sampling_fields.TIMEOUT_HEADER`, the client's limit.

        Raises:
            RequestError: the request is invalid or failed.
        """
        if not isinstance(payload, kserve.InferRequest):
            raise InvalidRequest(f"KServe v1 payloads are not supported here. POST /v1/models/{self.name}:predict.")
        timeout = timeout_seconds(headers or {})
        if self._service.is_loading:
            # What a model does is known once it is loaded.
            num_texts = math.prod(payload.inputs[0].shape) if payload.inputs else 1
            await self._service.wait_for_load(max(1, num_texts), timeout)
        if (task := self._pooling_task) is not None:
            pooled = await self._service.pool(open_inference_pooling.decode(payload, task), timeout)
            size = pooled.vectors.size
            return await response_encoding.encode(size, lambda: open_inference_pooling.encode(payload, task, pooled))
        stream = await self._service.submit(open_inference.decode(payload), timeout)
        try:
            completions = await stream.complete()
            values = response_encoding.num_values(completions)
            return await response_encoding.encode(values, lambda: open_inference.encode(payload, completions))
        finally:
            stream.close()

    def get_input_types(self) -> list[dict[str, Any]]:
        """Return the input tensors of v2 infer."""
        task = self._pooling_task
        return open_inference_pooling.inputs(task) if task else open_inference.metadata(open_inference.INPUTS)

    def get_output_types(self) -> list[dict[str, Any]]:
        """Return the output tensors of v2 infer."""
        task = self._pooling_task
        return open_inference_pooling.outputs(task) if task else open_inference.metadata(open_inference.OUTPUTS)

    @property
    def _pooling_task(self) -> Task | None:
        """EMBED or CLASSIFY; None if the model generates, or is not loaded."""
        return None if self._service.task in (None, Task.GENERATE) else self._service.task
