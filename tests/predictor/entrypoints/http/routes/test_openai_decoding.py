"""Where the bodies of OpenAI's routes are decoded."""

import threading

import httpx
import pytest

from predictor.entrypoints.http.routes import openai
from predictor.protocols.openai import schemas


@pytest.mark.parametrize("size", [1, openai.MAX_INLINE_BYTES])
def test_large_body_is_decoded_in_a_thread(client: httpx.Client, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    threads: list[str] = []
    dump = schemas._Message.to_template_message

    def record(message: schemas._Message) -> object:
        threads.append(threading.current_thread().name)
        return dump(message)

    monkeypatch.setattr(schemas._Message, "to_template_message", record)
    body = {"model": "demo", "messages": [{"role": "user", "content": "7" * size}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=body).status_code == (200 if size == 1 else 400)
    assert [name.startswith("asyncio_") for name in threads] == [size > 1]
