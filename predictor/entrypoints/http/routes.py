"""The HTTP routes: which path speaks which protocol. Decodes, opens an answer, encodes; owns no logic of its own.

An answer that nobody waits for any more is given up: every route listens for its client's leaving while it works.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, suppress
from importlib.metadata import version as installed_version
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from predictor.entrypoints.http import openapi
from predictor.entrypoints.http.openapi import EVENTS, GENERATING, OCTETS, OPENAI_ERROR, gives, streams, takes
from predictor.entrypoints.kserve_model import Predictor
from predictor.errors import Forbidden, ModelNotReady, NotFound, NotNow, RequestError
from predictor.generation.output_processor import CompletionStream
from predictor.observability import request_record
from predictor.protocols import kserve_v1, open_inference, open_inference_generate, openai
from predictor.protocols.sampling_fields import timeout_seconds
from predictor.types import Completion, CompletionDelta, GenerationRequest

_T = TypeVar("_T")


class _Stream(Protocol):
    """A protocol's events for an answer, each a complete server-sent event."""

    def begin(self) -> list[str]: ...
    def piece(self, piece: CompletionDelta) -> list[str]: ...
    def end(self) -> list[str]: ...
    def error(self, error: RequestError) -> list[str]: ...


def add(app: FastAPI, predictor: Predictor, *, with_admin_routes: bool) -> None:
    """Add all routes of one model to KServe's app, before its own: the first that matches wins.

    Args:
        app: KServe's.
        predictor: what answers.
        with_admin_routes: leave KServe's routes to load and unload models as they are, open.
    """
    # KServe v1 before OpenAI, since a model's name there would take `NAME:predict` for one.
    routers = [_health(predictor), _v2(predictor), _v1(predictor), _openai(predictor)]
    if not with_admin_routes:
        routers.append(_closed(predictor))
    for router in routers:
        app.include_router(router)
    described = openapi.document(open_inference.SERVER, [route for router in routers for route in router.routes])
    # /openapi.json is a route of FastAPI's own; with KServe's routes in it, it would describe what is shadowed here.
    app.openapi = lambda: described  # type: ignore[method-assign]


def _router(**options: Any) -> APIRouter:
    """A router whose answers are plain JSON: KServe's app has a response class for it that warns at every use."""
    return APIRouter(default_response_class=JSONResponse, **options)


def _health(predictor: Predictor) -> APIRouter:
    router = _router(tags=["health"])

    @router.get("/v2/health/live", **gives(openapi.LIVE, 503))
    async def server_live() -> dict[str, bool]:
        if not predictor.live:
            raise NotNow("The step loop makes no progress or has ended; the server has to be restarted.")
        return {"live": True}

    @router.get("/health", include_in_schema=False)
    @router.get("/v2/health/ready", **gives(openapi.READY, 503))
    async def server_ready() -> dict[str, bool]:
        await _require_ready(predictor)
        return {"ready": True}

    return router


