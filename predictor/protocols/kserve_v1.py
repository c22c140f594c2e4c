"""KServe v1 protocol: `instances` -> `predictions`, in order; an instance is a prompt or a list of messages.

Specification: kserve/website, docs on the v1 protocol. Sampling fields are in `parameters`, next to `instances`.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from predictor.protocols.best_of import best
from predictor.protocols.json_body import json_schema, loads
from predictor.protocols.json_object import JSONObject, validate
from predictor.protocols.sampling_fields import SamplingFields
from predictor.types import Chat, Completion, GenerationRequest


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str


def _instance_tag(instance: object) -> str | None:
    if isinstance(instance, str):
        return "prompt"
    return "messages" if isinstance(instance, list) else None


_Instance = Annotated[
    Annotated[str, Field(min_length=1), Tag("prompt")]
    | Annotated[list[_Message], Field(min_length=1), Tag("messages")],
    Discriminator(
        _instance_tag, custom_error_type="instance", custom_error_message="expected a prompt or a list of messages"
    ),
]


class _PredictRequest(JSONObject):
    instances: list[_Instance] = Field(min_length=1)
    parameters: SamplingFields = SamplingFields()


REQUEST_SCHEMA = json_schema(_PredictRequest)
"""JSON schema of the request body."""


def decode(body: bytes) -> list[GenerationRequest]:
    """Return one generation request per instance, in order.

    Raises:
        InvalidRequest: not JSON, or a field is missing, not supported or out of range; the message names it.
    """
    request = validate(_PredictRequest, loads(body))
    sampling, candidates = request.parameters.to_sampling_params(), request.parameters.num_candidates()
    return [GenerationRequest(_prompt(instance), sampling, candidates) for instance in request.instances]


def encode(requests: Sequence[GenerationRequest], completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the response as a JSON object, with the best completion of each request."""
    chosen = best(completions, n=1, candidates=requests[0].n)
    return {"predictions": [completion.text for completion in chosen]}


def _prompt(instance: str | list[_Message]) -> str | Chat:
    if isinstance(instance, str):
        return instance
    return Chat(tuple(message.model_dump() for message in instance))
