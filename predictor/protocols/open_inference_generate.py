"""Generate extension of the Open Inference Protocol: one prompt -> its completion, whole or as server-sent events.

Specification: kserve/open-inference-protocol, specification/protocol/generate_rest.yaml. Defaults are the
specification's (temperature 1, 20 tokens); all parameters of `SamplingFields` are accepted. As in Triton, parameters
may be at the top level too, and an `id` comes back.

In a stream the last event has `details`, since the specification requires a finish reason in it. `token` is the last
token there, and `logprobs` has all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from predictor.errors import InvalidRequest, RequestError
from predictor.protocols.best_of import best
from predictor.protocols.json_body import json_schema, loads
from predictor.protocols.json_object import validate
from predictor.protocols.sampling_fields import MAX_TOKENS, MaxTokens, PromptLogprobs, SamplingFields, Stop
from predictor.protocols.server_sent_events import encode_event
from predictor.types import Completion, CompletionDelta, FinishReason, GenerationRequest, Token


class _Parameters(SamplingFields):
    temperature: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    max_tokens: MaxTokens | None = Field(default=20, description=MAX_TOKENS)
    stop_words: Stop = Field(default=[], description="TensorRT-LLM's name of stop.")
    details: bool = Field(default=False, description="Return finish_reason and logprobs.")
    prompt_logprobs: PromptLogprobs | None = None
    exclude_input_in_output: bool = Field(default=True, description="Triton's; false puts the prompt first.")

    def set_values(self) -> dict[str, Any]:
        """Return the parameters that the request sets."""
        return {name: getattr(self, name) for name in _Parameters.model_fields if name in self.model_fields_set}


class _GenerateRequest(_Parameters):
    text_input: str = Field(min_length=1)
    id: str | None = None
    parameters: _Parameters = _Parameters()

    def merged_parameters(self) -> _Parameters:
        """Return `parameters` with those next to it, where Triton has them; the former take precedence."""
        values = self.set_values() | self.parameters.set_values()
        values["stop"] = [*values.get("stop", []), *values.get("stop_words", [])]
        return _Parameters().model_copy(update=values)


REQUEST_SCHEMA = json_schema(_GenerateRequest)
"""JSON schema of the request body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedRequest:
    """A generation request, and the options of its response."""

    request: GenerationRequest
    details: bool
    head: dict[str, str]
    """Fields of every response that name the request, if it has an id, and the model."""


def decode(body: bytes, model_name: str, version: str | None) -> DecodedRequest:
    """Decode a JSON body; the route has the model's name, and may have its version.

    Raises:
        InvalidRequest: not JSON, or a field is missing, not supported or out of range; the message names it.
    """
    parsed = validate(_GenerateRequest, loads(body))
    parameters = parsed.merged_parameters()
    details = parameters.details or parameters.prompt_logprobs is not None
    sampling = parameters.to_sampling_params(logprobs=0 if details else None)
    sampling = replace(sampling, prompt_logprobs=parameters.prompt_logprobs)
    request = GenerationRequest(
        parsed.text_input, sampling, parameters.num_candidates(), echo=not parameters.exclude_input_in_output
    )
    fields = {"id": parsed.id, "model_name": model_name, "model_version": version}
    head = {name: value for name, value in fields.items() if value is not None}
    return DecodedRequest(request=request, details=details, head=head)


def decode_stream(body: bytes, model_name: str, version: str | None) -> DecodedRequest:
    """Decode the body of a request for a stream; see `decode`."""
    decoded = decode(body, model_name, version)
    if decoded.request.n > 1:
        raise InvalidRequest("best_of is not possible in a stream, since all candidates are compared. Omit it.")
    return decoded


def encode(decoded: DecodedRequest, completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the response as a JSON object, with the best of the completions."""
    [completion] = best(completions, n=1, candidates=decoded.request.n)
    response: dict[str, Any] = {"text_output": completion.text, **decoded.head}
    if decoded.details:
        response["details"] = _details(completion.finish_reason, completion.tokens, completion.prompt)
    return response


class EventEncoder:
    """Encoder of one completion as server-sent events."""

    def __init__(self, decoded: DecodedRequest) -> None:
        self._decoded = decoded
        self._tokens: list[Token] = []
        self._prompt: list[Token] = []

    def begin(self) -> list[str]:
        """Return the events before the first delta: none."""
        return []

    def delta(self, delta: CompletionDelta) -> list[str]:
        """Return the event of a delta, if it has text or a finish reason."""
        self._tokens += delta.tokens
        self._prompt += delta.prompt
        if not delta.text and delta.finish_reason is None:
            return []
        event: dict[str, Any] = {"text_output": delta.text, **self._decoded.head}
        if self._decoded.details and delta.finish_reason is not None:
            event["details"] = _details(delta.finish_reason, self._tokens, self._prompt)
            if self._tokens:
                event["details"]["token"] = event["details"]["logprobs"][-1]
        return [encode_event(event)]

    def end(self) -> list[str]:
        """Return the events after the last delta: none."""
        return []

    def error(self, error: RequestError) -> list[str]:
        """Return the last event of a stream that fails."""
        return [encode_event({"error": str(error)})]


def _details(reason: FinishReason, tokens: Sequence[Token], prompt: Sequence[Token]) -> dict[str, Any]:
    details: dict[str, Any] = {"finish_reason": reason.value, "logprobs": [_logprob(token) for token in tokens]}
    if prompt:
        details["prompt_logprobs"] = [
            {**_logprob(token), "rank": token.rank, "top": [_logprob(other) for other in token.top]} for token in prompt
        ]
    return details


def _logprob(token: Token) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": token.logprob, "special": token.special}
