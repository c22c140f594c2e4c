"""Binary tensors of the Open Inference Protocol."""

import json
from typing import Any

import pytest

from predictor.errors import InvalidRequest
from predictor.protocols import open_inference
from predictor.protocols.open_inference_binary import HEADER_LENGTH
from predictor.types import Completion, FinishReason

COMPLETIONS = [
    Completion("one", finish_reason=FinishReason.EOS_TOKEN, prompt_tokens=3, completion_tokens=2),
    Completion("two", finish_reason=FinishReason.LENGTH, prompt_tokens=4, completion_tokens=5),
]


def binary(elements: list[bytes], size: int | None = None, **fields: Any) -> tuple[bytes, str]:
    """A body whose prompts follow the JSON, and its header."""
    tail = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    tensor: dict[str, Any] = {"name": "text_input", "datatype": "BYTES", "shape": [len(elements)]}
    tensor["parameters"] = {"binary_data_size": len(tail) if size is None else size}
    head = json.dumps({"inputs": [tensor], **fields}).encode()
    return head + tail, str(len(head))


def test_parse_binary_tensor_returns_its_elements() -> None:
    raw, header_length = binary([b"a", "é".encode()], parameters={"max_tokens": 3})
    requests = open_inference.decode(open_inference.parse(raw, "m", header_length))
    assert [(request.prompt, request.sampling.max_tokens) for request in requests] == [("a", 3), ("é", 3)]


@pytest.mark.parametrize(
    "fields",
    [
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": name, "parameters": {"binary_data": True}} for name in ("text_output", "prompt_tokens")]},
    ],
)
def test_serialize_binary_outputs_follow_the_json(fields: dict[str, Any]) -> None:
    fields = {"outputs": [{"name": "text_output"}, {"name": "prompt_tokens"}], **fields}
    raw, given = binary([b"a", b"b"], **fields)
    request = open_inference.parse(raw, "m", given)
    open_inference.decode(request)
    content, header_length = open_inference.serialize(request, open_inference.encode(request, COMPLETIONS), None)
    outputs = json.loads(content[:header_length])["outputs"]
    assert [output["parameters"]["binary_data_size"] for output in outputs] == [14, 16]
    assert content[header_length:] == b"\3\0\0\0one\3\0\0\0two" + bytes([3, *[0] * 7, 4, *[0] * 7])


@pytest.mark.parametrize(
    ("raw", "header_length", "expected"),
    [
        (*binary([b"a"], size=99), "inputs.0.parameters.binary_data_size is 99, but only 5 bytes follow"),
        (*binary([b"a"], size=3), "inputs.0 is not BYTES"),
        (*binary([b"a"], size=0), "5 bytes follow the last tensor"),
        (binary([b"a"])[0], "x", "The header inference-header-content-length is not a number"),
        (binary([b"a"])[0], "9999", "The header inference-header-content-length is not a number"),
        (*binary([bytes([255])]), "inputs.0.data.0 is not UTF-8"),
        (*binary([b"a"], parameters={"binary_data_output": "yes"}), "parameters.binary_data_output: "),
    ],
)
def test_parse_invalid_binary_tensor_raises(raw: bytes, header_length: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{expected}"):
        open_inference.decode(open_inference.parse(raw, "m", header_length))


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "²", "", "1.0"])
def test_parse_invalid_header_length_raises(length: str) -> None:
    raw, _ = binary([b"a"])
    with pytest.raises(InvalidRequest, match=HEADER_LENGTH):
        open_inference.parse(raw, "m", length)
