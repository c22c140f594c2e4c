"""The protocol over gRPC, asked with KServe's own stubs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service

from demo import processes
from demo.processes import ROOT

KEY = "a-key-of-enough-characters"
WITH_KEY = (("authorization", f"Bearer {KEY}"),)
ANSWER = b" 7+5=12 1+2+1=4 42"


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
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
        ),
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield service.GRPCInferenceServiceStub(channel)


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


def test_a_deadline_ends_the_call_and_the_next_one_is_answered(stub: Any) -> None:
    long = {
        "max_tokens": messages.InferParameter(int64_param=900),
        "ignore_eos": messages.InferParameter(bool_param=True),
    }
    late = request(b"17+25=", parameters=long)
    assert code(stub.ModelInfer, late, timeout=0.2) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert stub.ModelInfer(request(b"17+25="), metadata=WITH_KEY).outputs[0].contents.bytes_contents == [ANSWER]
