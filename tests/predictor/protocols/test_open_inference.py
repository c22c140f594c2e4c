import json
from typing import Any

import kserve
import pytest

from predictor.errors import InvalidRequest
from predictor.protocols import open_inference
from predictor.protocols.open_inference_binary import HEADER_LENGTH
from predictor.protocols.sampling_fields import TIMEOUT_HEADER, timeout_seconds
from predictor.types import Chat, Completion, FinishReason, SamplingParams, Token

CHAT = '[{"role": "user", "content": "Hi"}]'


def body(**fields: Any) -> bytes:
    """A request of one raw prompt, with some of its input's or its own fields replaced."""
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}
    tensor |= {name: fields.pop(name) for name in list(fields) if name in tensor}
    if "input_parameters" in fields:
        tensor["parameters"] = fields.pop("input_parameters")
    return json.dumps({"inputs": [tensor]} | fields).encode()


def decoded(raw: bytes) -> list[Any]:
    return open_inference.decode(open_inference.parse(raw, "m"))


def test_decodes_raw_prompts_in_order() -> None:
    requests = decoded(body(shape=[3], data=["a", "b", "c"]))
    assert [request.prompt for request in requests] == ["a", "b", "c"]


@pytest.mark.parametrize("data", [["a", "b"], [["a"], ["b"]]])
def test_takes_nested_and_flat_data(data: list[Any]) -> None:
    assert [request.prompt for request in decoded(body(shape=[2, 1], data=data))] == ["a", "b"]


def test_decodes_chats() -> None:
    (request,) = decoded(body(name="messages", data=[CHAT]))
    assert request.prompt == Chat(({"role": "user", "content": "Hi"},))


def test_takes_bytes_where_the_data_came_binary() -> None:
    tensor = kserve.InferInput("text_input", [1], "BYTES", ["é".encode()])
    (request,) = open_inference.decode(kserve.InferRequest("m", [tensor]))
    assert request.prompt == "é"


def test_decodes_every_parameter() -> None:
    parameters = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": "\n"}
    (request,) = decoded(body(parameters=parameters))
    assert request.sampling == SamplingParams(max_tokens=5, temperature=0.5, top_p=0.9, top_k=3, stop=("\n",))


def test_says_nothing_of_parameters_that_were_not_given() -> None:
    (request,) = decoded(body())
    assert request.sampling == SamplingParams()


@pytest.mark.parametrize(
    ("stop", "expected"), [("a", ("a",)), (["a", "b"], ("a", "b")), ('["a", "b"]', ("a", "b")), ("[", ("[",))]
)
def test_takes_one_stop_sequence_or_several(stop: Any, expected: tuple[str, ...]) -> None:
    (request,) = decoded(body(parameters={"stop": stop}))
    assert request.sampling.stop == expected


