"""OpenAI's embeddings: a JSON body -> texts or token ids, and vectors -> the response."""

import base64
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from predictor.protocols.field_tables import HARMLESS_PARAMETERS, REFUSED_EMBEDDING
from predictor.protocols.field_validators import Prompt, one_issue, wrap_prompt
from predictor.protocols.json_body import json_schema
from predictor.protocols.json_object import JSONObject, validate_body
from predictor.protocols.sampling_fields import TruncatePromptTokens
from predictor.types import Pooled, PoolingRequest, Task

MAX_INPUTS = 2048
"""Maximum number of inputs of a request, as in OpenAI's API."""

TruncateTokens = Annotated[
    TruncatePromptTokens, Field(description="Tokens of an input to keep; -1: all that the model takes.")
]


class _EmbeddingRequest(JSONObject):
    """Body of `POST /v1/embeddings`."""

    harmless = HARMLESS_PARAMETERS
    refused = REFUSED_EMBEDDING

    model: str
    input: Annotated[
        list[Prompt],
        Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True),
        one_issue(
            f"expected a string, a list of strings, of token ids or of lists of token ids, up to {MAX_INPUTS} and "
            "none of them empty",
            list[Prompt],
        ),
        BeforeValidator(wrap_prompt, Prompt | list[Prompt]),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, description="Leading dimensions to keep, for Matryoshka models.")
    prompt_name: str | None = None
    """Name of a prompt of the snapshot to put before each text, as in Sentence Transformers."""
    truncate_prompt_tokens: TruncateTokens | None = None


EMBEDDING_SCHEMA = json_schema(_EmbeddingRequest)


@dataclass(frozen=True, slots=True)
class DecodedEmbedding:
    """A request for embeddings, and the options of its response."""

    request: PoolingRequest
    model: str
    as_base64: bool


def decode(body: bytes) -> DecodedEmbedding:
    """Decode a request for embeddings.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong or not supported; the message names it.
    """
    content = validate_body(_EmbeddingRequest, body)
    request = PoolingRequest(
        task=Task.EMBED,
        inputs=[input_ if isinstance(input_, str) else tuple(input_) for input_ in content.input],
        dimensions=content.dimensions,
        prompt_name=content.prompt_name,
        truncate_prompt_tokens=content.truncate_prompt_tokens,
    )
    return DecodedEmbedding(request, content.model, content.encoding_format == "base64")


def encode(decoded: DecodedEmbedding, pooled: Pooled) -> dict[str, Any]:
    """Return the response; base64 is of little-endian float32."""
    vectors = pooled.vectors.astype("<f4")
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.tobytes()).decode() if decoded.as_base64 else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": decoded.model, "usage": usage(pooled)}


def usage(pooled: Pooled) -> dict[str, int]:
    """Return the token counts."""
    return {"prompt_tokens": pooled.prompt_tokens, "total_tokens": pooled.prompt_tokens}
