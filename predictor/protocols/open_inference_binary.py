"""Binary tensor data extension of the Open Inference Protocol: tensor data after the JSON part of a body.

Specification: kserve/open-inference-protocol, specification/protocol/extension_binary_data.md.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy
from kserve import InferOutput
from pydantic import Field, ValidationError

from predictor.errors import InvalidRequest
from predictor.protocols import open_inference_types
from predictor.protocols.json_body import format_validation_error
from predictor.protocols.json_object import JSONObject

HEADER_LENGTH = "inference-header-content-length"
"""Header, in lower case, with the number of bytes of a body that are JSON."""


class BinaryParameters(JSONObject):
    """Parameters of the extension, of a request, an input or an output; other parameters are ignored."""

    binary_data_size: int | None = Field(default=None, ge=0)
    binary_data_output: bool = False
    binary_data: bool | None = None


def binary_parameters(parameters: Mapping[str, Any] | None) -> BinaryParameters:
    """Validate the extension's parameters.

    Raises:
        InvalidRequest: one has the wrong type.
    """
    try:
        return BinaryParameters.model_validate(dict(parameters or {}))
    except ValidationError as error:
        raise InvalidRequest(format_validation_error(error, prefix="parameters.")) from None


def json_size(header_length: str | None, body_size: int) -> int:
    """Return the size in bytes of a body's JSON part: all of it without the header.

    Raises:
        InvalidRequest: the header is not a size within the body.
    """
    if header_length is None:
        return body_size
    if not re.fullmatch(r"[0-9]{1,18}", header_length) or int(header_length) > body_size:
        raise InvalidRequest(
            f"The header {HEADER_LENGTH} is not a number of bytes of this body. Send the size of the JSON part."
        )
    return int(header_length)


def split_tensor(
    data: list[Any] | None, tail: memoryview, *, datatype: str, parameters: Mapping[str, Any], field: str
) -> tuple[list[Any], memoryview]:
    """Return the elements of one input, and the binary data after it.

    Args:
        data: elements in the JSON part; None if the tensor is binary.
        tail: binary data that belongs to this and later tensors.
        datatype: of the tensor.
        parameters: of the tensor.
        field: path of the tensor, for errors.

    Raises:
        InvalidRequest: there is no data, or both kinds, or it is truncated.
    """
    size = binary_parameters(parameters).binary_data_size
    if size is None:
        if data is None:
            raise InvalidRequest(f"{field}.data: field required, or parameters.binary_data_size.")
        return data, tail
    if data is not None:
        raise InvalidRequest(f"{field} has both data and parameters.binary_data_size. Send one of them.")
    if size > len(tail):
        raise InvalidRequest(f"{field}.parameters.binary_data_size is {size}, but only {len(tail)} bytes follow.")
    # Other datatypes are rejected when the request is decoded: no input has one.
    elements = decode_elements(bytes(tail[:size]), field) if datatype == "BYTES" else []
    return elements, tail[size:]


def decode_elements(encoded: bytes, field: str) -> list[bytes]:
    """Return the elements of a BYTES tensor.

    Raises:
        InvalidRequest: the data is truncated; the message has the field's path.
    """
    try:
        return open_inference_types.decode_bytes_tensor(encoded)
    except ValueError:
        raise InvalidRequest(f"{field} is not BYTES. Put each element's length before it, 4 bytes.") from None


def encode_output(output: InferOutput) -> bytes:
    """Return the data of an output, BYTES, INT64 or FP32, as raw bytes."""
    if output.datatype == "BYTES":
        elements = [element.encode() if isinstance(element, str) else element for element in output.data]
        return open_inference_types.encode_bytes_tensor(elements)
    return numpy.array(output.data, dtype="<i8" if output.datatype == "INT64" else "<f4").tobytes()
