"""Open Inference Protocol v2, infer over REST: bytes <-> KServe's request and response <-> generation requests.

One request carries n prompts in one BYTES input, and gets n completions in order:

    text_input  raw prompts, as they are
    messages    chats; each element is a JSON list of {"role": …, "content": …}, put into the model's chat template

`decode` and `encode` work on KServe's own types, whatever brought them; `parse` and `serialize` are the wire: JSON, and
the binary tensor data extension, in which the data of tensors follows the JSON.
Specification: kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

import contextlib
import json
import math
import re
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import numpy
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.protocol.infer_type import (
    RequestedOutput,
    deserialize_bytes_tensor,
    serialize_byte_tensor,
    to_http_parameters,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from predictor.errors import InvalidRequest
from predictor.protocols.json_body import loads, schema, sentence
from predictor.protocols.sampling_fields import MAX_LOGPROBS, Sampling
from predictor.types import Chat, Completion, GenerationRequest, Message, SamplingParams

TEXT_INPUT = "text_input"
MESSAGES = "messages"
TEXT_OUTPUT = "text_output"
LOGPROBS = "logprobs"

INPUTS = {TEXT_INPUT: "BYTES", MESSAGES: "BYTES"}
"""Datatypes of the inputs, of which a request has exactly one."""
OUTPUTS = {
    TEXT_OUTPUT: "BYTES",
    "finish_reason": "BYTES",
    "prompt_tokens": "INT64",
    "completion_tokens": "INT64",
    LOGPROBS: "BYTES",
}
"""Datatypes of the outputs; a request that selects none gets the text alone. An element of `logprobs` is a JSON list
of tokens."""

EXTENSIONS = ("binary_tensor_data", "generate", "generate_stream")
"""What the server's metadata says it speaks beyond the protocol."""

SERVER = "kserve-llm"
"""The server's name in its metadata, and the distribution whose version it tells."""
PLATFORM = "transformers_safetensors"
"""What the model's metadata calls its format: project and format."""

VERSION = "1"
"""The one version of the one model, for routes that name a version."""

HEADER_LENGTH = "inference-header-content-length"
"""The header, in lower case, that tells how many bytes of a body are JSON, where binary tensors follow."""

Scalar = str | int | float | bool


class _Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(min_length=1)
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class _Output(BaseModel):
    name: str
    parameters: dict[str, Scalar] = {}


class _Body(BaseModel):
    """An infer request as JSON; fields that the protocol does not know are ignored, as it asks."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[_Tensor] = Field(min_length=1)
    outputs: list[_Output] | None = None


class _Parameters(Sampling):
    """What `parameters` may say, of the request or of its input; unknown names are refused."""

    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="So many rivals of each token in the output logprobs."
    )


class _Binary(BaseModel):
    """What `parameters` may say of binary tensors, beside the sampling."""

    model_config = ConfigDict(strict=True)

    binary_data_size: int | None = Field(default=None, ge=0)
    binary_data_output: bool = False
    binary_data: bool | None = None


REQUEST_SCHEMA = schema(_Body)
"""JSON schema of a request's body."""


def metadata(tensors: Mapping[str, str]) -> list[dict[str, Any]]:
    """INPUTS or OUTPUTS as a model's metadata lists them; -1 is any number of prompts."""
    return [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in tensors.items()]


def parse(body: bytes, model_name: str, header_length: str | None = None) -> InferRequest:
    """The request in a body; its shape is checked, its meaning is not.

    Args:
        body: JSON, and, if there is a header length, the data of binary tensors after it.
        model_name: of the route.
        header_length: bytes of the JSON, as the header says.

    Raises:
        InvalidRequest: not JSON, or a field is missing or of the wrong type; the message names it.
    """
    size = _header_size(header_length, len(body))
    try:
        parsed = _Body.model_validate(loads(body[:size]))
    except ValidationError as error:
        raise InvalidRequest(sentence(error)) from None
    rest = memoryview(body)[size:]
    inputs = []
    for index, tensor in enumerate(parsed.inputs):
        taken, data = _data(tensor, rest, f"inputs.{index}")
        rest = rest[taken:]
        parameters = {name: value for name, value in tensor.parameters.items() if name != "binary_data_size"}
        inputs.append(InferInput(tensor.name, tensor.shape, tensor.datatype, data, parameters))
    if rest:
        raise InvalidRequest(f"{len(rest)} bytes follow the last tensor; give each tensor's binary_data_size.")
    return InferRequest(
        model_name=model_name,
        infer_inputs=inputs,
        request_id=parsed.id,
        parameters=parsed.parameters,
        request_outputs=None
        if parsed.outputs is None
        else [RequestedOutput(output.name, output.parameters) for output in parsed.outputs],
    )


