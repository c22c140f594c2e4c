"""The protocol over gRPC, asked with KServe's own stubs."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service

from devtools import processes
from devtools.processes import ROOT

KEY = "a-key-of-enough-characters"
WITH_KEY = (("authorization", f"Bearer {KEY}"),)
ANSWER = b" 7+5=12 1+2+1=4 42"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A stub, and the URL over HTTP."""
    folder: Path = tmp_path_factory.mktemp("rpc")
    (folder / "keys").write_text(f"tests:{KEY}\n")
    port = processes.free_port()
    flags = ["--model_dir", str(ROOT / "demo" / "model"), "--enable_grpc", "--grpc_port", str(port)]
    with (
        (folder / "log").open("w") as log,
        processes.predictor(
            [*flags, "--api_keys_file", str(folder / "keys")],
            model_name="demo",
            port=processes.free_port(),
            stderr=log,
        ) as running,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield service.GRPCInferenceServiceStub(channel), running.url


@pytest.fixture
def stub(served: tuple[Any, str]) -> Any:
    return served[0]


@pytest.fixture
def url(served: tuple[Any, str]) -> str:
    return served[1]


def request(*prompts: bytes, raw: bool = False, **fields: Any) -> Any:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [len(prompts)]}
    if raw:
        encoded = b"".join(len(prompt).to_bytes(4, "little") + prompt for prompt in prompts)
        fields["raw_input_contents"] = [encoded]
    else:
        tensor["contents"] = {"bytes_contents": list(prompts)}
    parameters = {
        "max_tokens": messages.InferParameter(int64_param=40),
        "temperature": messages.InferParameter(string_param="0.0"),
    }
    parameters |= fields.pop("parameters", {})
    return messages.ModelInferRequest(
        **{"model_name": "demo", "inputs": [tensor], "parameters": parameters, "id": "7"} | fields
    )


