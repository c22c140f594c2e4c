"""Random JSON schemas over HTTP: what the demo model writes at temperature 2 follows them."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.predictor.generation.json_schemas import SCHEMAS
from tests.predictor.servers import InProcessServer
from tests.sizes import IS_NIGHTLY

Json = dict[str, Any]
BATCH = 16
"""Schemas whose answers are generated together."""
FORMATS = jsonschema.FormatChecker(["uuid", "email", "ipv4", "ipv6"])
"""A grammar cannot express leap years, and jsonschema's check of times allows no offset."""


def _answer_body(schema: Json) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def _call_body(schema: Json, *, required: bool) -> Json:
    function = {"name": "answer", "parameters": _parameters(schema), "strict": True}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required" if required else "auto"}


def _parameters(schema: Json) -> Json:
    value = {keyword: item for keyword, item in schema.items() if keyword != "$defs"}
    parameters = {
        "type": "object",
        "properties": {"value": value},
        "required": ["value"],
        "additionalProperties": False,
    }
    return {**parameters, "$defs": schema["$defs"]} if "$defs" in schema else parameters


def _check(server: InProcessServer, schemas: list[Json]) -> Counter[str]:
    """Return how many answers and calls ended, were cut off, and were refused; those that ended are valid."""
    bodies = [_answer_body(schema) for schema in schemas]
    bodies += [_call_body(schema, required=bool(index % 2)) for index, schema in enumerate(schemas)]
    expected = [*schemas, *map(_parameters, schemas)]

    def ask(indexed: tuple[int, Json]) -> Any:
        index, body = indexed
        messages = [{"role": "user", "content": "What is 17 + 25?"}]
        common = {"model": "demo", "messages": messages, "temperature": 2, "seed": index, "max_tokens": 150}
        return server.client.post("/v1/chat/completions", json={**common, **body})

    outcomes: Counter[str] = Counter()
    with ThreadPoolExecutor(BATCH) as threads:
        for body, response, schema in zip(bodies, threads.map(ask, enumerate(bodies)), expected, strict=True):
            if response.status_code == 400:
                outcomes["refused"] += 1
                continue
            [choice] = response.json()["choices"]
            outcomes[choice["finish_reason"]] += 1
            if choice["finish_reason"] != "length":
                for text in _texts(body, choice["message"]):
                    jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
    return outcomes


def _texts(body: Json, message: Json) -> Iterator[str]:
    """Yield the JSON in a message; the model may write text if it need not call."""
    if "tools" not in body:
        yield message["content"]
    elif body["tool_choice"] == "required" or message.get("tool_calls"):
        for call in message["tool_calls"]:
            assert call["function"]["name"] == "answer"
            yield call["function"]["arguments"]


@pytest.mark.parametrize(
    "num_batches",
    [2, pytest.param(63 if IS_NIGHTLY else 16, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
    ids=["few", "many"],
)
def test_answers_and_strict_calls_of_random_schemas_are_valid(server: InProcessServer, num_batches: int) -> None:
    outcomes: Counter[str] = Counter()
    num_schemas = 0

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=num_batches,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(SCHEMAS, min_size=BATCH, max_size=BATCH))
    def check(schemas: list[Json]) -> None:
        nonlocal num_schemas
        num_schemas += len(schemas)
        outcomes.update(_check(server, schemas))

    check()
    print(num_schemas, "schemas:", dict(outcomes))  # noqa: T201, shown with -s
    assert num_schemas >= BATCH * num_batches
    assert min(outcomes["stop"], outcomes["tool_calls"]) >= 4 * num_batches
    assert outcomes["refused"] < 1.2 * num_schemas
