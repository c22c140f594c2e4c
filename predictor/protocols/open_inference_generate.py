"""The Open Inference Protocol's generate extension: one prompt, its completion whole or as server-sent events.

Specification: kserve/open-inference-protocol, specification/protocol/generate_rest.yaml. Its defaults hold
(temperature 1, 20 tokens), its parameters may be more: those of `fields.Sampling`.

In a stream, `details` comes with the last event, since the specification wants a finish reason in it; there it has
the last token, and all of them in `logprobs`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from predictor.errors import InvalidRequest, RequestError
from predictor.protocols.json_body import loads, schema, sentence
from predictor.protocols.sampling_fields import Sampling
from predictor.types import Completion, CompletionDelta, GenerationRequest, Token


class _Parameters(Sampling):
    temperature: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    max_tokens: int | None = Field(default=20, ge=1)
    details: bool = Field(default=False, description="Give finish_reason and logprobs.")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text_input: str = Field(min_length=1)
    parameters: _Parameters = _Parameters()


REQUEST_SCHEMA = schema(_Body)
"""JSON schema of a request's body."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what its answer needs to know."""

    request: GenerationRequest
    details: bool
    model: dict[str, str]
    """What names the model in every answer."""


def decode(body: bytes, model_name: str, version: str | None) -> Asked:
    """The request in a JSON body.

    Args:
        body: of the request.
        model_name: of the route.
        version: of the model, where the route named it.

    Raises:
        InvalidRequest: not JSON, or a field is missing, unknown or out of range; the message names it.
    """
    try:
        parsed = _Body.model_validate(loads(body))
    except ValidationError as error:
        known = {*_Body.model_fields, *(f"parameters.{name}" for name in _Parameters.model_fields)}
        raise InvalidRequest(sentence(error, known=known)) from None
    parameters = parsed.parameters
    sampling = parameters.sampling(logprobs=0 if parameters.details else None)
    model = {"model_name": model_name} | ({} if version is None else {"model_version": version})
    return Asked(GenerationRequest(parsed.text_input, sampling), parameters.details, model)


def encode(asked: Asked, completion: Completion) -> dict[str, Any]:
    """The response as a JSON object."""
    response: dict[str, Any] = {"text_output": completion.text, **asked.model}
    if asked.details:
        response["details"] = {
            "finish_reason": completion.finish_reason.value,
            "logprobs": _tokens(completion.tokens),
        }
    return response


class Stream:
    """The events of one completion."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._tokens: list[Token] = []

    def begin(self) -> list[str]:
        """Nothing comes before the first piece."""
        return []

    def piece(self, piece: CompletionDelta) -> list[str]:
        """The events for a piece: one, or none if there is nothing to say."""
        self._tokens += piece.tokens
        if not piece.text and piece.finish_reason is None:
            return []
        event: dict[str, Any] = {"text_output": piece.text, **self._asked.model}
        if self._asked.details and piece.finish_reason is not None:
            tokens = _tokens(self._tokens)
            event["details"] = {"finish_reason": piece.finish_reason.value, "token": tokens[-1], "logprobs": tokens}
        return [_event(event)]

    def end(self) -> list[str]:
        """Nothing comes after the last piece."""
        return []

    def error(self, error: RequestError) -> list[str]:
        """The last event of a stream that fails."""
        return [_event({"error": str(error)})]


def _tokens(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [
        {"id": token.id, "text": token.text, "logprob": token.logprob, "special": token.special} for token in tokens
    ]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
