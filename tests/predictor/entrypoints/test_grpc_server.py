"""Open Inference Protocol over gRPC, called with KServe's own stubs."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service

from predictor.entrypoints import grpc_server
from predictor.errors import PortInUse
from tests.predictor import servers
from tests.predictor.servers import InProcessServer

KEY = "a-key-of-enough-characters"
WITH_KEY = (("authorization", f"Bearer {KEY}"),)
H2_EMPTY_SETTINGS, H2_GOAWAY = b"\0\0\0\4\0\0\0\0\0", 7
ANSWER = b" 7+5=12 1+2+1=4 42"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    keys: Path = tmp_path_factory.mktemp("grpc") / "keys"
    keys.write_text(f"tests:{KEY}\n")
    with servers.in_process("--enable_grpc", model_name="grpc", keys=keys) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: InProcessServer) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield service.GRPCInferenceServiceStub(channel)


def request(*prompts: bytes, raw: bool = False, **fields: Any) -> Any:
    tensor: dict[str, Any] = {"name": "text_input", "datatype": "BYTES", "shape": [len(prompts)]}
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
        **{"model_name": "grpc", "inputs": [tensor], "parameters": parameters, "id": "7"} | fields
    )


def code(call: Any, message: Any, **options: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        call(message, **{"metadata": WITH_KEY} | options)
    return raised.value.code()


def test_probes_need_no_key(stub: Any) -> None:
    assert stub.ServerLive(messages.ServerLiveRequest()).live
    assert stub.ServerReady(messages.ServerReadyRequest()).ready
    assert stub.ModelReady(messages.ModelReadyRequest(name="grpc", version="1")).ready


def test_metadata_has_server_name_and_inputs(stub: Any) -> None:
    assert stub.ServerMetadata(messages.ServerMetadataRequest(), metadata=WITH_KEY).name == "kserve-llm"
    metadata = stub.ModelMetadata(messages.ModelMetadataRequest(name="grpc"), metadata=WITH_KEY)
    assert [tensor.name for tensor in metadata.inputs] == ["text_input", "messages"]


def test_infer_with_contents_returns_contents(stub: Any) -> None:
    outputs = [{"name": "text_output"}, {"name": "completion_tokens"}]
    response = stub.ModelInfer(request(b"17+25=", outputs=outputs), metadata=WITH_KEY)
    assert response.id == "7"
    assert response.outputs[0].contents.bytes_contents == [ANSWER]
    assert response.outputs[1].contents.int64_contents == [19]


def test_infer_with_raw_contents_returns_raw_contents(stub: Any) -> None:
    response = stub.ModelInfer(request(b"17+25=", raw=True), metadata=WITH_KEY)
    assert response.raw_output_contents == [len(ANSWER).to_bytes(4, "little") + ANSWER]


def test_infer_without_a_valid_key_is_unauthenticated(stub: Any) -> None:
    assert code(stub.ModelInfer, request(b"1"), metadata=()) is grpc.StatusCode.UNAUTHENTICATED
    wrong = (("authorization", "Bearer another-key-altogether"),)
    assert code(stub.ModelInfer, request(b"1"), metadata=wrong) is grpc.StatusCode.UNAUTHENTICATED


def test_error_has_its_status_code(stub: Any) -> None:
    assert code(stub.ModelInfer, request(b"1", model_name="other")) is grpc.StatusCode.NOT_FOUND
    assert code(stub.ModelInfer, request(b"1", model_version="2")) is grpc.StatusCode.NOT_FOUND
    assert code(stub.ModelInfer, request(b"")) is grpc.StatusCode.INVALID_ARGUMENT
    wrong = {"top_p": messages.InferParameter(string_param="much")}
    assert code(stub.ModelInfer, request(b"1", parameters=wrong)) is grpc.StatusCode.INVALID_ARGUMENT
    load = messages.RepositoryModelLoadRequest(model_name="grpc")
    assert code(stub.RepositoryModelLoad, load) is grpc.StatusCode.PERMISSION_DENIED


def test_parameters_of_the_input_precede_those_of_the_request(stub: Any) -> None:
    message = request(b"17+25=", outputs=[{"name": "completion_tokens"}, {"name": "finish_reason"}])
    message.inputs[0].parameters["max_tokens"].int64_param = 3
    response = stub.ModelInfer(message, metadata=WITH_KEY)
    assert [output.name for output in response.outputs] == ["completion_tokens", "finish_reason"]
    assert response.outputs[0].contents.int64_contents == [3]
    assert response.outputs[1].contents.bytes_contents == [b"length"]


def test_unknown_parameters_are_named_in_the_trailing_metadata(stub: Any) -> None:
    unknown = {"max_token": messages.InferParameter(int64_param=2)}
    _, call = stub.ModelInfer.with_call(request(b"17+25=", parameters=unknown), metadata=WITH_KEY)
    assert dict(call.trailing_metadata())["x-ignored-fields"] == "parameters.max_token"
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request(b"1" * 2000, parameters=unknown), metadata=WITH_KEY)
    assert dict(raised.value.trailing_metadata())["x-ignored-fields"] == "parameters.max_token"


def test_infer_with_several_prompts_keeps_order_and_shape(stub: Any) -> None:
    message = request(b"17+25=", b"7+5=")
    message.inputs[0].shape[:] = [2, 1]
    [output] = stub.ModelInfer(message, metadata=WITH_KEY).outputs
    assert list(output.shape) == [2, 1]
    assert output.contents.bytes_contents[0] == ANSWER
    assert output.contents.bytes_contents[1] != ANSWER


def malformed() -> Iterator[Any]:
    good = request(b"1")
    yield messages.ModelInferRequest(model_name="grpc")
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


@pytest.mark.parametrize("message", list(malformed()))
def test_malformed_request_is_an_invalid_argument(stub: Any, message: Any) -> None:
    assert code(stub.ModelInfer, message) is grpc.StatusCode.INVALID_ARGUMENT


def long_request(max_tokens: int = 1000) -> Any:
    """A request of exactly this number of tokens, by default almost the demo model's context."""
    parameters = {
        "max_tokens": messages.InferParameter(int64_param=max_tokens),
        "ignore_eos": messages.InferParameter(bool_param=True),
    }
    return request(b"17+25=", parameters=parameters)


