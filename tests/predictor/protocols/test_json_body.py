import codecs
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from predictor.errors import InvalidRequest
from predictor.protocols import json_body
from predictor.protocols.openai import requests

TEXT = json.dumps({"model": "demo", "prompt": "é 🙂"}, ensure_ascii=False)
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize(
    "body", [*(TEXT.encode(encoding) for encoding in ENCODINGS), codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")]
)
def test_to_utf8_unicode_encoding_is_recognized(body: bytes) -> None:
    assert json_body.to_utf8(body) == TEXT.encode()
    assert json_body.loads(body) == json.loads(TEXT)
    assert requests.decode_completion(body).requests[0].prompt == "é 🙂"


@pytest.mark.parametrize("decode", [json_body.loads, requests.decode_completion, requests.decode_chat_completion])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "The body is empty. Send JSON."),
        (b'"caf\xe9"', "The body is not UTF-8 (invalid continuation byte at byte 4). Send JSON in UTF-8."),
        ('"a'.encode("utf-16")[:-1], "The body is not UTF-16-LE (truncated data at byte 4). Send JSON in UTF-8."),
        (b'"\0\0\xd8"\0', "The body is not UTF-16-LE (illegal UTF-16 surrogate at byte 2). Send JSON in UTF-8."),
    ],
)
def test_to_utf8_invalid_encoding_is_an_error(decode: Any, body: bytes, expected: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode(body)
    assert str(raised.value) == expected


def test_loads_half_of_a_surrogate_pair_in_utf16_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        json_body.loads(r'"\ud83d"'.encode("utf-16"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@example([{"a": [1, [2]]}] * 200)
@example({"é": {}, '"': []})
def test_dump_in_pieces_is_the_same_json(value: Any) -> None:
    assert "".join(json_body.dump(value)) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def test_dump_has_the_elements_of_a_long_list_by_slices() -> None:
    assert max(map(len, json_body.dump({"choices": [{"prompt_logprobs": [{"1": -1.5}] * 10_000}]}))) < 1500