def _v2(predictor: Predictor) -> APIRouter:
    router = _router(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("", **gives(openapi.SERVER, 401))
    @router.get("/", include_in_schema=False)
    async def server_metadata() -> dict[str, Any]:
        version = installed_version(open_inference.SERVER)
        return {"name": open_inference.SERVER, "version": version, "extensions": list(open_inference.EXTENSIONS)}

    @router.get("/models", **gives(openapi.MODEL_NAMES, 401))
    async def models() -> dict[str, Any]:
        return {"models": [predictor.name]}

    for model in ("/models/{model_name}", "/models/{model_name}/versions/{model_version}"):
        versioned = "version" in model

        @router.get(model, name=f"metadata{versioned}", **gives(openapi.MODEL, 401, 404))
        async def model_metadata(request: Request) -> dict[str, Any]:
            _known(request, predictor)
            return {
                "name": predictor.name,
                "versions": [open_inference.VERSION],
                "platform": open_inference.PLATFORM,
                "inputs": predictor.get_input_types(),
                "outputs": predictor.get_output_types(),
                "properties": predictor.facts,
            }

        @router.get(f"{model}/ready", name=f"ready{versioned}", **gives(openapi.MODEL_READY, 404, 503))
        async def model_ready(request: Request) -> dict[str, Any]:
            _known(request, predictor)
            await _require_ready(predictor)
            return {"name": predictor.name, "ready": True}

        @router.post(
            f"{model}/infer",
            name=f"infer{versioned}",
            **takes(open_inference.REQUEST_SCHEMA),
            **gives(openapi.INFERRED, 400, *GENERATING, also=OCTETS),
        )
        async def infer(request: Request) -> Response:
            version = _known(request, predictor)
            body = await _body(request, "v2")
            payload = open_inference.parse(body, predictor.name, request.headers.get(open_inference.HEADER_LENGTH))
            response, _ = await _unless_gone(request.receive, predictor(payload, headers=dict(request.headers)))
            content, header_length = open_inference.serialize(payload, response, version)
            if header_length is None:
                return Response(content, media_type="application/json")
            headers = {open_inference.HEADER_LENGTH: str(header_length)}
            return Response(content, media_type="application/octet-stream", headers=headers)

        @router.post(
            f"{model}/generate",
            name=f"generate{versioned}",
            **takes(open_inference_generate.REQUEST_SCHEMA),
            **gives(openapi.GENERATED, 422, 424, *GENERATING),
        )
        async def generate_once(request: Request) -> JSONResponse:
            version = _known(request, predictor)
            asked = open_inference_generate.decode(await _body(request, "generate"), predictor.name, version)
            [completion] = await _completions(request, predictor, [asked.request])
            return JSONResponse(open_inference_generate.encode(asked, completion))

        @router.post(
            f"{model}/generate_stream",
            name=f"generate_stream{versioned}",
            **takes(open_inference_generate.REQUEST_SCHEMA),
            **streams(openapi.GENERATED_EVENT, 422, 424, *GENERATING),
        )
        async def generate_stream(request: Request) -> Response:
            version = _known(request, predictor)
            asked = open_inference_generate.decode(await _body(request, "generate_stream"), predictor.name, version)
            return _EventStream(_open(request, predictor, [asked.request]), open_inference_generate.Stream(asked))

    return router


def _openai(predictor: Predictor) -> APIRouter:
    router = _router(tags=["OpenAI"])
    created = int(time.time())

    def described() -> dict[str, Any]:
        return openai.model(predictor.name, created, predictor.context_tokens)

    @router.get("/openai/v1/models", name="openai_models", **gives(openapi.OPENAI_MODELS, 401, error=OPENAI_ERROR))
    async def models() -> dict[str, Any]:
        return openai.models(predictor.name, created, predictor.context_tokens)

    @router.get(
        "/openai/v1/models/{model_name}",
        name="openai_model",
        **gives(openapi.OPENAI_MODEL, 401, 404, error=OPENAI_ERROR),
    )
    async def model(request: Request) -> dict[str, Any]:
        _known(request, predictor)
        return described()

    @router.get("/v1/models", name="v1_models", **gives(openapi.BOTH_MODELS, 401))
    async def both_models() -> dict[str, Any]:
        """OpenAI's list and KServe v1's in one object: each client finds its own and ignores the other."""
        return {**openai.models(predictor.name, created, predictor.context_tokens), "models": [predictor.name]}

    @router.get("/v1/models/{model_name}", name="v1_model", **gives(openapi.BOTH_MODEL, 401, 404, 503))
    async def both_model(request: Request) -> dict[str, Any]:
        """OpenAI's model and KServe v1's readiness in one object."""
        _known(request, predictor)
        await _require_ready(predictor)
        return {**described(), "name": predictor.name, "ready": True}

    for prefix in ("/openai/v1", "/v1"):

        @router.post(
            f"{prefix}/completions",
            name=f"completions {prefix}",
            **takes(openai.COMPLETIONS_SCHEMA),
            **gives(openapi.COMPLETION, 400, *GENERATING, also=EVENTS, error=OPENAI_ERROR),
        )
        async def completions(request: Request) -> Response:
            asked = openai.decode_completions(await _body(request, "openai"), predictor.name)
            return await _answer_openai(request, asked)

        @router.post(
            f"{prefix}/chat/completions",
            name=f"chat {prefix}",
            **takes(openai.CHAT_SCHEMA),
            **gives(openapi.CHAT_COMPLETION, 400, *GENERATING, also=EVENTS, error=OPENAI_ERROR),
        )
        async def chat_completions(request: Request) -> Response:
            asked = openai.decode_chat(await _body(request, "openai"), predictor.name)
            return await _answer_openai(request, asked)

    async def _answer_openai(request: Request, asked: openai.Asked) -> Response:
        if asked.stream:
            return _EventStream(_open(request, predictor, asked.requests), openai.Stream(asked))
        return JSONResponse(openai.encode(asked, await _completions(request, predictor, asked.requests)))

    return router


def _v1(predictor: Predictor) -> APIRouter:
    router = _router(prefix="/v1", tags=["KServe v1"])

    @router.post(
        "/models/{model_name}:predict",
        **takes(kserve_v1.REQUEST_SCHEMA),
        **gives(openapi.PREDICTIONS, 400, *GENERATING),
    )
    async def predict(request: Request) -> JSONResponse:
        _known(request, predictor)
        requests = kserve_v1.decode(await _body(request, "v1"))
        return JSONResponse(kserve_v1.encode(await _completions(request, predictor, requests)))

    @router.get("/models/{model_name}:predict", include_in_schema=False)
    async def predict_by_get() -> None:
        """Elsewhere the router says this itself; here the path of a model's readiness would match."""
        raise HTTPException(405, headers={"Allow": "POST"})

    @router.post("/models/{model_name}:explain", include_in_schema=False)
    async def explain(request: Request) -> None:
        _known(request, predictor)
        raise NotFound(f"This model explains nothing; POST /v1/models/{predictor.name}:predict instead.")

    return router


def _closed(predictor: Predictor) -> APIRouter:
    router = _router(include_in_schema=False)

    @router.post("/v2/repository/models/{model_name}/{action}")
    async def repository(action: str) -> None:
        raise Forbidden(f"This server does not {action} models on request; it serves {predictor.name}, as deployed.")

    return router


class _EventStream(StreamingResponse):
    """Server-sent events for an answer, flushed one by one; the answer is closed however this ends."""

    def __init__(self, answer: CompletionStream, stream: _Stream) -> None:
        super().__init__(
            _events(answer, stream),
            media_type="text/event-stream",
            # Proxies would hold events back, or compress them in lumps.
            headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"},
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        try:
            with suppress(ClientDisconnect):
                await _unless_gone(receive, self.stream_response(send))
        finally:
            self._answer.close()


async def _events(answer: CompletionStream, stream: _Stream) -> AsyncIterator[str]:
    try:
        for event in stream.begin():
            yield event
        async with aclosing(answer.deltas()) as pieces:
            async for piece in pieces:
                for event in stream.piece(piece):
                    yield event
        for event in stream.end():
            yield event
    except RequestError as error:
        request_record.current().error = type(error).__name__
        for event in stream.error(error):
            yield event


async def _body(request: Request, protocol: str) -> bytes:
    request_record.current().protocol = protocol
    return await request.body()


def _open(request: Request, predictor: Predictor, requests: Sequence[GenerationRequest]) -> CompletionStream:
    return predictor.open(requests, timeout_seconds(request.headers))


async def _completions(
    request: Request, predictor: Predictor, requests: Sequence[GenerationRequest]
) -> list[Completion]:
    answer = _open(request, predictor, requests)
    try:
        return await _unless_gone(request.receive, answer.complete())
    finally:
        answer.close()


async def _unless_gone(receive: Receive, work: Awaitable[_T]) -> _T:
    """What `work` gives; cancelled when the client closes its connection first.

    Raises:
        ClientDisconnect: there is nobody to tell.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_leaving(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for ending in (task, leaving):
            ending.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _known(request: Request, predictor: Predictor) -> str | None:
    """Refuse a model or version that is not this one; gives the version where the route names one."""
    name = request.path_params["model_name"]
    if name != predictor.name:
        raise NotFound(f"There is no model {name!r} here, only {predictor.name!r}.")
    version: str | None = request.path_params.get("model_version")
    if version not in (None, open_inference.VERSION):
        raise NotFound(f"The model {name!r} has no version {version!r} here, only {open_inference.VERSION!r}.")
    return version


async def _require_ready(predictor: Predictor) -> None:
    if not await predictor.healthy():
        raise ModelNotReady(f"The model {predictor.name} is not ready: {predictor.unreadiness}.")
