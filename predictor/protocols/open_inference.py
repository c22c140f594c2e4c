"""Open Inference Protocol v2 `infer`: request bodies and gRPC messages <-> KServe's types <-> generation requests.

A request has n prompts in one BYTES input, and its response n completions in the same order:

    text_input  raw prompts
    messages    chats; each element is a JSON list of {"role": …, "content": …} for the model's chat template

`parse` and `serialize` convert bodies, `from_grpc` and `to_grpc` messages; `decode` and `encode` use KServe's types.
Specification: kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

import contextlib
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from kserve import InferInput, InferOutput, InferRequest, InferResponse
from pydantic import Field

from predictor.errors import InvalidRequest
from predictor.protocols.best_of import best
from predictor.protocols.json_body import dump, json_schema, loads
from predictor.protocols.json_object import JSONObject, validate
from predictor.protocols.open_inference_binary import (
    binary_parameters,
    decode_elements,
    encode_output,
    json_size,
    split_tensor,
)
from predictor.protocols.open_inference_types import decode_grpc_parameters, requested_output
from predictor.protocols.sampling_fields import MAX_LOGPROBS, PromptLogprobs, SamplingFields
from predictor.types import Chat, Completion, GenerationRequest, Message, SamplingParams, Token

TEXT_INPUT = "text_input"
MESSAGES = "messages"
TEXT_OUTPUT = "text_output"
LOGPROBS = "logprobs"
PROMPT_LOGPROBS = "prompt_logprobs"

INPUTS = {TEXT_INPUT: "BYTES", MESSAGES: "BYTES"}
"""Datatypes of the inputs; a request has exactly one of them."""
OUTPUTS = {
    TEXT_OUTPUT: "BYTES",
    "finish_reason": "BYTES",
    "prompt_tokens": "INT64",
    "completion_tokens": "INT64",
    LOGPROBS: "BYTES",
    PROMPT_LOGPROBS: "BYTES",
}
"""Datatypes of the outputs; `text_output` is the default. Log probabilities are JSON lists of tokens."""

EXTENSIONS = ("binary_tensor_data", "generate", "generate_stream")
"""Extensions of the protocol that the server's metadata lists."""

SERVER = "kserve-llm"
"""Name of the server in its metadata, and of the distribution that its version is read from."""
PLATFORM = "transformers_safetensors"
"""Platform in the model's metadata: project and format."""


class _Tensor(JSONObject):
    name: str
    datatype: str
    shape: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(min_length=1)
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class _Output(JSONObject):
    name: str
    parameters: dict[str, Any] = {}


class _InferRequest(JSONObject):
    """Infer request as JSON."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[_Tensor] = Field(min_length=1)
    outputs: list[_Output] | None = None


class _Parameters(SamplingFields):
    """Parameters of the request or its input."""

    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Number of most probable tokens at each position of the output logprobs.",
    )
    prompt_logprobs: PromptLogprobs | None = None


REQUEST_SCHEMA = json_schema(_InferRequest)
"""JSON schema of the request body."""


def metadata(tensors: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return INPUTS or OUTPUTS for a model's metadata; -1 is any number of prompts."""
    return [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in tensors.items()]


def parse(body: bytes, model_name: str, header_length: str | None = None) -> InferRequest:
    """Parse a body; checks the types of fields, not their meaning.

    Args:
        body: JSON, and, with a header length, the data of binary tensors after it.
        model_name: from the route.
        header_length: value of the header `open_inference_binary.HEADER_LENGTH`.

    Raises:
        InvalidRequest: not JSON, or a field is missing or has the wrong type; the message names it.
    """
    size = json_size(header_length, len(body))
    parsed = validate(_InferRequest, loads(body[:size]))
    tail = memoryview(body)[size:]
    inputs = []
    for index, tensor in enumerate(parsed.inputs):
        data, tail = split_tensor(
            tensor.data, tail, datatype=tensor.datatype, parameters=tensor.parameters, field=f"inputs.{index}"
        )
        parameters = {name: value for name, value in tensor.parameters.items() if name != "binary_data_size"}
        inputs.append(InferInput(tensor.name, tensor.shape, tensor.datatype, data, parameters))
    if tail:
        raise InvalidRequest(f"{len(tail)} bytes follow the last tensor. Set each tensor's binary_data_size.")
    return InferRequest(
        model_name=model_name,
        infer_inputs=inputs,
        request_id=parsed.id,
        parameters=parsed.parameters,
        request_outputs=None
        if parsed.outputs is None
        else [requested_output(output.name, output.parameters) for output in parsed.outputs],
    )


