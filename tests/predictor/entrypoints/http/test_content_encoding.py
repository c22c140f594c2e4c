"""Content codings of request bodies, without a server."""

import asyncio
import gzip
import zlib
from collections.abc import Iterable

import pytest
from starlette.types import Message

from predictor.entrypoints.http.content_encoding import PIECE_BYTES, DecodedBody, content_coding
from predictor.errors import InvalidRequest, UnsupportedMediaType

BODY = b'{"prompt": "1+1="}' * 100
RAW_DEFLATE = zlib.compress(BODY, wbits=-15)
ENCODED = [
    ("gzip", gzip.compress(BODY, mtime=0)),
    ("gzip", gzip.compress(BODY, compresslevel=0, mtime=0)),
    ("deflate", zlib.compress(BODY)),
    ("deflate", zlib.compress(BODY, wbits=9)),
    ("deflate", RAW_DEFLATE),
    ("deflate", zlib.compress(BODY, 0, wbits=-15)),
]


def decode(coding: str, pieces: Iterable[bytes]) -> list[bytes]:
    """Return the decoded pieces of a body that arrives in these pieces, after which the client disconnects."""
    body = list(pieces)
    messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in body]
    messages[-1]["more_body"] = False
    messages.append({"type": "http.disconnect"})

    async def receive() -> Message:
        return messages.pop(0)

    async def read() -> list[bytes]:
        decoded, pieces, more = DecodedBody(receive, coding), [], True
        while more:
            message = await decoded.receive()
            pieces.append(message["body"])
            more = message["more_body"]
        assert await decoded.receive() == {"type": "http.disconnect"}
        return pieces

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("headers", "coding"),
    [
        ([], None),
        ([""], None),
        (["identity"], None),
        (["gzip"], "gzip"),
        ([" X-GZip "], "gzip"),
        (["Deflate"], "deflate"),
        (["identity, gzip"], "gzip"),
        (["identity", "deflate"], "deflate"),
    ],
)
def test_content_coding_supported_is_returned(headers: list[str], coding: str | None) -> None:
    assert content_coding(headers) == coding


@pytest.mark.parametrize("headers", [["br"], ["zstd"], ["compress"], ["gzip, gzip"], ["deflate", "gzip"], ["gzip;q=1"]])
def test_content_coding_not_supported_is_an_error(headers: list[str]) -> None:
    with pytest.raises(UnsupportedMediaType, match=r"is not supported\. Use gzip or deflate, or omit it\.$"):
        content_coding(headers)


@pytest.mark.parametrize(("coding", "encoded"), ENCODED)
def test_decoded_body_in_any_pieces_equals_the_body(coding: str, encoded: bytes) -> None:
    assert b"".join(decode(coding, [encoded])) == BODY
    assert b"".join(decode(coding, [encoded[:1], b"", encoded[1:], b""])) == BODY
    assert b"".join(decode(coding, [encoded[index : index + 1] for index in range(len(encoded))])) == BODY


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 20 * PIECE_BYTES])
def test_decoded_body_has_small_pieces(size: int) -> None:
    pieces = decode("gzip", [gzip.compress(b"x" * size, mtime=0)])
    assert b"".join(pieces) == b"x" * size
    assert max(map(len, pieces)) <= PIECE_BYTES


def test_decoded_body_without_data_is_empty() -> None:
    assert decode("gzip", [b""]) == [b""]


@pytest.mark.parametrize(
    ("coding", "encoded", "expected"),
    [
        ("gzip", BODY, r"^The body is not gzip \(.*\)\. Send gzip data, or omit Content-Encoding\.$"),
        ("gzip", zlib.compress(BODY), "is not gzip"),
        ("deflate", b"\xff" * 100, "is not deflate"),
        ("gzip", gzip.compress(BODY, mtime=0)[:-8] + b"\0" * 8, "is not gzip"),
        ("gzip", gzip.compress(BODY, mtime=0)[:-1], r"^The body is truncated: its gzip data has no end\."),
        ("deflate", RAW_DEFLATE[:-1], "is truncated"),
        ("gzip", gzip.compress(BODY, mtime=0) + b"x", r"^The body has data after the end of its gzip data\."),
        ("gzip", gzip.compress(BODY, mtime=0) * 2, "has data after the end"),
    ],
)
def test_decoded_body_malformed_is_an_error(coding: str, encoded: bytes, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=expected):
        decode(coding, [encoded])
    with pytest.raises(InvalidRequest, match=expected):
        decode(coding, [encoded[index : index + 1] for index in range(len(encoded))])
