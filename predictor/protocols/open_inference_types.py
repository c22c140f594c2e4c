"""Fence around `kserve.protocol.infer_type`, whose helpers KServe does not document."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from kserve.protocol.infer_type import (
    RequestedOutput,
    deserialize_bytes_tensor,
    serialize_byte_tensor,
    to_http_parameters,
)


def requested_output(name: str, parameters: Mapping[str, Any] | None = None) -> RequestedOutput:
    """Return a selected output for `kserve.InferRequest`."""
    return RequestedOutput(name, dict(parameters or {}))


def decode_bytes_tensor(encoded: bytes) -> list[bytes]:
    """Return the elements of a BYTES tensor: each has its length before it, 4 bytes, little-endian.

    Raises:
        ValueError: the data is truncated.
    """
    try:
        return list(deserialize_bytes_tensor(encoded))
    except struct.error as error:
        raise ValueError(str(error)) from None


def encode_bytes_tensor(elements: Sequence[bytes]) -> bytes:
    """Return the data of a BYTES tensor; see `decode_bytes_tensor`."""
    array = numpy.array(elements, dtype=numpy.object_)
    return bytes(serialize_byte_tensor(array).item()) if array.size else b""


def decode_grpc_parameters(parameters: Any) -> dict[str, Any]:
    """Return the values of a protobuf map of InferParameter."""
    return dict(to_http_parameters(parameters))