def decode(request: InferRequest) -> list[GenerationRequest]:
    """Return one generation request per prompt, in order.

    Raises:
        InvalidRequest: an input or output is unknown, or a parameter is not supported or out of range; the message
            names it.
    """
    binary_parameters(request.parameters)
    selected = _selected_outputs(request)
    if len(request.inputs) != 1:
        names = ", ".join(tensor.name for tensor in request.inputs)
        raise InvalidRequest(f"inputs has {names or 'nothing'}: expected one of {', '.join(INPUTS)}.")
    tensor = request.inputs[0]
    if tensor.name not in INPUTS:
        raise InvalidRequest(f"inputs.0.name is {tensor.name!r}: expected {' or '.join(INPUTS)}.")
    if tensor.datatype != INPUTS[tensor.name]:
        raise InvalidRequest(f"inputs.0.datatype is {tensor.datatype!r}: {tensor.name} is {INPUTS[tensor.name]}.")
    sampling, candidates = _sampling_params(request, tensor, selected)
    decode_prompt = _decode_chat if tensor.name == MESSAGES else _check_prompt
    return [
        GenerationRequest(decode_prompt(text, f"inputs.0.data.{index}"), sampling, candidates)
        for index, text in enumerate(decode_texts(tensor, "inputs.0"))
    ]


