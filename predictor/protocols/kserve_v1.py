"""KServe's v1 protocol: `instances` in, `predictions` out, in order; an instance is a prompt or a list of messages.

Specification: kserve/website, docs on the v1 protocol. Sampling stands in `parameters`, beside `instances`.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from predictor.errors import InvalidRequest
from predictor.protocols.json_body import loads, schema, sentence
from predictor.protocols.sampling_fields import Sampling
from predictor.types import Chat, Completion, GenerationRequest


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str


def _kind(instance: object) -> str | None:
    if isinstance(instance, str):
        return "prompt"
    return "messages" if isinstance(instance, list) else None


_Instance = Annotated[
    Annotated[str, Field(min_length=1), Tag("prompt")]
    | Annotated[list[_Message], Field(min_length=1), Tag("messages")],
    Discriminator(_kind, custom_error_type="kind", custom_error_message="expected a prompt or a list of messages"),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    instances: list[_Instance] = Field(min_length=1)
    parameters: Sampling = Sampling()


REQUEST_SCHEMA = schema(_Body)
"""JSON schema of a request's body."""


def decode(body: bytes) -> list[GenerationRequest]:
    """One generation request for each instance, in order.

    Raises:
        InvalidRequest: not JSON, or a field is missing, unknown or out of range; the message names it.
    """
    try:
        parsed = _Body.model_validate(loads(body))
    except ValidationError as error:
        known = {*_Body.model_fields, *(f"parameters.{name}" for name in Sampling.model_fields)}
        raise InvalidRequest(sentence(error, known=known)) from None
    sampling = parsed.parameters.sampling()
    return [GenerationRequest(_prompt(instance), sampling) for instance in parsed.instances]


def encode(completions: Sequence[Completion]) -> dict[str, Any]:
    """The response as a JSON object."""
    return {"predictions": [completion.text for completion in completions]}


def _prompt(instance: str | list[_Message]) -> str | Chat:
    if isinstance(instance, str):
        return instance
    return Chat(tuple(message.model_dump() for message in instance))