def test_infer_past_its_deadline_is_cancelled(stub: Any, server: InProcessServer) -> None:
    server.hold.close(after=3)
    assert code(stub.ModelInfer, long_request(), timeout=0.2) is grpc.StatusCode.DEADLINE_EXCEEDED
    server.hold.open()
    server.wait_until_idle()
    assert stub.ModelInfer(request(b"17+25="), metadata=WITH_KEY).outputs[0].contents.bytes_contents == [ANSWER]


def test_infer_cancelled_by_the_client_frees_its_slot(stub: Any, server: InProcessServer) -> None:
    cancelled = server.metric("request_finished_total", finished_reason="cancelled")
    server.hold.close(after=3)
    call = stub.ModelInfer.future(long_request(), metadata=WITH_KEY)
    server.wait_for_metrics(num_requests_running=1)
    assert call.cancel()
    server.wait_for_metric("request_finished_total", cancelled + 1, finished_reason="cancelled")
    server.hold.open()
    server.wait_until_idle()


def test_serve_on_a_taken_port_names_the_flag(server: InProcessServer) -> None:
    async def serve() -> None:
        async with grpc_server.serve(server.service, port=server.grpc_port, max_message_bytes=1024):
            pass

    with pytest.raises(PortInUse, match="--grpc_port"):
        asyncio.run(serve())


async def receive_goaway(port: int) -> Callable[[], Coroutine[Any, Any, None]]:
    """Open an HTTP/2 connection and return a function that reads its frames until GOAWAY."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + H2_EMPTY_SETTINGS)

    async def read() -> None:
        kind = -1
        while kind != H2_GOAWAY:
            head = await reader.readexactly(9)
            kind = head[3]
            await reader.readexactly(int.from_bytes(head[:3]))
        writer.close()

    return read


def test_drain_sends_goaway_and_finishes_running_calls(server: InProcessServer) -> None:
    async def drain() -> None:
        async with grpc_server.serve(server.service, port=0, max_message_bytes=100_000) as running:
            idle = await receive_goaway(running.port)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel:
                infer = service.GRPCInferenceServiceStub(channel).ModelInfer
                server.hold.close(after=3)
                call = asyncio.ensure_future(infer(long_request(40)))
                await asyncio.to_thread(server.wait_for_metrics, num_requests_running=1)
                running.drain(servers.HANG_SECONDS)
                await idle()
                # The channel's own GOAWAY, before which a call could still reach the connection that is being closed.
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await infer(request(b"1+1="))
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
                server.hold.open()
                assert (await call).outputs[0].contents.bytes_contents

    asyncio.run(asyncio.wait_for(drain(), servers.HANG_SECONDS))
