"""Open Inference Protocol v2 `infer` of models that embed or classify: texts in, one FP32 tensor out."""

import uuid
from collections.abc import Sequence
from typing import Any

from kserve import InferInput, InferOutput, InferRequest, InferResponse
from pydantic import Field

from predictor.errors import InvalidRequest
from predictor.protocols.json_object import JSONObject, validate
from predictor.protocols.open_inference import TEXT_INPUT, decode_texts
from predictor.protocols.open_inference_binary import binary_parameters
from predictor.protocols.openai.embeddings import TruncateTokens
from predictor.types import Pooled, PoolingRequest, Task

TEXT_PAIR = "text_pair"
"""Input of classifiers: the second text of each pair."""
_OUTPUTS = {Task.EMBED: "embedding", Task.CLASSIFY: "score"}


class _ClassifyParameters(JSONObject):
    truncate_prompt_tokens: TruncateTokens | None = None


class _EmbedParameters(_ClassifyParameters):
    dimensions: int | None = Field(default=None, ge=1)
    prompt_name: str | None = None


def inputs(task: Task) -> list[dict[str, Any]]:
    """Return the inputs for the model's metadata."""
    names = (TEXT_INPUT, TEXT_PAIR) if task is Task.CLASSIFY else (TEXT_INPUT,)
    return [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in names]


def outputs(task: Task) -> list[dict[str, Any]]:
    """Return the output for the model's metadata."""
    return [{"name": _OUTPUTS[task], "datatype": "FP32", "shape": [-1, -1]}]


def decode(request: InferRequest, task: Task) -> PoolingRequest:
    """Return the texts, or the pairs of texts, of a request.

    Raises:
        InvalidRequest: an input or output is unknown, or a parameter is not supported; the message names it.
    """
    binary_parameters(request.parameters)
    for index, output in enumerate(request.request_outputs or ()):
        if output.name != _OUTPUTS[task]:
            raise InvalidRequest(f"outputs.{index}.name is {output.name!r}: expected {_OUTPUTS[task]}.")
    texts = _texts(request.inputs, task)
    merged = {**(request.parameters or {}), **(request.inputs[0].parameters or {})}
    merged.pop("binary_data_output", None)
    model = _EmbedParameters if task is Task.EMBED else _ClassifyParameters
    parameters = validate(model, merged, "parameters.").model_dump()
    values: Sequence[Any] = texts[TEXT_INPUT]
    if TEXT_PAIR in texts:
        if len(texts[TEXT_PAIR]) != len(values):
            raise InvalidRequest(f"{TEXT_PAIR} has {len(texts[TEXT_PAIR])} elements, and {TEXT_INPUT} {len(values)}.")
        values = list(zip(values, texts[TEXT_PAIR], strict=True))
    return PoolingRequest(task=task, inputs=values, **parameters)


def encode(request: InferRequest, task: Task, pooled: Pooled) -> InferResponse:
    """Return the response, whose tensor has one row for each input."""
    vectors = pooled.vectors
    output = InferOutput(_OUTPUTS[task], list(vectors.shape), "FP32", vectors.ravel().tolist())
    return InferResponse(
        response_id=request.id or str(uuid.uuid4()), model_name=request.model_name, infer_outputs=[output]
    )


def _texts(tensors: Sequence[InferInput], task: Task) -> dict[str, list[str]]:
    known = [tensor["name"] for tensor in inputs(task)]
    texts: dict[str, list[str]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.name not in known or tensor.name in texts:
            raise InvalidRequest(f"inputs.{index}.name is {tensor.name!r}: expected {' and '.join(known)}, each once.")
        if tensor.datatype != "BYTES":
            raise InvalidRequest(f"inputs.{index}.datatype is {tensor.datatype!r}: {tensor.name} is BYTES.")
        texts[tensor.name] = decode_texts(tensor, f"inputs.{index}")
    if TEXT_INPUT not in texts:
        raise InvalidRequest(f"inputs has no {TEXT_INPUT}. Add it.")
    return texts
