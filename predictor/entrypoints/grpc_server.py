"""Open Inference Protocol v2 over gRPC: KServe's protobuf service with correct status codes.

KServe's own servicer is not used: its interceptor replaces some errors by others. Protocol, API keys and limits are
those of HTTP. Where HTTP closes connections, clients get GOAWAY: they finish their calls and connect elsewhere.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as protobuf_service

from predictor import served_models
from predictor.entrypoints import kserve_server
from predictor.entrypoints.api_keys import KeyFile
from predictor.entrypoints.kserve_model import Predictor
from predictor.errors import Forbidden, GenerationFailed, NotNow, PortInUse, RequestError
from predictor.generation.service import LLMService
from predictor.observability import request_record
from predictor.protocols import open_inference
from predictor.protocols.sampling_fields import TIMEOUT_HEADER

if TYPE_CHECKING:
    from predictor.observability.tracing import Tracing

logger = logging.getLogger(__name__)

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""gRPC status codes by the HTTP status of an error; INTERNAL for all others."""


CALL_END_SECONDS = 1.0
"""Time for calls to send their response, once generation has stopped."""


class GRPCServer:
    """A running server: its port, and how it ends."""

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self.port = port
        self._server = server
        self._drained: asyncio.Task[None] | None = None

    def drain(self, grace_seconds: float) -> None:
        """Send GOAWAY to all clients and refuse new connections and calls; running calls go on for `grace_seconds`."""
        self._drained = asyncio.create_task(self._server.stop(grace_seconds))

    async def stop(self) -> None:
        """Wait for running calls a moment, then cancel them."""
        await self._server.stop(CALL_END_SECONDS)
        if self._drained:
            await self._drained


@asynccontextmanager
async def serve(
    service: LLMService,
    *,
    host: str = kserve_server.ALL_ADDRESSES,
    port: int,
    max_message_bytes: int,
    api_keys: KeyFile | None = None,
    tracing: "Tracing | None" = None,
) -> AsyncIterator[GRPCServer]:
    """Run a gRPC server within the context.

    Args:
        service: generates; may still be loading.
        host: IPv4 address of the port.
        port: TCP port; 0: any free one.
        max_message_bytes: largest request.
        api_keys: accepted bearer keys; None: calls need none.
        tracing: exports a span for each call; None: off.

    Raises:
        PortInUse: the port cannot be opened.
    """
    options = [("grpc.max_receive_message_length", max_message_bytes), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options)
    protobuf_service.add_GRPCInferenceServiceServicer_to_server(_Servicer(service, api_keys, tracing), server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        raise PortInUse(f"Port {port} cannot be opened. Choose another with --grpc_port.") from None
    await server.start()
    running = GRPCServer(server, bound)
    try:
        yield running
    finally:
        await running.stop()


class _Servicer(protobuf_service.GRPCInferenceServiceServicer):
    """The seven calls of the protocol and its model repository extension."""

    def __init__(self, service: LLMService, api_keys: KeyFile | None, tracing: "Tracing | None") -> None:
        self._service = service
        self._predictor = Predictor(service)
        self._api_keys = api_keys
        self._tracing = tracing

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return messages.ServerLiveResponse(live=self._service.is_live)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return messages.ServerReadyResponse(ready=self._service.accepts_requests)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        async with self._call(context, "ModelReady", is_probe=True):
            self._service.models.require(request.name, request.version)
            return messages.ModelReadyResponse(ready=self._service.accepts_requests)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        async with self._call(context, "ServerMetadata"):
            version = installed_version(open_inference.SERVER)
            return messages.ServerMetadataResponse(name=open_inference.SERVER, version=version, extensions=[])

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        async with self._call(context, "ModelMetadata"):
            self._service.models.require(request.name, request.version)
            return messages.ModelMetadataResponse(
                name=request.name,
                versions=[served_models.VERSION],
                platform=open_inference.PLATFORM,
                inputs=self._predictor.get_input_types(),
                outputs=self._predictor.get_output_types(),
            )

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        async with self._call(context, "ModelInfer"):
            self._service.models.require(request.model_name, request.model_version)
            payload = open_inference.from_grpc(request)
            remaining = context.time_remaining()
            headers = {} if remaining is None else {TIMEOUT_HEADER: str(remaining)}
            response = await kserve_server.infer(self._predictor, payload, headers)
            return open_inference.to_grpc(request, response)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        async with self._call(context, "RepositoryModelLoad"):
            _reject_admin_call("load")

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        async with self._call(context, "RepositoryModelUnload"):
            _reject_admin_call("unload")

    @asynccontextmanager
    async def _call(self, context: Any, method: str, *, is_probe: bool = False) -> AsyncIterator[None]:
        """Check the API key, convert errors to status codes, and record, log and trace the call."""
        started = time.monotonic()
        metadata = context.invocation_metadata()
        record = request_record.RequestRecord(
            request_record.request_id(_values(metadata, "x-request-id")), protocol="grpc"
        )
        with request_record.bind(record):
            try:
                if not is_probe and self._api_keys is not None:
                    record.caller = self._api_keys.authenticate(_values(metadata, "authorization"))
                yield
                _set_trailing_metadata(context, record)
                status, http_status = "OK", 200
            except asyncio.CancelledError:
                status, http_status = "CANCELLED", request_record.CLIENT_GONE
                raise
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.exception("unexpected error in a gRPC call")
                    error = GenerationFailed("Internal server error. See the server's log.")
                code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
                record.error, status, http_status = type(error).__name__, code.name, error.status
                _set_trailing_metadata(context, record, error)
                await context.abort(code, str(error))
            finally:
                if not is_probe:
                    self._service.count_request(record.protocol, http_status)
                    if self._tracing:
                        self._tracing.export_grpc(method, metadata, status, http_status, started, record)
                    request_record.log_request(f"gRPC {status}", record, {"status": status})


def _set_trailing_metadata(
    context: Any, record: request_record.RequestRecord, error: RequestError | None = None
) -> None:
    """Send what HTTP has in headers: the names of unknown fields, and when to retry."""
    metadata = []
    if record.ignored_fields:
        metadata.append((request_record.IGNORED_FIELDS_HEADER, ", ".join(record.ignored_fields)))
    if isinstance(error, NotNow):
        metadata.append(("retry-after", str(error.retry_after_seconds)))
    if metadata:
        context.set_trailing_metadata(metadata)


def _values(metadata: Any, name: str) -> list[str]:
    return [str(value) for key, value in metadata if key == name]


def _reject_admin_call(action: str) -> NoReturn:
    raise Forbidden(f"Model {action} is not supported over gRPC.")
