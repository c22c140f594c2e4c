"""Open Inference Protocol v2: JSON bodies."""

import json
from typing import Any

import kserve
import pytest

from predictor.errors import InvalidRequest
from predictor.observability import request_record
from predictor.observability.request_record import RequestRecord
from predictor.protocols import open_inference
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


def test_decode_raw_prompts_keeps_their_order() -> None:
    requests = decoded(body(shape=[3], data=["a", "b", "c"]))
    assert [request.prompt for request in requests] == ["a", "b", "c"]


@pytest.mark.parametrize("data", [["a", "b"], [["a"], ["b"]]])
def test_decode_nested_or_flat_data_gives_equal_prompts(data: list[Any]) -> None:
    assert [request.prompt for request in decoded(body(shape=[2, 1], data=data))] == ["a", "b"]


def test_decode_messages_returns_chats() -> None:
    (request,) = decoded(body(name="messages", data=[CHAT]))
    assert request.prompt == Chat(({"role": "user", "content": "Hi"},))


def test_decode_bytes_elements_as_utf8() -> None:
    tensor = kserve.InferInput("text_input", [1], "BYTES", ["é".encode()])
    (request,) = open_inference.decode(kserve.InferRequest("m", [tensor]))
    assert request.prompt == "é"


def test_decode_parameters_returns_sampling_params() -> None:
    parameters = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": "\n"}
    (request,) = decoded(body(parameters=parameters))
    assert request.sampling == SamplingParams(max_tokens=5, temperature=0.5, top_p=0.9, top_k=3, stop=("\n",))


def test_decode_without_parameters_uses_defaults() -> None:
    (request,) = decoded(body())
    assert request.sampling == SamplingParams()


@pytest.mark.parametrize(
    ("stop", "expected"), [("a", ("a",)), (["a", "b"], ("a", "b")), ('["a", "b"]', ("a", "b")), ("[", ("[",))]
)
def test_decode_stop_accepts_string_list_or_json(stop: Any, expected: tuple[str, ...]) -> None:
    (request,) = decoded(body(parameters={"stop": stop}))
    assert request.sampling.stop == expected


