"""Open Inference Protocol v2 over gRPC: the service of KServe's own protobuf definition, with honest status codes.

Not KServe's servicer, whose interceptor turns some errors into others. Answers what the HTTP routes answer, through
the same protocol module; knows the same keys, drain and limits.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service

from predictor.entrypoints.api_keys import KeyFile
from predictor.entrypoints.kserve_model import Predictor
from predictor.errors import Forbidden, GenerationFailed, NotFound, RequestError, Unauthorized
from predictor.observability import request_record
from predictor.protocols import open_inference
from predictor.protocols.sampling_fields import TIMEOUT_HEADER

if TYPE_CHECKING:
    from predictor.observability.tracing import Tracing

logger = logging.getLogger(__name__)
request_logger = logging.getLogger("predictor.request")

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status codes for the HTTP statuses of errors; INTERNAL for the rest."""


@asynccontextmanager
async def serving(
    predictor: Predictor, *, port: int, max_message_bytes: int, keys: KeyFile | None, tracing: "Tracing | None"
) -> AsyncIterator[int]:
    """A gRPC server on `port` (0: any that is free) for the time of the context; gives the port."""
    options = [("grpc.max_receive_message_length", max_message_bytes), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options)
    service.add_GRPCInferenceServiceServicer_to_server(_Service(predictor, keys, tracing), server)
    bound = server.add_insecure_port(f"0.0.0.0:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(grace=1.0)


class _Service(service.GRPCInferenceServiceServicer):
    """The seven calls."""

    def __init__(self, predictor: Predictor, keys: KeyFile | None, tracing: "Tracing | None") -> None:
        self._predictor = predictor
        self._keys = keys
        self._tracing = tracing

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return messages.ServerLiveResponse(live=self._predictor.live)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return messages.ServerReadyResponse(ready=await self._predictor.healthy())

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        async with self._request(context, "ModelReady", checks_key=False):
            self._known(request.name, request.version)
            return messages.ModelReadyResponse(ready=await self._predictor.healthy())

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        async with self._request(context, "ServerMetadata"):
            version = installed_version(open_inference.SERVER)
            return messages.ServerMetadataResponse(name=open_inference.SERVER, version=version, extensions=[])

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        async with self._request(context, "ModelMetadata"):
            self._known(request.name, request.version)
            return messages.ModelMetadataResponse(
                name=self._predictor.name,
                versions=[open_inference.VERSION],
                platform=open_inference.PLATFORM,
                inputs=self._predictor.get_input_types(),
                outputs=self._predictor.get_output_types(),
            )

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        async with self._request(context, "ModelInfer"):
            self._known(request.model_name, request.model_version)
            payload = open_inference.from_grpc(request)
            remaining = context.time_remaining()
            headers = {} if remaining is None else {TIMEOUT_HEADER: str(remaining)}
            response, _ = await self._predictor(payload, headers=headers)
            return open_inference.to_grpc(request, response)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        async with self._request(context, "RepositoryModelLoad"):
            self._refuse("load")

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        async with self._request(context, "RepositoryModelUnload"):
            self._refuse("unload")

    @asynccontextmanager
    async def _request(self, context: Any, method: str, *, checks_key: bool = True) -> AsyncIterator[None]:
        """What surrounds every call: the record, line and span of the request, the key, errors as status codes."""
        began = time.monotonic()
        metadata = context.invocation_metadata()
        ids = [str(value) for name, value in metadata if name == "x-request-id"]
        record = request_record.RequestRecord(request_record.request_id(ids), protocol="grpc")
        with request_record.bind(record):
            try:
                if checks_key and self._keys is not None:
                    record.key = _key_name(dict(metadata), self._keys.name_of)
                yield
                status, number = "OK", 200
            except asyncio.CancelledError:
                status, number = "CANCELLED", request_record.CLIENT_GONE
                raise
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.exception("A call failed for a reason that was not foreseen.")
                    error = GenerationFailed("The server failed on this request; its log says why.")
                code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
                record.error, status, number = type(error).__name__, code.name, error.status
                await context.abort(code, str(error))
            finally:
                if checks_key:
                    self._predictor.count_request(record.protocol, number)
                    if self._tracing:
                        self._tracing.export_grpc(method, metadata, status, number, began, record)
                    known = record.as_fields()
                    words = " ".join(f"{name}={value}" for name, value in known.items())
                    request_logger.info("gRPC %s %s", status, words, extra={"fields": {"status": status, **known}})

    def _known(self, name: str, version: str) -> None:
        if name != self._predictor.name:
            raise NotFound(f"There is no model {name!r} here, only {self._predictor.name!r}.")
        if version not in ("", open_inference.VERSION):
            raise NotFound(f"The model {name!r} has no version {version!r} here, only {open_inference.VERSION!r}.")

    def _refuse(self, action: str) -> NoReturn:
        raise Forbidden(f"This server does not {action} models on request; it serves {self._predictor.name}.")


def _key_name(metadata: dict[str, Any], name_of: Callable[[str], str | None]) -> str:
    scheme, _, key = str(metadata.get("authorization", "")).partition(" ")
    name = name_of(key.strip()) if scheme.lower() == "bearer" else None
    if name is None:
        raise Unauthorized("Send one of this server's keys in the metadata, as authorization: Bearer KEY.")
    return name