def encode(request: InferRequest, completions: Sequence[Completion]) -> InferResponse:
    """Return the response with the best completion of each prompt; outputs have the shape of the request's input."""
    shape = request.inputs[0].shape
    completions = list(best(completions, n=1, candidates=len(completions) // math.prod(shape)))
    columns: dict[str, list[Any]] = {
        TEXT_OUTPUT: [completion.text for completion in completions],
        "finish_reason": [completion.finish_reason.value for completion in completions],
        "prompt_tokens": [completion.prompt_tokens for completion in completions],
        "completion_tokens": [completion.completion_tokens for completion in completions],
        LOGPROBS: [_dump_tokens(completion.tokens) for completion in completions],
        PROMPT_LOGPROBS: [_dump_tokens(completion.prompt) for completion in completions],
    }
    return InferResponse(
        response_id=request.id or str(uuid.uuid4()),
        model_name=request.model_name,
        infer_outputs=[InferOutput(name, shape, OUTPUTS[name], columns[name]) for name in _selected_outputs(request)],
    )


def serialize(request: InferRequest, response: InferResponse, version: str | None) -> tuple[bytes, int | None]:
    """Return the body of a response, without nulls, and the size of its JSON part if binary tensors follow.

    The request selects the binary outputs; `version` is the model's, if the route has one.
    """
    binary_by_default = binary_parameters(request.parameters).binary_data_output
    binary = {output.name: binary_parameters(output.parameters).binary_data for output in request.request_outputs or ()}
    outputs, tail = [], b""
    for output in response.outputs:
        tensor = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        is_binary = binary.get(output.name)
        if binary_by_default if is_binary is None else is_binary:
            data = encode_output(output)
            tensor["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            tensor["data"] = output.data
        outputs.append(tensor)
    content: dict[str, Any] = {"model_name": response.model_name}
    if version is not None:
        content["model_version"] = version
    head = "".join(dump(content | {"id": response.id, "outputs": outputs})).encode()
    return (head + tail, len(head)) if tail else (head, None)


def num_values(response: InferResponse) -> int:
    """Return the number of values in a response, of which each character of a text is one."""
    return sum(
        sum(map(len, output.data)) if output.datatype == "BYTES" else len(output.data) for output in response.outputs
    )


def from_grpc(message: Any) -> InferRequest:
    """Convert a ModelInferRequest, whose tensors are all in `contents` or all in `raw_input_contents`.

    Raises:
        InvalidRequest: both are used, or raw data is not BYTES.
    """
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(f"raw_input_contents has {len(raw)} tensors, and inputs {len(message.inputs)}.")
    if raw and any(tensor.HasField("contents") for tensor in message.inputs):
        raise InvalidRequest("The request has both contents and raw_input_contents. Send one of them.")
    inputs = []
    for index, tensor in enumerate(message.inputs):
        data = decode_elements(raw[index], f"inputs.{index}") if raw else list(tensor.contents.bytes_contents)
        parameters = _decode_parameters(tensor.parameters)
        inputs.append(InferInput(tensor.name, list(tensor.shape), tensor.datatype, data, parameters))
    return InferRequest(
        model_name=message.model_name,
        infer_inputs=inputs,
        request_id=message.id or None,
        parameters=_decode_parameters(message.parameters),
        request_outputs=[requested_output(output.name) for output in message.outputs] or None,
    )


def to_grpc(message: Any, response: InferResponse) -> Any:
    """Return the ModelInferResponse to the ModelInferRequest `message`; raw if that is."""
    converted = response.to_grpc()
    if message.raw_input_contents:
        for tensor, output in zip(converted.outputs, response.outputs, strict=True):
            tensor.ClearField("contents")
            converted.raw_output_contents.append(encode_output(output))
    return converted


def _selected_outputs(request: InferRequest) -> list[str]:
    names = [output.name for output in request.request_outputs or ()]
    for index, name in enumerate(names):
        if name not in OUTPUTS:
            raise InvalidRequest(f"outputs.{index}.name is {name!r}: expected one of {', '.join(OUTPUTS)}.")
    return names or [TEXT_OUTPUT]


def _dump_tokens(tokens: Sequence[Token]) -> str:
    return "".join(dump([_token(token) for token in tokens]))


def _token(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
        "top": [_token(alternative) for alternative in token.top],
        "rank": token.rank,
    }


def _sampling_params(request: InferRequest, tensor: InferInput, selected: Sequence[str]) -> tuple[SamplingParams, int]:
    """Return the request's parameters, overridden by the input's own, and the number of completions per prompt."""
    merged = {**(request.parameters or {}), **(tensor.parameters or {})}
    merged.pop("binary_data_output", None)
    parameters = validate(_Parameters, merged, "parameters.")
    numbers: dict[str, int | None] = {}
    for name in (LOGPROBS, PROMPT_LOGPROBS):
        number = getattr(parameters, name)
        if number is not None and name not in selected:
            raise InvalidRequest(f"parameters.{name} is set, but outputs does not select {name}. Select it.")
        numbers[name] = (number or 0) if name in selected else None
    sampling = parameters.to_sampling_params(numbers[LOGPROBS])
    return replace(sampling, prompt_logprobs=numbers[PROMPT_LOGPROBS]), parameters.num_candidates()


def _decode_parameters(parameters: Any) -> dict[str, Any]:
    """Return gRPC parameters; fractions are sent as strings, since InferParameter has no floating-point type."""
    values = decode_grpc_parameters(parameters)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if isinstance(values.get(name), str):
            with contextlib.suppress(ValueError):  # `decode` rejects it by name, like any wrong type
                values[name] = float(values[name])
    return values


def decode_texts(tensor: InferInput, field: str) -> list[str]:
    """Return the elements of a [n] or [n, 1] tensor with nested or flat data.

    Args:
        tensor: of datatype BYTES.
        field: path of the tensor, for errors.

    Raises:
        InvalidRequest: shape and data do not match, there is no element, or one is not text.
    """
    shape = list(tensor.shape)
    if len(shape) > 2 or (len(shape) == 2 and shape[1] != 1):
        raise InvalidRequest(f"{field}.shape is {shape}: expected [n] or [n, 1].")
    elements = [element for row in tensor.data for element in (row if isinstance(row, list) else [row])]
    if len(elements) != math.prod(shape):
        raise InvalidRequest(f"{field}.shape is {shape}, but data has {len(elements)} elements.")
    if not elements:
        raise InvalidRequest(f"{field}.data is empty. Send at least one text.")
    return [_decode_text(element, f"{field}.data.{index}") for index, element in enumerate(elements)]


def _decode_text(element: object, field: str) -> str:
    if isinstance(element, bytes):
        try:
            return element.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"{field} is not UTF-8.") from None
    if not isinstance(element, str):
        raise InvalidRequest(f"{field} is not a string.")
    return element


def _check_prompt(text: str, field: str) -> str:
    if not text:
        raise InvalidRequest(f"{field} is an empty prompt. Send at least one character.")
    return text


def _decode_chat(text: str, field: str) -> Chat:
    try:
        messages = loads(text.encode())
    except InvalidRequest:
        messages = None
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f'{field} is not a JSON list of messages. Example: [{{"role": "user", "content": "Hi"}}].')
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequest(f"{field}: message {index} needs a role and a content, both strings.")
    return Chat(tuple[Message, ...](messages))