def test_an_inputs_own_parameters_come_first() -> None:
    (request,) = decoded(body(parameters={"max_tokens": 5, "top_k": 2}, input_parameters={"max_tokens": 7}))
    assert request.sampling == SamplingParams(max_tokens=7, top_k=2)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"{", "The body is not JSON"),
        (b"\xff", "The body is not JSON"),
        (b"[]", "the body: input should be an object"),
        (b"{}", "inputs: field required"),
        (b'{"inputs": []}', "inputs: list should have at least 1 item"),
        (body(shape="one"), "inputs.0.shape: input should be a valid list"),
        (body(shape=[]), "inputs.0.shape: list should have at least 1 item"),
        (body(shape=[-1]), "inputs.0.shape.0: input should be greater than or equal to 0"),
        (body(shape=[2]), r"inputs.0.shape is \[2\], but data has 1 elements"),
        (body(shape=[1, 2], data=["a", "b"]), r"inputs.0.shape is \[1, 2\]: expected \[n\] or \[n, 1\]"),
        (body(shape=[0], data=[]), "inputs.0.data is empty"),
        (body(data=[7]), "inputs.0.data.0 is not a string"),
        (body(data=[""]), "inputs.0.data.0 is an empty prompt"),
        (body(data="Hi"), "inputs.0.data: input should be a valid list"),
        (body(datatype="FP32", data=[1.0]), "inputs.0.datatype is 'FP32': text_input is BYTES"),
        (body(name="prompt"), "inputs.0.name is 'prompt': expected text_input or messages"),
        (body(name="messages"), "inputs.0.data.0 is not a JSON list of messages"),
        (body(name="messages", data=["[]"]), "inputs.0.data.0 is not a JSON list of messages"),
        (body(name="messages", data=['["Hi"]']), "inputs.0.data.0: message 0 needs a role and a content"),
        (body(name="messages", data=['[{"role": "user"}]']), "inputs.0.data.0: message 0 needs a role and a content"),
        (body(outputs=[{"name": "logits"}]), "outputs.0.name is 'logits': expected one of text_output"),
        (body(outputs={}), "outputs: input should be a valid list"),
        (body(id=7), "id: input should be a valid string"),
        (body(parameters=[]), "parameters: input should be a valid dictionary"),
        (body(parameters={"max_token": 5}), "parameters.max_token: unknown field. Allowed: frequency_penalty"),
        (body(parameters={"max_tokens": -1}), "parameters.max_tokens: input should be greater than or equal to 1"),
        (body(parameters={"max_tokens": 1.5}), "parameters.max_tokens: input should be a valid integer"),
        (body(parameters={"max_tokens": True}), "parameters.max_tokens: input should be a valid integer"),
        (body(parameters={"temperature": -0.1}), "parameters.temperature: input should be greater than or equal to 0"),
        (body(parameters={"temperature": "hot"}), "parameters.temperature: input should be a valid number"),
        (body(parameters={"temperature": float("nan")}), "parameters.temperature: input should be a finite number"),
        (body(parameters={"top_p": 1.1}), "parameters.top_p: input should be less than or equal to 1"),
        (body(parameters={"top_k": -2}), "parameters.top_k: input should be greater than or equal to -1"),
        (body(parameters={"logprobs": 2}), "parameters.logprobs is set, but outputs does not select logprobs"),
        (b"[" * 100_000, "The body is not JSON"),
        (b'{"inputs": "\\ud800"}', "The body has half of a surrogate pair"),
        (body(parameters={"stop": ""}), "parameters.stop.0: string should have at least 1 character"),
        (body(parameters={"stop": 7}), "parameters.stop: input should be a valid list"),
        (body(parameters={"stop": ["a"] * 17}), "parameters.stop: value should have at most 16 items"),
    ],
)
def test_names_the_field_that_is_wrong(raw: bytes, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{expected}") as raised:
        decoded(raw)
    assert "\n" not in str(raised.value)


def test_names_all_wrong_fields_at_once() -> None:
    with pytest.raises(InvalidRequest) as raised:
        decoded(body(parameters={"max_tokens": 0, "top_p": 2, "beam": 1}))
    assert all(f"parameters.{name}: " in str(raised.value) for name in ("max_tokens", "top_p", "beam"))


def test_refuses_two_inputs_at_once() -> None:
    tensors = [json.loads(body())["inputs"][0], json.loads(body(name="messages", data=[CHAT]))["inputs"][0]]
    with pytest.raises(InvalidRequest, match="inputs has text_input, messages: expected one of"):
        decoded(json.dumps({"inputs": tensors}).encode())


def test_ignores_fields_that_the_protocol_does_not_know() -> None:
    assert len(decoded(body(priority="high"))) == 1


COMPLETIONS = [
    Completion("one", finish_reason=FinishReason.EOS_TOKEN, prompt_tokens=3, completion_tokens=2),
    Completion("two", finish_reason=FinishReason.LENGTH, prompt_tokens=4, completion_tokens=5),
]


def response(**fields: Any) -> dict[str, Any]:
    request = open_inference.parse(body(data=["a", "b"], **{"shape": [2]} | fields), "m")
    content, header_length = open_inference.serialize(request, open_inference.encode(request, COMPLETIONS), None)
    assert header_length is None
    return json.loads(content)


def test_answers_with_the_text_alone_unless_asked_for_more() -> None:
    answered = response(id="42")
    assert answered == {
        "model_name": "m",
        "id": "42",
        "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [2], "data": ["one", "two"]}],
    }


def test_answers_with_the_outputs_selected_in_their_order() -> None:
    names = ["completion_tokens", "finish_reason", "prompt_tokens"]
    outputs = response(outputs=[{"name": name} for name in names])["outputs"]
    assert [(output["name"], output["datatype"], output["data"]) for output in outputs] == [
        ("completion_tokens", "INT64", [2, 5]),
        ("finish_reason", "BYTES", ["eos_token", "length"]),
        ("prompt_tokens", "INT64", [3, 4]),
    ]


def test_keeps_the_shape_of_the_input() -> None:
    assert response(shape=[2, 1])["outputs"][0]["shape"] == [2, 1]


def test_makes_an_id_where_none_came() -> None:
    assert response()["id"] != response()["id"]


def test_names_the_version_where_the_route_did() -> None:
    request = open_inference.parse(body(), "m")
    content, _ = open_inference.serialize(request, open_inference.encode(request, COMPLETIONS[:1]), "1")
    assert json.loads(content)["model_version"] == "1"


def test_gives_log_probabilities_as_json() -> None:
    (request,) = decoded(body(outputs=[{"name": "logprobs"}], parameters={"logprobs": 1}))
    assert request.sampling.logprobs == 1
    (plain,) = decoded(body(outputs=[{"name": "logprobs"}]))
    assert plain.sampling.logprobs == 0
    token = Token(7, "a", -0.5, top=(Token(7, "a", -0.5),))
    parsed = open_inference.parse(body(outputs=[{"name": "logprobs"}]), "m")
    completion = Completion(
        "a", finish_reason=FinishReason.LENGTH, prompt_tokens=1, completion_tokens=1, tokens=(token,)
    )
    [output] = json.loads(open_inference.serialize(parsed, open_inference.encode(parsed, [completion]), None)[0])[
        "outputs"
    ]
    [[told]] = [json.loads(element) for element in output["data"]]
    assert (told["id"], told["logprob"], told["top"][0]["text"]) == (7, -0.5, "a")


def binary(elements: list[bytes], size: int | None = None, **fields: Any) -> tuple[bytes, str]:
    """A body whose prompts follow the JSON, and its header."""
    tail = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [len(elements)]}
    tensor["parameters"] = {"binary_data_size": len(tail) if size is None else size}
    head = json.dumps({"inputs": [tensor], **fields}).encode()
    return head + tail, str(len(head))


