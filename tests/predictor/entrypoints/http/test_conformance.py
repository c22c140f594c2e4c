"""Responses conform to the server's OpenAPI document and to the Open Inference Protocol's."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.predictor.servers import Server

SPECIFICATIONS = os.environ.get("OPEN_INFERENCE_DIR")
EXAMPLES = int(os.environ.get("CONFORMANCE_EXAMPLES", "5"))
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
FIXED = {"model_name": "demo", "model_version": "1", "MODEL_NAME": "demo", "MODEL_VERSION": "1"}
LONGEST = {"max_tokens": 4, "max_completion_tokens": 4, "n": 2}
TENSOR = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["17+25="]}
MESSAGE = {"role": "user", "content": "What is 17 + 25?"}
RIGHT: dict[str, dict[str, Any]] = {
    "/infer": {"inputs": [TENSOR], "outputs": [{"name": "text_output"}, {"name": "logprobs"}]},
    "/generate": {"text_input": "17+25=", "parameters": {"details": True}},
    "/generate_stream": {"text_input": "17+25=", "parameters": {"details": True}},
    "/chat/completions": {"model": "demo", "messages": [MESSAGE], "logprobs": True, "service_tier": "auto"},
    "/completions": {"model": "demo", "prompt": "17+25=", "logprobs": 1},
    ":predict": {"instances": ["17+25=", [MESSAGE]]},
}
"""Bodies of routes, by the end of their path."""

Ask = Callable[[Case], requests.Response]


@pytest.fixture
def ask(server: Server) -> Iterator[Ask]:
    with requests.Session() as session:
        session.trust_env = False

        def call(case: Case) -> Any:
            case.path_parameters = {name: FIXED[name] for name in case.path_parameters or {}}
            case.body = brief(case.body, case.path)
            return case.call(base_url=server.url, session=session, timeout=60)

        yield call


def brief(body: Any, path: str) -> Any:
    """A body for the model that is there, and for few tokens; what is wrong in it stays wrong."""
    if not isinstance(body, dict):
        return body
    if "completions" not in path:
        parameters = body.get("parameters", {})
        return body | {"parameters": bounded(parameters)} if isinstance(parameters, dict) else body
    return bounded(body) | ({"model": "demo"} if isinstance(body.get("model"), str) else {})


def bounded(fields: dict[str, Any]) -> dict[str, Any]:
    limited = {name: most for name, most in LONGEST.items() if type(fields.get(name)) is int}
    too_much = {name: most for name, most in limited.items() if most < fields[name] <= 100}
    unlimited = fields.get("max_tokens") is None and fields.get("max_completion_tokens") is None
    return fields | too_much | ({"max_tokens": LONGEST["max_tokens"]} if unlimited else {})


def operations_of(document: dict[str, Any]) -> list[Any]:
    return [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]


def specified(name: str) -> list[Any]:
    if SPECIFICATIONS is None:
        pytest.skip("OPEN_INFERENCE_DIR does not name a folder with the protocol's specifications")
    document = yaml.safe_load((Path(SPECIFICATIONS) / name).read_text().replace("/${MODEL_", "/{MODEL_"))
    for path in document["paths"].values():
        for response in path.get("post", {}).get("responses", {}).values():
            if stream := response["content"].get("text/event-stream"):
                # The protocol says what an event's data is; that it is one event's is left to the reader.
                data = {"type": "string", "contentMediaType": "application/json", "contentSchema": stream["schema"]}
                stream["schema"] = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return operations_of(document)


def check_operation(operation: Any, ask: Ask, mode: GenerationMode) -> None:
    """Whatever an operation is asked, the answer is one that its description knows."""
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        case.validate_response(ask(case), checks=checks)

    check()


def modes(operation: Any) -> list[GenerationMode]:
    return list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]


def right(operation: Any) -> Case:
    """A request that the operation has to answer."""
    ends = [end for end in RIGHT if operation.path.endswith(end)]
    parameters = {parameter.name: FIXED[parameter.name] for parameter in operation.path_parameters}
    if not ends:
        return operation.Case(path_parameters=parameters)
    return operation.Case(path_parameters=parameters, body=RIGHT[ends[0]], media_type="application/json")


def test_valid_request_to_every_route_conforms_to_the_openapi_document(client: httpx.Client, ask: Ask) -> None:
    operations = operations_of(client.get("/openapi.json").json())
    assert len(operations) > 20
    for operation in operations:
        case = right(operation)
        response = ask(case)
        assert response.status_code == 200, (operation.label, response.text)
        case.validate_response(response, checks=CHECKS)


@pytest.mark.slow
def test_generated_requests_conform_to_the_openapi_document(client: httpx.Client, ask: Ask) -> None:
    for operation in operations_of(client.get("/openapi.json").json()):
        for mode in modes(operation):
            check_operation(operation, ask, mode)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["open_inference_rest.yaml", "generate_rest.yaml"])
def test_generated_requests_conform_to_the_open_inference_protocol(ask: Ask, name: str) -> None:
    operations = specified(name)
    assert operations
    for operation in operations:
        case = right(operation)
        case.validate_response(ask(case), checks=CHECKS)
        check_operation(operation, ask, GenerationMode.POSITIVE)