def code(call: Any, message: Any, **options: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        call(message, **{"metadata": WITH_KEY} | options)
    return raised.value.code()


def test_tells_that_it_lives_and_is_ready_without_a_key(stub: Any) -> None:
    assert stub.ServerLive(messages.ServerLiveRequest()).live
    assert stub.ServerReady(messages.ServerReadyRequest()).ready
    assert stub.ModelReady(messages.ModelReadyRequest(name="demo", version="1")).ready


def test_describes_the_server_and_the_model(stub: Any) -> None:
    assert stub.ServerMetadata(messages.ServerMetadataRequest(), metadata=WITH_KEY).name == "kserve-llm"
    described = stub.ModelMetadata(messages.ModelMetadataRequest(name="demo"), metadata=WITH_KEY)
    assert [tensor.name for tensor in described.inputs] == ["text_input", "messages"]


def test_infers_from_contents_and_answers_in_contents(stub: Any) -> None:
    outputs = [{"name": "text_output"}, {"name": "completion_tokens"}]
    response = stub.ModelInfer(request(b"17+25=", outputs=outputs), metadata=WITH_KEY)
    assert response.id == "7"
    assert response.outputs[0].contents.bytes_contents == [ANSWER]
    assert response.outputs[1].contents.int64_contents == [19]


def test_infers_from_raw_contents_and_answers_raw(stub: Any) -> None:
    response = stub.ModelInfer(request(b"17+25=", raw=True), metadata=WITH_KEY)
    assert response.raw_output_contents == [len(ANSWER).to_bytes(4, "little") + ANSWER]


def test_wants_a_key(stub: Any) -> None:
    assert code(stub.ModelInfer, request(b"1"), metadata=()) is grpc.StatusCode.UNAUTHENTICATED
    wrong = (("authorization", "Bearer another-key-altogether"),)
    assert code(stub.ModelInfer, request(b"1"), metadata=wrong) is grpc.StatusCode.UNAUTHENTICATED


def test_errors_have_their_status_codes(stub: Any) -> None:
    assert code(stub.ModelInfer, request(b"1", model_name="other")) is grpc.StatusCode.NOT_FOUND
    assert code(stub.ModelInfer, request(b"1", model_version="2")) is grpc.StatusCode.NOT_FOUND
    assert code(stub.ModelInfer, request(b"")) is grpc.StatusCode.INVALID_ARGUMENT
    wrong = {"top_p": messages.InferParameter(string_param="much")}
    assert code(stub.ModelInfer, request(b"1", parameters=wrong)) is grpc.StatusCode.INVALID_ARGUMENT
    load = messages.RepositoryModelLoadRequest(model_name="demo")
    assert code(stub.RepositoryModelLoad, load) is grpc.StatusCode.PERMISSION_DENIED


def test_parameters_hold_for_the_input_before_the_request(stub: Any) -> None:
    message = request(b"17+25=", outputs=[{"name": "completion_tokens"}, {"name": "finish_reason"}])
    message.inputs[0].parameters["max_tokens"].int64_param = 3
    response = stub.ModelInfer(message, metadata=WITH_KEY)
    assert [output.name for output in response.outputs] == ["completion_tokens", "finish_reason"]
    assert response.outputs[0].contents.int64_contents == [3]
    assert response.outputs[1].contents.bytes_contents == [b"length"]


def test_answers_several_prompts_in_order_and_in_their_shape(stub: Any) -> None:
    message = request(b"17+25=", b"7+5=")
    message.inputs[0].shape[:] = [2, 1]
    [output] = stub.ModelInfer(message, metadata=WITH_KEY).outputs
    assert list(output.shape) == [2, 1]
    assert output.contents.bytes_contents[0] == ANSWER
    assert output.contents.bytes_contents[1] != ANSWER


def hostile() -> Iterator[Any]:
    good = request(b"1")
    yield messages.ModelInferRequest(model_name="demo")
    for change in (
        {"inputs": [*good.inputs, *good.inputs]},
        {"inputs": [{"name": "other", "datatype": "BYTES", "shape": [1]}]},
        {"inputs": [{"name": "text_input", "datatype": "FP32", "shape": [1], "contents": {"fp32_contents": [1.0]}}]},
        {
            "inputs": [
                {"name": "text_input", "datatype": "BYTES", "shape": [-1], "contents": {"bytes_contents": [b"1"]}}
            ]
        },
        {"outputs": [{"name": "other"}]},
        {"raw_input_contents": [b"\xff\xff\xff\xff"]},
        {"raw_input_contents": [b"", b""]},
        {"parameters": {"stop_token_ids": messages.InferParameter(string_param="[" * 100_000)}},
        {"parameters": {"max_tokens": messages.InferParameter(string_param="\0")}},
        {"parameters": {"temperature": messages.InferParameter(string_param="nan")}},
        {"parameters": {"seed": messages.InferParameter(bool_param=True)}},
    ):
        yield request(b"1", **change)
    yield request(b"\xff")
    deep = request(b"[" * 100_000)
    deep.inputs[0].name = "messages"
    yield deep
    both = request(b"1")
    both.raw_input_contents.append(b"\1\0\0\0" + b"1")
    yield both


@pytest.mark.parametrize("message", list(hostile()))
def test_what_makes_no_sense_is_an_invalid_argument(stub: Any, message: Any) -> None:
    assert code(stub.ModelInfer, message) is grpc.StatusCode.INVALID_ARGUMENT


def endless() -> Any:
    """As long as the context of the demo model allows."""
    parameters = {
        "max_tokens": messages.InferParameter(int64_param=1000),
        "ignore_eos": messages.InferParameter(bool_param=True),
    }
    return request(b"17+25=", parameters=parameters)


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    lines = (line for line in text.splitlines() if line.startswith(f"kserve_llm_{name}"))
    return float(next(lines, "0 0").rpartition(" ")[2])


def becomes(url: str, name: str, value: float) -> None:
    """Waits, for as long as the run's own limit allows."""
    while metric(url, name) != value:
        time.sleep(0.02)


CANCELLED = 'request_finished_total{finished_reason="cancelled"'
RUNNING = "num_requests_running"


def test_a_deadline_ends_the_call_and_frees_its_place(stub: Any, url: str) -> None:
    assert code(stub.ModelInfer, endless(), timeout=0.2) is grpc.StatusCode.DEADLINE_EXCEEDED
    becomes(url, RUNNING, 0)
    assert stub.ModelInfer(request(b"17+25="), metadata=WITH_KEY).outputs[0].contents.bytes_contents == [ANSWER]


def test_a_cancelled_call_frees_its_place(stub: Any, url: str) -> None:
    before = metric(url, CANCELLED)
    call = stub.ModelInfer.future(endless(), metadata=WITH_KEY)
    becomes(url, RUNNING, 1)
    assert call.cancel()
    becomes(url, CANCELLED, before + 1)
    becomes(url, RUNNING, 0)
