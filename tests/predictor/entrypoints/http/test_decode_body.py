"""Where the bodies of requests are decoded."""

import threading

import pytest

from predictor.entrypoints.http.streaming import MAX_INLINE_BYTES
from predictor.protocols import json_object
from tests.predictor.servers import PROTOCOLS, Call, InProcessServer

OPENAI_CHAT, V1 = "/v1/chat/completions", "/v1/models/demo:predict"


@pytest.mark.parametrize("size", [1, MAX_INLINE_BYTES])
@pytest.mark.parametrize("protocol", [*PROTOCOLS, OPENAI_CHAT, V1])
def test_decode_body_large_one_is_decoded_in_a_thread(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch, protocol: str, size: int
) -> None:
    threads: set[str] = set()
    objects = json_object._objects

    def record(item: json_object.JSONObject, path: str) -> object:
        if not path:  # infer's parameters have one; they are decoded later
            threads.add(threading.current_thread().name)
        return objects(item, path)

    monkeypatch.setattr(json_object, "_objects", record)
    text = "7" * size
    if protocol == OPENAI_CHAT:
        body = {"model": "demo", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        response = server.client.post(protocol, json=body)
    elif protocol == V1:
        response = server.client.post(protocol, json={"instances": [text], "parameters": {"max_tokens": 1}})
    else:
        response = Call(server, protocol, 1, prompt=text).post()
    assert (response.status_code == 200) is (size == 1)
    assert [name.startswith("asyncio_") for name in threads] == [size > 1]
