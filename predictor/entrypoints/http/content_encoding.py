"""Decode request bodies with a `Content-Encoding` while they arrive."""

import zlib
from collections.abc import Iterator, Sequence

from starlette.types import Message, Receive

from predictor.errors import InvalidRequest, UnsupportedMediaType

PIECE_BYTES = 65_536
"""Maximum size of a decoded piece: a small body may decode to a thousand times its size."""

_ZLIB_METHOD = 8
"""Low four bits of a zlib stream's first byte; no encoder begins a raw deflate stream with them."""


def content_coding(headers: Sequence[str]) -> str | None:
    """Return `gzip`, `deflate` or, for a body that is not encoded, None.

    Args:
        headers: values of all `Content-Encoding` headers.

    Raises:
        UnsupportedMediaType: another coding, or several.
    """
    codings = [coding.strip().lower().removeprefix("x-") for coding in ",".join(headers).split(",")]
    codings = [coding for coding in codings if coding not in ("", "identity")]
    if not codings:
        return None
    if codings not in (["gzip"], ["deflate"]):
        raise UnsupportedMediaType(
            f"Content-Encoding {', '.join(codings)!r} is not supported. Use gzip or deflate, or omit it."
        )
    return codings[0]


class DecodedBody:
    """The body of one request, decoded.

    Args:
        receive: ASGI's, of the encoded body.
        coding: `gzip`, or `deflate` with or without zlib's header.
    """

    def __init__(self, receive: Receive, coding: str) -> None:
        self._receive = receive
        self._coding = coding
        self._stream: zlib._Decompress | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._more_body = True
        self._is_complete = False

    async def receive(self) -> Message:
        """Return ASGI's next message, with at most `PIECE_BYTES` of the decoded body.

        Raises:
            InvalidRequest: the body is malformed, truncated, or followed by more data.
        """
        while not self._is_complete:
            if piece := self._next_piece():
                return {"type": "http.request", "body": piece, "more_body": True}
            if not self._more_body:
                if self._stream and not self._stream.eof:
                    raise InvalidRequest(f"The body is truncated: its {self._coding} data has no end. Send all of it.")
                self._is_complete = True
                return {"type": "http.request", "body": b"", "more_body": False}
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._more_body = message.get("more_body", False)
            self._pieces = self._decode(message.get("body", b""))
        return await self._receive()

    def _next_piece(self) -> bytes | None:
        try:
            return next(self._pieces, None)
        except zlib.error as error:
            raise InvalidRequest(
                f"The body is not {self._coding} ({error}). Send {self._coding} data, or omit Content-Encoding."
            ) from None

    def _decode(self, encoded: bytes) -> Iterator[bytes]:
        has_more_output = False
        while encoded or has_more_output:
            if self._stream is None:
                self._stream = zlib.decompressobj(self._window_bits(encoded[0]))
            if self._stream.eof:
                raise InvalidRequest(f"The body has data after the end of its {self._coding} data. Send one stream.")
            piece = self._stream.decompress(encoded, PIECE_BYTES)
            encoded = self._stream.unconsumed_tail or self._stream.unused_data
            has_more_output = len(piece) == PIECE_BYTES and not self._stream.eof
            if piece:
                yield piece

    def _window_bits(self, first_byte: int) -> int:
        """Return zlib's `wbits`, which select the format too."""
        if self._coding == "gzip":
            return zlib.MAX_WBITS | 16
        return zlib.MAX_WBITS if first_byte & 0x0F == _ZLIB_METHOD else -zlib.MAX_WBITS
