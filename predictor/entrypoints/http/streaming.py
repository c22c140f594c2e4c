"""Generation for HTTP requests: submit, wait or stream server-sent events, and cancel when the client disconnects."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Protocol, Self, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from predictor.entrypoints import response_encoding
from predictor.errors import RequestError
from predictor.generation.output_processor import CompletionStream
from predictor.generation.service import LLMService
from predictor.observability import request_record
from predictor.protocols import json_body
from predictor.protocols.sampling_fields import timeout_seconds
from predictor.types import Chat, Completion, CompletionDelta, GenerationRequest

T = TypeVar("T")

COMMENT_SECONDS = 5.0
"""Interval of comments in a stream that is held while the model loads; shorter than idle timeouts of proxies."""
MAX_INLINE_BYTES = 65_536
"""Bodies up to this size are decoded on the event loop."""


class _EventEncoder(Protocol):
    """Encoder of one response; each item is a complete server-sent event."""

    def begin(self) -> list[str]: ...
    def delta(self, delta: CompletionDelta) -> list[str]: ...
    def end(self) -> list[str]: ...
    def error(self, error: RequestError) -> list[str]: ...


async def decode_body(request: Request, protocol: str, decode: Callable[[bytes], T]) -> T:
    """Read and decode the body, and record the protocol of the request.

    A large body is decoded in a thread, since 100,000 messages take seconds.
    """
    request_record.current().protocol = protocol
    body = await request.body()
    return decode(body) if len(body) <= MAX_INLINE_BYTES else await asyncio.to_thread(decode, body)


async def complete(request: Request, service: LLMService, requests: Sequence[GenerationRequest]) -> list[Completion]:
    """Generate all completions; cancelled when the client disconnects."""
    return await cancel_on_disconnect(request.receive, _complete(request, service, requests))


async def _complete(request: Request, service: LLMService, requests: Sequence[GenerationRequest]) -> list[Completion]:
    stream = await service.submit(requests, timeout_seconds(request.headers))
    try:
        return await stream.complete()
    finally:
        stream.close()


async def count_tokens(request: Request, service: LLMService, chat: Chat) -> int:
    """Return the number of tokens of a chat; cancelled when the client disconnects."""
    work = service.tokenize(chat, timeout_seconds(request.headers), add_special_tokens=False, with_texts=False)
    return len((await cancel_on_disconnect(request.receive, work)).token_ids)


async def encode_json(values: int, encode: Callable[[], dict[str, Any]]) -> Response:
    """Return the response with what `encode` returns, which has this number of values."""
    body = await response_encoding.encode(values, lambda: "".join(json_body.dump(encode())))
    return Response(body, media_type="application/json")


async def encode_completions(completions: Sequence[Completion], encode: Callable[[], dict[str, Any]]) -> Response:
    """Return the response with what `encode` makes of the completions."""
    return await encode_json(response_encoding.num_values(completions), encode)


class EventStream(StreamingResponse):
    """Server-sent events of a generation, flushed one by one; generation ends with the response.

    A request that is held while the model loads has comments first, which clients ignore and proxies count as activity.
    """

    def __init__(
        self, submission: asyncio.Future[CompletionStream], encoder: _EventEncoder, load_state: Callable[[], str]
    ) -> None:
        self._submission = submission
        super().__init__(
            _encode(submission, encoder, load_state),
            media_type="text/event-stream",
            # Proxies would hold events back, or compress several into one.
            headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"},
        )

    @classmethod
    async def start(
        cls, request: Request, service: LLMService, requests: Sequence[GenerationRequest], encoder: _EventEncoder
    ) -> Self:
        """Submit the requests; an error until then, or until they are held, is the response instead."""
        submission = asyncio.ensure_future(service.submit(requests, timeout_seconds(request.headers)))
        await asyncio.sleep(0)  # until the requests are held or rejected
        if submission.done() or not service.is_loading:
            await cancel_on_disconnect(request.receive, submission)
        return cls(submission, encoder, lambda: service.not_ready_reason)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as ASGI has it."""
        del scope
        try:
            with suppress(ClientDisconnect):
                await cancel_on_disconnect(receive, self.stream_response(send))
        finally:
            self._submission.cancel()
            [outcome] = await asyncio.gather(self._submission, return_exceptions=True)
            if not isinstance(outcome, BaseException):
                outcome.close()


async def _encode(
    submission: asyncio.Future[CompletionStream], encoder: _EventEncoder, load_state: Callable[[], str]
) -> AsyncIterator[str]:
    try:
        while not submission.done():
            # In one line: the state may have an error of the storage initializer.
            yield f": {' '.join(load_state().split())}\n\n"
            await asyncio.wait({submission}, timeout=COMMENT_SECONDS)
        stream = submission.result()
        for event in encoder.begin():
            yield event
        async with aclosing(stream.deltas()) as deltas:
            async for delta in deltas:
                values = response_encoding.num_values([delta])
                for event in await response_encoding.encode(values, partial(encoder.delta, delta)):
                    yield event
        for event in encoder.end():
            yield event
    except RequestError as error:
        request_record.current().error = type(error).__name__
        for event in encoder.error(error):
            yield event


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of `work`; cancel it when the client disconnects first.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for pending in (task, disconnect):
            pending.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
