"""Where responses are encoded."""

import asyncio
import threading
from typing import Any

import pytest

from predictor.entrypoints import response_encoding
from predictor.entrypoints.response_encoding import MAX_INLINE_VALUES, VALUES_PER_TOKEN
from predictor.protocols import tokenization
from predictor.types import Completion, FinishReason, Token
from tests.predictor.servers import InProcessServer

NUM_TOKENS = MAX_INLINE_VALUES // VALUES_PER_TOKEN


@pytest.mark.parametrize("generated", [0, NUM_TOKENS])
def test_encode_completions_with_many_tokens_needs_a_thread(generated: int) -> None:
    def threads_for(num_tokens: int) -> threading.Thread:
        tokens = (Token(7, "7", -0.5),) * num_tokens
        completion = Completion(
            "7",
            finish_reason=FinishReason.LENGTH,
            prompt_tokens=1,
            completion_tokens=1,
            tokens=tokens[:generated],
            prompt=tokens[generated:],
        )
        values = response_encoding.num_values([completion])
        return asyncio.run(response_encoding.encode(values, threading.current_thread))

    assert threads_for(NUM_TOKENS) is threading.current_thread()
    assert threads_for(NUM_TOKENS + 1) is not threading.current_thread()


@pytest.mark.parametrize("size", [1, MAX_INLINE_VALUES + 1])
def test_tokenize_response_with_many_tokens_is_encoded_in_a_thread(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    names: list[str] = []
    encode = tokenization.encode_tokenize

    def record(*arguments: Any) -> dict[str, Any]:
        names.append(threading.current_thread().name)
        return encode(*arguments)

    monkeypatch.setattr(tokenization, "encode_tokenize", record)
    response = server.client.post("/tokenize", json={"prompt": "7" * size, "add_special_tokens": False})
    assert response.json()["count"] == size
    assert [name.startswith("asyncio_") for name in names] == [size > 1]
