"""The OpenAPI document and the responses that it describes."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.predictor.servers import InProcessServer

Json = dict[str, Any]
PROMPT = {"messages": [{"role": "user", "content": "17 + 25 ="}], "max_tokens": 8}
RESPONSE = {"input": "17 + 25 =", "max_output_tokens": 8, "include": ["message.output_text.logprobs"]}
SCORED = {"logprobs": True, "prompt_logprobs": 1, "service_tier": "auto"}


def _undeclared(schema: Json, value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of fields in `value` that the schema does not have; any field may be in an object without any."""
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    if isinstance(value, list):
        for item in value:
            yield from _undeclared(options[0].get("items", {}), item, f"{path}[]")
    elif isinstance(value, dict) and options and (properties := options[0].get("properties")):
        for name, item in value.items():
            if name in properties:
                yield from _undeclared(properties[name], item, f"{path}.{name}")
            else:
                yield f"{path}.{name}"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "17 + 25 =", "max_tokens": 8, "logprobs": 1, "prompt_logprobs": 1}),
        ("/v1/chat/completions", PROMPT | SCORED),
        ("/v1/responses", RESPONSE),
        ("/v1/messages", PROMPT),
        ("/v1/messages/count_tokens", PROMPT),
        ("/tokenize", {"prompt": "17 + 25 =", "return_token_strs": True}),
    ],
)
def test_document_declares_every_field_of_a_response(server: InProcessServer, path: str, body: Json) -> None:
    response = server.client.post(path, json={"model": "demo", **body})
    assert response.status_code == 200
    operation = server.client.get("/openapi.json").json()["paths"][path]["post"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert sorted(_undeclared(schema, response.json())) == []