def test_takes_binary_tensors() -> None:
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
def test_answers_with_binary_tensors(fields: dict[str, Any]) -> None:
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
def test_says_what_is_wrong_with_binary_tensors(raw: bytes, header_length: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{expected}"):
        open_inference.decode(open_inference.parse(raw, "m", header_length))


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon"])
def test_a_timeout_is_a_positive_number(text: str) -> None:
    with pytest.raises(InvalidRequest, match="x-request-timeout-seconds is not a positive number"):
        timeout_seconds({TIMEOUT_HEADER: text})
    assert timeout_seconds({TIMEOUT_HEADER: "1.5"}) == 1.5
    assert timeout_seconds({}) is None


def test_nothing_is_too_deep_or_too_long_to_be_refused() -> None:
    deep = "[" * 100_000
    half = json.dumps([{"role": "user", "content": "\ud800"}])
    for raw in (
        body(parameters={"stop": deep, "max_tokens": 0}),
        body(name="messages", data=[deep]),
        body(name="messages", data=[half]),
        b"1" * 5000,
        deep.encode(),
    ):
        with pytest.raises(InvalidRequest):
            decoded(raw)
    for length in ("9" * 5000, "-1", "²", "", "1.0"):
        with pytest.raises(InvalidRequest, match=HEADER_LENGTH):
            open_inference.parse(body(), "m", length)
