"""Rerank (Jina's and Cohere's form) and score (vLLM's): JSON bodies -> pairs of texts, and scores -> responses."""

import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from predictor.errors import InvalidRequest
from predictor.protocols.field_tables import HARMLESS_PARAMETERS, REFUSED_RERANK
from predictor.protocols.field_validators import wrap_string
from predictor.protocols.json_body import json_schema
from predictor.protocols.json_object import JSONObject, validate_body
from predictor.protocols.openai.embeddings import MAX_INPUTS, TruncateTokens, usage
from predictor.types import Pooled, PoolingRequest, Task


class _Document(JSONObject):
    text: str


def _to_document(document: object) -> object:
    return {"text": document} if isinstance(document, str) else document


class _PairRequest(JSONObject):
    harmless = HARMLESS_PARAMETERS
    refused = REFUSED_RERANK

    model: str | None = None
    truncate_prompt_tokens: TruncateTokens | None = None


class _RerankRequest(_PairRequest):
    """Body of `POST /v1/rerank`."""

    query: str
    documents: Annotated[
        list[Annotated[_Document, BeforeValidator(_to_document, str | _Document)]],
        Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True),
    ]
    top_n: int | None = Field(default=None, ge=1, description="Number of results; default: all.")
    return_documents: bool = True


_Texts = Annotated[
    list[str],
    Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True),
    BeforeValidator(wrap_string, str | list[str]),
]


class _ScoreRequest(_PairRequest):
    """Body of `POST /v1/score`."""

    text_1: _Texts
    text_2: _Texts


RERANK_SCHEMA, SCORE_SCHEMA = json_schema(_RerankRequest), json_schema(_ScoreRequest)


@dataclass(frozen=True, slots=True)
class DecodedRerank:
    """Documents to order by their relevance for a query."""

    request: PoolingRequest
    model: str | None
    top_n: int | None
    documents: list[str] | None
    """To return; None: indices only."""


def decode_rerank(body: bytes) -> DecodedRerank:
    """Decode a rerank request.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong or not supported; the message names it.
    """
    content = validate_body(_RerankRequest, body)
    documents = [document.text for document in content.documents]
    request = _request([(content.query, document) for document in documents], content)
    return DecodedRerank(request, content.model, content.top_n, documents if content.return_documents else None)


def encode_rerank(decoded: DecodedRerank, pooled: Pooled, model: str) -> dict[str, Any]:
    """Return the response: the most relevant documents first."""
    scores = pooled.vectors[:, 0].tolist()
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: decoded.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if decoded.documents is not None:
        for result in results:
            result["document"] = {"text": decoded.documents[result["index"]]}
    return {"id": f"rerank-{uuid.uuid4().hex}", "model": model, "usage": usage(pooled), "results": results}


def decode_score(body: bytes) -> tuple[PoolingRequest, str | None]:
    """Return the pairs of a score request, one text with each of the others or two lists in pairs, and the model.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong or not supported; the message names it.
    """
    content = validate_body(_ScoreRequest, body)
    first, second = content.text_1, content.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise InvalidRequest(
            f"text_1 has {len(first)} texts, and text_2 {len(second)}. Send one text_1, or as many as text_2.", "text_1"
        )
    return _request(list(zip(first, second, strict=True)), content), content.model


def encode_score(pooled: Pooled, model: str) -> dict[str, Any]:
    """Return the response, in the order of the pairs."""
    scores = pooled.vectors[:, 0].tolist()
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
        "usage": usage(pooled),
    }


def _request(pairs: list[tuple[str, str]], content: _PairRequest) -> PoolingRequest:
    return PoolingRequest(
        task=Task.CLASSIFY,
        inputs=pairs,
        single_score=True,
        truncate_prompt_tokens=content.truncate_prompt_tokens,
    )


def _usage(pooled: Pooled) -> dict[str, int]:
    return {"prompt_tokens": pooled.prompt_tokens, "total_tokens": pooled.prompt_tokens}