def decode(request: InferRequest) -> list[GenerationRequest]:
    """One generation request for each prompt, in order.

    Raises:
        InvalidRequest: an input, output or parameter is unknown, missing or out of range; the message names it.
    """
    _binary(request.parameters)
    selected = _selected(request)
    if len(request.inputs) != 1:
        names = ", ".join(tensor.name for tensor in request.inputs)
        raise InvalidRequest(f"inputs has {names or 'nothing'}: expected one of {', '.join(INPUTS)}.")
    tensor = request.inputs[0]
    if tensor.name not in INPUTS:
        raise InvalidRequest(f"inputs.0.name is {tensor.name!r}: expected {' or '.join(INPUTS)}.")
    if tensor.datatype != INPUTS[tensor.name]:
        raise InvalidRequest(f"inputs.0.datatype is {tensor.datatype!r}: {tensor.name} is {INPUTS[tensor.name]}.")
    sampling = _sampling(request, tensor, LOGPROBS in selected)
    as_prompt = _chat if tensor.name == MESSAGES else _raw
    return [
        GenerationRequest(as_prompt(text, f"inputs.0.data.{index}"), sampling)
        for index, text in enumerate(_texts(tensor))
    ]


def encode(request: InferRequest, completions: Sequence[Completion]) -> InferResponse:
    """The response to a request whose prompts were completed, in the shape of its input."""
    columns: dict[str, list[Any]] = {
        TEXT_OUTPUT: [completion.text for completion in completions],
        "finish_reason": [completion.finish_reason.value for completion in completions],
        "prompt_tokens": [completion.prompt_tokens for completion in completions],
        "completion_tokens": [completion.completion_tokens for completion in completions],
        LOGPROBS: [json.dumps([asdict(token) for token in completion.tokens]) for completion in completions],
    }
    shape = request.inputs[0].shape
    return InferResponse(
        response_id=request.id or str(uuid.uuid4()),
        model_name=request.model_name,
        infer_outputs=[InferOutput(name, shape, OUTPUTS[name], columns[name]) for name in _selected(request)],
    )


