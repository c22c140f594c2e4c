"""Open Inference Protocol v2, infer over REST: bytes <-> KServe's request and response <-> generation requests.

One request carries n prompts in one BYTES input, and gets n completions in order:

    text_input  raw prompts, as they are
    messages    chats; each element is a JSON list of {"role": …, "content": …}, put into the model's chat template

`decode` and `encode` work on KServe's own types, whatever brought them; `parse` and `serialize` are the JSON wire.
Specification: kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.protocol.infer_type import RequestedOutput
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from predictor.errors import InvalidRequest
from predictor.generation import Completion, GenerationRequest, Message, SamplingParams

TEXT_INPUT = "text_input"
MESSAGES = "messages"
TEXT_OUTPUT = "text_output"

INPUTS = {TEXT_INPUT: "BYTES", MESSAGES: "BYTES"}
"""Datatypes of the inputs, of which a request has exactly one."""
OUTPUTS = {TEXT_OUTPUT: "BYTES", "finish_reason": "BYTES", "prompt_tokens": "INT64", "completion_tokens": "INT64"}
"""Datatypes of the outputs; a request that selects none gets the text alone."""

Scalar = str | int | float | bool


class _Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    data: list[Any]
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


def _stop_sequences(value: object) -> object:
    """Protocol parameters are scalars, so several stop sequences may also come as a JSON list in a string."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    return [value] if isinstance(value, str) else value


class _Parameters(BaseModel):
    """What `parameters` may say, of the request or of its input; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    stop: Annotated[
        list[Annotated[str, StringConstraints(min_length=1)]], BeforeValidator(_stop_sequences), Field(max_length=16)
    ] = []

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(self.stop),
        )


def metadata(tensors: Mapping[str, str]) -> list[dict[str, Any]]:
    """INPUTS or OUTPUTS as a model's metadata lists them; -1 is any number of prompts."""
    return [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in tensors.items()]


def parse(body: bytes, model_name: str) -> InferRequest:
    """The request in a JSON body; its shape is checked, its meaning is not.

    Raises:
        InvalidRequest: not JSON, or a field is missing or of the wrong type; the message names it.
    """
    try:
        content = json.loads(body)
    except ValueError as error:
        raise InvalidRequest(f"The body is not JSON ({error}); send an Open Inference Protocol v2 request.") from None
    try:
        parsed = _Body.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(_sentence(error)) from None
    return InferRequest(
        model_name=model_name,
        infer_inputs=[
            InferInput(tensor.name, tensor.shape, tensor.datatype, tensor.data, tensor.parameters)
            for tensor in parsed.inputs
        ],
        request_id=parsed.id,
        parameters=parsed.parameters,
        request_outputs=None
        if parsed.outputs is None
        else [RequestedOutput(output.name, output.parameters) for output in parsed.outputs],
    )


def decode(request: InferRequest) -> list[GenerationRequest]:
    """One generation request for each prompt, in order.

    Raises:
        InvalidRequest: an input, output or parameter that cannot be; the message names the field.
    """
    _selected(request)
    if len(request.inputs) != 1:
        names = ", ".join(tensor.name for tensor in request.inputs)
        raise InvalidRequest(f"inputs has {names or 'nothing'}: expected one of {', '.join(INPUTS)}.")
    tensor = request.inputs[0]
    if tensor.name not in INPUTS:
        raise InvalidRequest(f"inputs.0.name is {tensor.name!r}: expected {' or '.join(INPUTS)}.")
    if tensor.datatype != INPUTS[tensor.name]:
        raise InvalidRequest(f"inputs.0.datatype is {tensor.datatype!r}: {tensor.name} is {INPUTS[tensor.name]}.")
    sampling = _sampling(request, tensor)
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
    }
    shape = request.inputs[0].shape
    return InferResponse(
        response_id=request.id or str(uuid.uuid4()),
        model_name=request.model_name,
        infer_outputs=[InferOutput(name, shape, OUTPUTS[name], columns[name]) for name in _selected(request)],
    )


def serialize(response: InferResponse) -> dict[str, Any]:
    """The JSON object of a response; nothing in it is null."""
    return {
        "model_name": response.model_name,
        "id": response.id,
        "outputs": [
            {"name": output.name, "datatype": output.datatype, "shape": output.shape, "data": output.data}
            for output in response.outputs
        ],
    }


def _selected(request: InferRequest) -> list[str]:
    names = [output.name for output in request.request_outputs or ()]
    for index, name in enumerate(names):
        if name not in OUTPUTS:
            raise InvalidRequest(f"outputs.{index}.name is {name!r}: expected one of {', '.join(OUTPUTS)}.")
    return names or [TEXT_OUTPUT]


def _sampling(request: InferRequest, tensor: InferInput) -> SamplingParams:
    """The input's own parameters before the request's."""
    try:
        return _Parameters.model_validate({**(request.parameters or {}), **(tensor.parameters or {})}).sampling()
    except ValidationError as error:
        raise InvalidRequest(_sentence(error, "parameters.")) from None


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


def _chat(text: str, field: str) -> tuple[Message, ...]:
    try:
        messages = json.loads(text)
    except ValueError:
        messages = None
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f'{field} is not a JSON list of messages, as in [{{"role": "user", "content": "Hi"}}].')
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequest(f"{field}: message {index} needs a role and a content, both strings.")
    return tuple(messages)


def _sentence(error: ValidationError, prefix: str = "") -> str:
    """Every issue of a validation error in one line, each with the field's path."""
    issues = [(prefix + ".".join(map(str, issue["loc"])), issue) for issue in error.errors(include_url=False)]
    unknown = [field for field, issue in issues if issue["type"] == "extra_forbidden"]
    wrong = [
        f"{field or 'the body'}: {issue['msg'][0].lower()}{issue['msg'][1:]}"
        for field, issue in issues
        if issue["type"] != "extra_forbidden"
    ]
    if unknown:
        wrong.append(f"{', '.join(unknown)}: not known here; known are {', '.join(_Parameters.model_fields)}")
    return "; ".join(wrong) + "."
