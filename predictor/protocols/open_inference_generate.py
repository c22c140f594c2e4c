"""Generate extension of the Open Inference Protocol: one prompt -> its completion, whole or as server-sent events.

Specification: kserve/open-inference-protocol, specification/protocol/generate_rest.yaml. Defaults are the
specification's (temperature 1, 20 tokens); all parameters of `SamplingFields` are accepted.

In a stream the last event has `details`, since the specification requires a finish reason in it. `token` is the last
token there, and `logprobs` has all of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from predictor.errors import InvalidRequest, RequestError
from predictor.protocols.json_body import format_validation_error, json_schema, loads
from predictor.protocols.sampling_fields import SamplingFields
from predictor.types import Completion, CompletionDelta, GenerationRequest, Token


class _Parameters(SamplingFields):
    temperature: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    max_tokens: int | None = Field(default=20, ge=1)
    details: bool = Field(default=False, description="Return finish_reason and logprobs.")


class _GenerateRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text_input: str = Field(min_length=1)
    parameters: _Parameters = _Parameters()


REQUEST_SCHEMA = json_schema(_GenerateRequest)
"""JSON schema of the request body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedRequest:
    """A generation request, and the options of its response."""

    request: GenerationRequest
    details: bool
    model: dict[str, str]
    """Fields that name the model in every response."""


def decode(body: bytes, model_name: str, version: str | None) -> DecodedRequest:
    """Decode a JSON body; the route has the model's name, and may have its version.

    Raises:
        InvalidRequest: not JSON, or a field is missing, unknown or out of range; the message names it.
    """
    try:
        parsed = _GenerateRequest.model_validate(loads(body))
    except ValidationError as error:
        allowed = {*_GenerateRequest.model_fields, *(f"parameters.{name}" for name in _Parameters.model_fields)}
        raise InvalidRequest(format_validation_error(error, allowed=allowed)) from None
    details = parsed.parameters.details
    sampling = parsed.parameters.to_sampling_params(logprobs=0 if details else None)
    model = {"model_name": model_name} | ({} if version is None else {"model_version": version})
    return DecodedRequest(request=GenerationRequest(parsed.text_input, sampling), details=details, model=model)


def encode(decoded: DecodedRequest, completion: Completion) -> dict[str, Any]:
    """Return the response as a JSON object."""
    response: dict[str, Any] = {"text_output": completion.text, **decoded.model}
    if decoded.details:
        logprobs = _logprobs(completion.tokens)
        response["details"] = {"finish_reason": completion.finish_reason.value, "logprobs": logprobs}
    return response


class EventEncoder:
    """Encoder of one completion as server-sent events."""

    def __init__(self, decoded: DecodedRequest) -> None:
        self._decoded = decoded
        self._tokens: list[Token] = []

    def begin(self) -> list[str]:
        """Return the events before the first delta: none."""
        return []

    def delta(self, delta: CompletionDelta) -> list[str]:
        """Return the event of a delta, if it has text or a finish reason."""
        self._tokens += delta.tokens
        if not delta.text and delta.finish_reason is None:
            return []
        event: dict[str, Any] = {"text_output": delta.text, **self._decoded.model}
        if self._decoded.details and delta.finish_reason is not None:
            logprobs = _logprobs(self._tokens)
            event["details"] = {"finish_reason": delta.finish_reason.value, "token": logprobs[-1], "logprobs": logprobs}
        return [_event(event)]

    def end(self) -> list[str]:
        """Return the events after the last delta: none."""
        return []

    def error(self, error: RequestError) -> list[str]:
        """Return the last event of a stream that fails."""
        return [_event({"error": str(error)})]


def _logprobs(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [
        {"id": token.id, "text": token.text, "logprob": token.logprob, "special": token.special} for token in tokens
    ]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