def serialize(request: InferRequest, response: InferResponse, version: str | None) -> tuple[bytes, int | None]:
    """The body of a response, nothing in it null, and the bytes of its JSON where binary tensors follow.

    Args:
        request: says which outputs are to be binary.
        response: from `encode`.
        version: of the model, where the route named it.
    """
    everything = _binary(request.parameters).binary_data_output
    asked = {output.name: _binary(output.parameters).binary_data for output in request.request_outputs or ()}
    outputs, tail = [], b""
    for output in response.outputs:
        described = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        chosen = asked.get(output.name)
        if everything if chosen is None else chosen:
            data = _bytes(output)
            described["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            described["data"] = output.data
        outputs.append(described)
    body: dict[str, Any] = {"model_name": response.model_name}
    if version is not None:
        body["model_version"] = version
    head = json.dumps(body | {"id": response.id, "outputs": outputs}, ensure_ascii=False).encode()
    return (head + tail, len(head)) if tail else (head, None)


def from_grpc(message: Any) -> InferRequest:
    """The request in a ModelInferRequest, whose tensors come as `contents` or all of them raw.

    Raises:
        InvalidRequest: the two are mixed, or raw data is not BYTES.
    """
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(f"raw_input_contents has {len(raw)} tensors, and inputs {len(message.inputs)}.")
    if raw and any(tensor.HasField("contents") for tensor in message.inputs):
        raise InvalidRequest("inputs has contents, and there are raw_input_contents; send one of them.")
    inputs = []
    for index, tensor in enumerate(message.inputs):
        data = _elements(raw[index], f"inputs.{index}") if raw else list(tensor.contents.bytes_contents)
        parameters = to_http_parameters(tensor.parameters)
        inputs.append(InferInput(tensor.name, list(tensor.shape), tensor.datatype, data, _numbers(parameters)))
    return InferRequest(
        model_name=message.model_name,
        infer_inputs=inputs,
        request_id=message.id or None,
        parameters=_numbers(to_http_parameters(message.parameters)),
        request_outputs=[RequestedOutput(output.name) for output in message.outputs] or None,
    )


def to_grpc(message: Any, response: InferResponse) -> Any:
    """The ModelInferResponse to a ModelInferRequest; raw where that was raw."""
    answer = response.to_grpc()
    if message.raw_input_contents:
        for described, output in zip(answer.outputs, response.outputs, strict=True):
            described.ClearField("contents")
            answer.raw_output_contents.append(_bytes(output))
    return answer


def _selected(request: InferRequest) -> list[str]:
    names = [output.name for output in request.request_outputs or ()]
    for index, name in enumerate(names):
        if name not in OUTPUTS:
            raise InvalidRequest(f"outputs.{index}.name is {name!r}: expected one of {', '.join(OUTPUTS)}.")
    return names or [TEXT_OUTPUT]


def _sampling(request: InferRequest, tensor: InferInput, wants_logprobs: bool) -> SamplingParams:
    """The input's own parameters before the request's."""
    merged = {**(request.parameters or {}), **(tensor.parameters or {})}
    merged.pop("binary_data_output", None)
    try:
        parameters = _Parameters.model_validate(merged)
    except ValidationError as error:
        raise InvalidRequest(sentence(error, prefix="parameters.", known=_Parameters.model_fields)) from None
    if parameters.logprobs is not None and not wants_logprobs:
        raise InvalidRequest("parameters.logprobs is given, but outputs does not select logprobs.")
    return parameters.sampling((parameters.logprobs or 0) if wants_logprobs else None)


def _binary(parameters: Mapping[str, Any] | None) -> _Binary:
    try:
        return _Binary.model_validate(dict(parameters or {}))
    except ValidationError as error:
        raise InvalidRequest(sentence(error, prefix="parameters.")) from None


def _header_size(header_length: str | None, body_bytes: int) -> int:
    if header_length is None:
        return body_bytes
    if not re.fullmatch(r"[0-9]{1,18}", header_length) or int(header_length) > body_bytes:
        raise InvalidRequest(f"The header {HEADER_LENGTH} is not a number of bytes of this body.")
    return int(header_length)


def _data(tensor: _Tensor, rest: memoryview, field: str) -> tuple[int, list[Any]]:
    """How many bytes of the binary part are a tensor's, and its elements."""
    size = _binary(tensor.parameters).binary_data_size
    if size is None:
        if tensor.data is None:
            raise InvalidRequest(f"{field}.data: field required, or parameters.binary_data_size.")
        return 0, tensor.data
    if tensor.data is not None:
        raise InvalidRequest(f"{field} has both data and parameters.binary_data_size; send one of them.")
    if size > len(rest):
        raise InvalidRequest(f"{field}.parameters.binary_data_size is {size}, but only {len(rest)} bytes follow.")
    # Another datatype is refused by name later: no input is of such a type.
    return size, _elements(bytes(rest[:size]), field) if tensor.datatype == "BYTES" else []


def _elements(encoded: bytes, field: str) -> list[bytes]:
    try:
        return list(deserialize_bytes_tensor(encoded))
    except struct.error:
        raise InvalidRequest(f"{field} is not BYTES: before each element stand its length's 4 bytes.") from None


def _numbers(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """GRPC's parameters know no fractions: those come as strings."""
    numbers = dict(parameters)
    for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if isinstance(numbers.get(name), str):
            with contextlib.suppress(ValueError):  # then refused by name, as any wrong type
                numbers[name] = float(numbers[name])
    return numbers


def _bytes(output: InferOutput) -> bytes:
    if output.datatype == "BYTES":
        elements = [element.encode() if isinstance(element, str) else element for element in output.data]
        encoded = numpy.array(elements, dtype=numpy.object_)
        return bytes(serialize_byte_tensor(encoded).item()) if encoded.size else b""
    return numpy.array(output.data, dtype="<i8").tobytes()


def _texts(tensor: InferInput) -> list[str]:
    """The elements of a [n] or [n, 1] tensor, whose data may be nested or flat."""
    shape = list(tensor.shape)
    if len(shape) > 2 or (len(shape) == 2 and shape[1] != 1):
        raise InvalidRequest(f"inputs.0.shape is {shape}: expected [n] or [n, 1].")
    elements = [element for row in tensor.data for element in (row if isinstance(row, list) else [row])]
    if len(elements) != math.prod(shape):
        raise InvalidRequest(f"inputs.0.shape is {shape}, but data has {len(elements)} elements.")
    if not elements:
        raise InvalidRequest("inputs.0.data is empty; send at least one prompt.")
    return [_text(element, f"inputs.0.data.{index}") for index, element in enumerate(elements)]


def _text(element: object, field: str) -> str:
    if isinstance(element, bytes):
        try:
            return element.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"{field} is not UTF-8.") from None
    if not isinstance(element, str):
        raise InvalidRequest(f"{field} is not a string.")
    return element


def _raw(text: str, field: str) -> str:
    if not text:
        raise InvalidRequest(f"{field} is an empty prompt; send at least one character.")
    return text


def _chat(text: str, field: str) -> Chat:
    try:
        messages = loads(text.encode())
    except InvalidRequest:
        messages = None
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f'{field} is not a JSON list of messages, as in [{{"role": "user", "content": "Hi"}}].')
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequest(f"{field}: message {index} needs a role and a content, both strings.")
    return Chat(tuple[Message, ...](messages))