def test_decode_input_parameters_override_the_requests() -> None:
    (request,) = decoded(body(parameters={"max_tokens": 5, "top_k": 2}, input_parameters={"max_tokens": 7}))
    assert request.sampling == SamplingParams(max_tokens=7, top_k=2)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"{", "The body is not JSON"),
        (b"\xff", "The body is not UTF-8"),
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
        (body(parameters={"max_tokens": -2}), "parameters.max_tokens: input should be greater than or equal to -1"),
        (body(parameters={"max_tokens": "5"}), "parameters.max_tokens: input should be a valid integer"),
        (body(parameters={"max_new_tokens": 5}), "parameters.max_new_tokens: not supported. Use max_tokens."),
        (body(parameters={"logit_bias": "{"}), "parameters.logit_bias: input should be a valid dictionary"),
        (body(parameters={"prompt_logprobs": 2}), "parameters.prompt_logprobs is set, but outputs does not select"),
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
        (body(parameters={"stop": 7}), "parameters.stop: input should be a valid list"),
        (body(parameters={"stop": ["a"] * 257}), "parameters.stop: list should have at most 256 items"),
    ],
)
def test_decode_invalid_field_raises_with_its_path(raw: bytes, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{expected}") as raised:
        decoded(raw)
    assert "\n" not in str(raised.value)


def test_decode_several_invalid_fields_are_all_reported() -> None:
    with pytest.raises(InvalidRequest) as raised:
        decoded(body(parameters={"max_tokens": -2, "top_p": 2}))
    assert all(f"parameters.{name}: " in str(raised.value) for name in ("max_tokens", "top_p"))


def test_decode_two_inputs_raises() -> None:
    tensors = [json.loads(body())["inputs"][0], json.loads(body(name="messages", data=[CHAT]))["inputs"][0]]
    with pytest.raises(InvalidRequest, match="inputs has text_input, messages: expected one of"):
        decoded(json.dumps({"inputs": tensors}).encode())


def test_decode_unknown_fields_are_ignored_and_recorded() -> None:
    with request_record.bind(RequestRecord()) as record:
        raw = body(mood=1, parameters={"max_token": 5}, outputs=[{"name": "text_output", "size": 2}])
        (request,) = decoded(raw)
    assert request.sampling == SamplingParams()
    assert record.ignored_fields == ["mood", "outputs.0.size", "parameters.max_token"]


def test_decode_content_types_and_nulls_are_no_parameters() -> None:
    labels = {"content_type": "str", "headers": {"a": "b"}}
    with request_record.bind(RequestRecord()) as record:
        for parameters in (labels, None, {"max_tokens": None, "stop": None, "presence_penalty": None}):
            output = {"name": "text_output", "parameters": parameters}
            raw = body(id=None, parameters=parameters, input_parameters=parameters, outputs=[output])
            assert [request.sampling for request in decoded(raw)] == [SamplingParams()]
    assert record.ignored_fields == []


COMPLETIONS = [
    Completion("one", finish_reason=FinishReason.EOS_TOKEN, prompt_tokens=3, completion_tokens=2),
    Completion("two", finish_reason=FinishReason.LENGTH, prompt_tokens=4, completion_tokens=5),
]


def response(**fields: Any) -> dict[str, Any]:
    request = open_inference.parse(body(data=["a", "b"], **{"shape": [2]} | fields), "m")
    content, header_length = open_inference.serialize(request, open_inference.encode(request, COMPLETIONS), None)
    assert header_length is None
    parsed: dict[str, Any] = json.loads(content)
    return parsed


def test_encode_without_outputs_returns_text_only() -> None:
    answered = response(id="42")
    assert answered == {
        "model_name": "m",
        "id": "42",
        "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [2], "data": ["one", "two"]}],
    }


def test_encode_selected_outputs_keeps_their_order() -> None:
    names = ["completion_tokens", "finish_reason", "prompt_tokens"]
    outputs = response(outputs=[{"name": name} for name in names])["outputs"]
    assert [(output["name"], output["datatype"], output["data"]) for output in outputs] == [
        ("completion_tokens", "INT64", [2, 5]),
        ("finish_reason", "BYTES", ["eos_token", "length"]),
        ("prompt_tokens", "INT64", [3, 4]),
    ]


def test_encode_keeps_the_shape_of_the_input() -> None:
    assert response(shape=[2, 1])["outputs"][0]["shape"] == [2, 1]


def test_encode_without_id_makes_a_unique_one() -> None:
    assert response()["id"] != response()["id"]


def test_serialize_with_version_has_model_version() -> None:
    request = open_inference.parse(body(), "m")
    content, _ = open_inference.serialize(request, open_inference.encode(request, COMPLETIONS[:1]), "1")
    assert json.loads(content)["model_version"] == "1"


def test_encode_logprobs_as_json() -> None:
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
    [[reported]] = [json.loads(element) for element in output["data"]]
    assert (reported["id"], reported["logprob"], reported["top"][0]["text"]) == (7, -0.5, "a")


def test_decode_lists_and_objects_as_strings_of_json() -> None:
    parameters = {"logit_bias": '{"5": 1}', "allowed_token_ids": "[5, 7]", "truncate_prompt_tokens": 3}
    [request] = decoded(body(parameters=parameters))
    assert request.sampling.logit_bias == ((5, 1.0),)
    assert (request.sampling.allowed_token_ids, request.sampling.truncate_prompt_tokens) == ((5, 7), 3)


def test_encode_best_of_returns_the_most_probable_completion_of_each_prompt() -> None:
    raw = body(shape=[2], data=["a", "b"], parameters={"best_of": 2})
    assert [request.n for request in decoded(raw)] == [2, 2]
    parsed = open_inference.parse(raw, "m")
    candidates = [
        Completion(
            text,
            finish_reason=FinishReason.LENGTH,
            prompt_tokens=1,
            completion_tokens=1,
            tokens=(Token(7, text, value),),
        )
        for text, value in (("worse", -2.0), ("better", -1.0), ("good", -0.5), ("bad", -3.0))
    ]
    response = open_inference.encode(parsed, candidates)
    assert response.outputs[0].data == ["better", "good"]


def test_decode_deep_or_long_input_raises() -> None:
    deep = "[" * 100_000
    half = json.dumps([{"role": "user", "content": "\ud800"}])
    for raw in (
        body(parameters={"stop": deep, "max_tokens": -2}),
        body(name="messages", data=[deep]),
        body(name="messages", data=[half]),
        b"1" * 5000,
        deep.encode(),
    ):
        with pytest.raises(InvalidRequest):
            decoded(raw)
